"""The load must count failures, or "0 failed" would prove nothing."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from demo.load import SteadyLoad

CHUNK = b'data: {"id": "1", "object": "text_completion", "created": 1, "model": "a@1", "choices": []}\n\n'


class BreaksOff(BaseHTTPRequestHandler):
    """Begins a stream and closes the connection in the middle."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", "10000")
        self.end_headers()
        self.wfile.write(CHUNK)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def failures(url: str, seconds: float) -> tuple[int, list[str]]:
    load = SteadyLoad(url, {"a": ["one", "two"], "b": ["three"]}, rate=20.0, max_tokens=4).start()
    time.sleep(seconds)
    answers = load.stop()
    assert {answer.adapter for answer in answers} == {"a", "b"}
    return load.num_sent, [answer.error for answer in answers]


def test_without_a_server_every_request_fails():
    num_sent, errors = failures("http://127.0.0.1:9/v1", 0.5)
    assert 3 <= num_sent == len(errors)
    assert all("APIConnectionError" in error for error in errors)


def test_streams_that_break_off_are_failures_with_a_cause(address: str):
    num_sent, errors = failures(address, 0.5)
    assert 3 <= num_sent == len(errors)
    assert all(errors)


def test_a_load_whose_thread_ended_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("threading.excepthook", lambda died: None)  # it would print the expected traceback
    load = SteadyLoad(
        "http://127.0.0.1:9/v1", {}, rate=20.0, max_tokens=4
    )  # nothing to send, so its thread ends with an error
    load.start()
    load._thread.join()
    with pytest.raises(AssertionError, match="until it is stopped"):
        load.stop()
