"""Locust: a few seconds of load from several users, without a failed request."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.clients.checklist import Checklist, Target

check = Checklist("locust", "locust")
USER = """
from locust import HttpUser, task

class User(HttpUser):
    @task
    def complete(self):
        body = {{"model": {model!r}, "prompt": "Once upon a time", "max_tokens": 4}}
        self.client.post("/v1/completions", json=body)

    @task
    def stream(self):
        messages = [{{"role": "user", "content": "Hello"}}]
        body = {{"model": {model!r}, "messages": messages, "max_tokens": 4, "stream": True}}
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as reply:
            if b"data: [DONE]" not in reply.content:
                reply.failure("the stream did not end with [DONE]")
"""


@check
def load(target: Target) -> None:
    """Four users that ask the adapter for completions and streamed chats."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "locustfile.py"
        file.write_text(USER.format(model=target.adapter))
        command = [sys.executable, "-m", "locust", "--headless", "-f", str(file), "--host", target.url, "--json"]
        command += ["--users", "4", "--spawn-rate", "4", "--run-time", "20s", "--stop-timeout", "300s"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        routes = json.loads(done.stdout)
    assert {route["name"] for route in routes} == {"/v1/completions", "/v1/chat/completions"}
    assert sum(route["num_failures"] for route in routes) == 0, routes


if __name__ == "__main__":
    check.main()
