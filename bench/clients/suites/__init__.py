"""One module per client, with its usual calls. Each runs in the interpreter that has the client installed.

They import nothing of ours but `bench.clients.checklist`, and start with `python -m bench.clients.suites.NAME`.
"""
