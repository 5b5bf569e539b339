"""HTTP without a client library, as curl, a browser and probes use it."""

import httpx

from bench.clients.checklist import Checklist, Target

check = Checklist("http", "httpx")


def call(target: Target, method: str, path: str, **more) -> httpx.Response:
    """Send a request to the server; raises for a status that is an error."""
    reply = httpx.request(method, f"{target.url}{path}", timeout=120, **more)
    reply.raise_for_status()
    return reply


@check
def probes(target: Target) -> None:
    """Health, version and load."""
    for path in ("/health", "/ping", "/version", "/load", "/metrics"):
        call(target, "GET", path)


@check
def pages(target: Target) -> None:
    """The first page and the API's documentation load nothing from elsewhere."""
    for path in ("/", "/docs"):
        assert "://cdn" not in call(target, "GET", path).text


@check
def a_browser_may_ask(target: Target) -> None:
    """A preflight of an allowed origin."""
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    reply = call(target, "OPTIONS", "/v1/chat/completions", headers=asked)
    assert reply.headers["access-control-allow-origin"] in ("*", "http://localhost:3000")


@check
def text_becomes_tokens_and_back(target: Target) -> None:
    """/tokenize and /detokenize."""
    body = {"model": target.base, "prompt": "Once upon a time", "add_special_tokens": False}
    tokens = call(target, "POST", "/tokenize", json=body).json()["tokens"]
    text = call(target, "POST", "/detokenize", json={"model": target.base, "tokens": tokens}).json()["prompt"]
    assert text == "Once upon a time"


@check
def a_chat_has_a_number_of_tokens(target: Target) -> None:
    """/tokenize of messages."""
    body = {"model": target.base, "messages": [{"role": "user", "content": "Hello"}]}
    assert call(target, "POST", "/tokenize", json=body).json()["count"] > 4


@check
def a_model_tells_its_context(target: Target) -> None:
    """`max_model_len`, which agents and evaluation tools read."""
    assert call(target, "GET", f"/v1/models/{target.adapter}").json()["max_model_len"] > 0


@check
def events_end_with_done(target: Target) -> None:
    """A stream is server-sent events up to [DONE]."""
    body = {"model": target.base, "prompt": "Once", "max_tokens": 2, "stream": True}
    lines = [line for line in call(target, "POST", "/v1/completions", json=body).text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


@check
def scores(target: Target) -> None:
    """/v1/score of two texts."""
    body = {"model": target.base, "text_1": "a cat", "text_2": ["a cat", "a tax form"]}
    first, second = call(target, "POST", "/v1/score", json=body).json()["data"]
    assert first["score"] > second["score"]


@check
def a_bad_body_names_its_field(target: Target) -> None:
    """An error has OpenAI's shape and says where."""
    body = {"model": target.base, "prompt": "x", "max_tokens": "many"}
    reply = httpx.post(f"{target.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "max_tokens" in reply.json()["error"]["message"]


if __name__ == "__main__":
    check.main()
