"""The request bodies of the HTTP interface, one file per API, and the calls that they ask for.

The server rejects OpenAI fields that it does not support, by name: an error is better than an answer that ignores part
of the request. It accepts fields that do not change the answer, and values that ask for nothing (such as
`frequency_penalty=0`). `null` means the default, as with OpenAI.
"""
