"""Tests the HTTP interface over a real engine, with the `openai` client and with plain HTTP."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from cluster.config.settings import ServingConfig
from cluster.errors import ReloraError, StorageError
from serving import errors as serving_errors
from serving.engine.request import FinishReason, TokenEvent
from serving.errors import HTTP_ERRORS, http_error
from serving.gateway.local_backend import LocalBackend
from tests.worlds.servers import Server, serve_bases, wait_until
from tests.worlds.serving import make_adapter, make_checkpoint, set_chat_template

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TOO_LONG = "x" * 5000  # longer than a file name may be
CONFIG = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=400, max_rank=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make base v1 with a chat template, base v2 without one, and two adapters of v1."""
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "v1")
    make_checkpoint(folder / "v2", seed=1)
    set_chat_template(folder / "v1", TEMPLATE)
    for seed, name in enumerate(("intent", "summary")):
        make_adapter(folder / name, folder / "v1", rank=4 + seed, seed=seed)
    return folder


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory):
    with serve_bases(files, tmp_path_factory.mktemp("server"), CONFIG, ("v1", "v2")) as server:
        for name in ("intent", "summary"):
            body = {"lora_name": name, "lora_path": str(files / name), "base_model_name": "v1"}
            assert server.post("/v1/load_lora_adapter", **body).status_code == 200
        yield server


# Answers.


def test_models_are_listed_with_their_live_versions(server: Server):
    listed = {model.id: model for model in server.client.models.list()}
    assert {"v1", "v2", "intent", "summary"} <= set(listed)
    assert listed["intent"].parent == "v1"
    assert listed["intent"].version == "intent@1"
    assert server.client.models.retrieve("intent@1").id == "intent"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nobody")


@pytest.mark.parametrize("model", ["v1", "v2", "intent", "summary@1"])
def test_a_streamed_completion_equals_a_whole_one(server: Server, model: str):
    asked = {"model": model, "prompt": "Where is my card?", "max_tokens": 24, "temperature": 0}
    whole = server.client.completions.create(**asked)
    chunks = list(server.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.total_tokens == 17 + whole.usage.completion_tokens
    label = model if "@" in model or model.startswith("v") else f"{model}@1"
    assert {chunk.model for chunk in chunks} == {whole.model} == {label}
    assert whole.system_fingerprint == ("v2" if model == "v2" else "v1")
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_streams_have_openais_format(server: Server):
    body = {"model": "intent", "prompt": "hi", "max_tokens": 5, "temperature": 0, "stream": True}
    response = server.post("/v1/completions", **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-relora-version"] == "intent@1"
    assert response.headers["x-relora-base"] == "v1"
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all(chunk["object"] == "text_completion" and "usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("model", ["v1", "intent"])
def test_a_streamed_chat_equals_a_whole_one(server: Server, model: str):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [_text("Hel"), _text("lo")]}]
    asked = {"model": model, "messages": messages, "max_tokens": 20, "temperature": 0}
    whole = server.client.chat.completions.create(**asked)
    chunks = list(server.client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.prompt_tokens == len("<system>Be brief.\n<user>Hello\n<a>")
    plain = server.client.completions.create(
        model=model, prompt="<system>Be brief.\n<user>Hello\n<a>", max_tokens=20, temperature=0
    )
    assert plain.choices[0].text == whole.choices[0].message.content


def test_chat_without_a_limit_ends_at_the_context_length(server: Server):
    chat = server.client.chat.completions.create(
        model="v1", messages=[{"role": "user", "content": "x" * 350}], temperature=0, extra_body={"ignore_eos": True}
    )
    assert chat.usage.total_tokens == CONFIG.max_model_tokens
    assert chat.choices[0].finish_reason == "length"


def test_chat_needs_a_template(server: Server):
    response = server.post("/v1/chat/completions", model="v2", messages=[{"role": "user", "content": "hi"}])
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]


def test_all_prompt_forms_give_the_same_answers(server: Server):
    def texts(prompt) -> list[str]:
        done = server.client.completions.create(model="v1", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.index for choice in done.choices] == list(range(len(done.choices)))
        return [choice.text for choice in done.choices]

    tokens = AutoTokenizer.from_pretrained(server.files / "v1")("tokens")["input_ids"]
    [expected] = texts("tokens")
    assert texts(["tokens"]) == texts(tokens) == texts([tokens]) == [expected]
    assert texts(["tokens", "other"])[0] == expected
    assert texts(["tokens", "other"])[1] == texts("other")[0]


def test_choices_differ_and_repeat_with_a_seed(server: Server):
    asked = {"model": "intent", "prompt": "once", "n": 3, "seed": 5, "max_tokens": 12, "temperature": 1.0}
    first = server.client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert first.usage.prompt_tokens == 4, "a prompt counts once"
    streamed = {0: "", 1: "", 2: ""}
    for chunk in server.client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == texts


def test_logprobs_of_completions(server: Server):
    asked = {"model": "v1", "prompt": "abc", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    logprobs = server.client.completions.create(**asked).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(top) <= 3
        assert top[token] == pytest.approx(logprob), "greedy takes the likeliest"
    chunks = list(server.client.completions.create(**asked, stream=True))
    pieces = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for piece in pieces for token in piece.tokens] == logprobs.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == logprobs.text_offset
    assert [x for piece in pieces for x in piece.token_logprobs] == pytest.approx(logprobs.token_logprobs, abs=1e-5)


def test_logprobs_of_chat(server: Server):
    asked = {"model": "v1", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4, "temperature": 0}
    content = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(content) == 4
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token for one in content)
    alone = server.client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs.content
    assert all(one.top_logprobs == [] for one in alone)
    assert server.client.chat.completions.create(**asked).choices[0].logprobs is None


def test_stop_strings_cut_the_answer(server: Server):
    asked = {"model": "summary", "prompt": "stop here", "max_tokens": 30, "temperature": 0}
    text = server.client.completions.create(**asked).choices[0].text
    stop = text[8:10]
    stops = ["never-there-1", "never-there-2", "never-there-3", "never-there-4", stop]
    cut = server.client.completions.create(**asked, stop=stops).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    chunks = list(server.client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text


def test_stop_tokens_cut_the_answer(server: Server):
    asked = {"model": "summary", "prompt": "stop here", "max_tokens": 30, "temperature": 0}
    text = server.client.completions.create(**asked).choices[0].text
    letter = next(letter for letter in text[5:] if letter.isascii())
    (token,) = AutoTokenizer.from_pretrained(server.files / "v1")(letter, add_special_tokens=False)["input_ids"]
    cut = server.client.completions.create(**asked, extra_body={"stop_token_ids": [token]}).choices[0]
    assert cut.text == text[: text.index(letter)]
    assert cut.finish_reason == "stop"
    more = {"stop_token_ids": [token], "include_stop_str_in_output": True}
    shown = server.client.completions.create(**asked, extra_body=more).choices[0]
    assert shown.text == text[: text.index(letter) + 1]
    raw = server.client.completions.create(**asked, extra_body={**more, "skip_special_tokens": False}).choices[0]
    assert raw.text != shown.text
    assert raw.text.replace("<s>", "") == shown.text


async def test_concurrent_requests_get_their_own_answers(server: Server):
    client = server.async_client
    models = ["v1", "v2", "intent", "summary"]

    async def ask(i: int) -> tuple[str, str]:
        done = await client.completions.create(
            model=models[i % 4], prompt=f"number {i % 8}", max_tokens=10, temperature=0
        )
        return done.model.split("@")[0], done.choices[0].text

    alone = [await ask(i) for i in range(8)]
    together = await asyncio.gather(*(ask(i) for i in range(48)))
    assert together == alone * 6
    assert [model for model, _ in together] == models * 12
    assert len({text for _, text in alone}) > 4
    await client.close()


# Errors.


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"model": None}, "model"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": ""}, "stop.0"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids.1"),
        ({"echo": "yes"}, "echo"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"suffix": "end"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 0.8}, "length_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"guided_everything": "{}"}, "guided_everything"),
        ({"stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ],
)
def test_invalid_completion_bodies_are_rejected_by_field(server: Server, bad: dict, param: str):
    body = {"model": "v1", "prompt": "hi", **bad}
    response = server.post("/v1/completions", **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logit_bias": {"99999": 1}}, "logit_bias has 99999: the model's ids are 0 to"),
        ({"allowed_token_ids": [99999]}, "allowed_token_ids has 99999"),
        ({"stop_token_ids": [99999]}, "stop_token_ids has 99999"),
        ({"bad_words": [" "]}, "bad_words: ' ' has no tokens"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens is 9, above max_tokens, which is 4"),
    ],
)
def test_fields_that_the_model_cannot_follow_are_rejected(server: Server, bad: dict, message: str):
    response = server.post("/v1/completions", model="v1", prompt="hi", **bad)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


def test_the_answer_follows_the_sampling_fields(server: Server):
    """Each field changes what the tiny model writes, in the way that its name says."""
    tokenizer = AutoTokenizer.from_pretrained(server.files / "v1")
    asked = {"model": "intent", "prompt": "once", "max_tokens": 12, "temperature": 0, "logprobs": 0}

    def text_of(**more) -> str:
        return server.client.completions.create(**asked, extra_body=more).choices[0].text

    plain = text_of()
    favourite = tokenizer.convert_tokens_to_ids("Q")
    assert text_of(logit_bias={str(favourite): 100}) == "Q" * 12
    varied = text_of(logit_bias={str(favourite): 50}, frequency_penalty=2.0, presence_penalty=1.0)
    assert varied.startswith("QQ")
    assert text_of(logit_bias={str(favourite): 50}, bad_words=["QQ"]).startswith("Q")
    assert "QQ" not in text_of(logit_bias={str(favourite): 50}, bad_words=["QQ"])
    assert set(text_of(allowed_token_ids=tokenizer.convert_tokens_to_ids(["a", "b"]))) <= {"a", "b"}
    letter = next(letter for letter in plain if letter.isascii())
    assert letter not in text_of(bad_words=[letter])
    assert text_of(stop=[letter]) == plain[: plain.index(letter)]
    assert text_of(stop=[letter], min_tokens=12) == plain
    assert text_of(repetition_penalty=1.0, min_p=0.0, bad_words=[], logit_bias={}, min_tokens=0) == plain


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_objects"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_invalid_chat_bodies_are_rejected_by_field(server: Server, bad: dict, word: str):
    body = {"model": "v1", "messages": [{"role": "user", "content": "hi"}], **bad}
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400, response.text
    assert word in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind"), [('{"model": "v1",', "application/json"), ('{"model": "v1", "prompt": "a"}', "text/plain")]
)
def test_the_error_for_a_bad_body_or_content_type_names_json(server: Server, content: str, kind: str):
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 400
    error = response.json()["error"]
    assert "JSON" in error["message"]
    assert "application/json" in error["message"]
    assert error["param"] is None


def test_a_prompt_beyond_the_context_length_has_openais_code(server: Server):
    response = server.post("/v1/completions", model="v1", prompt="x" * 5000, max_tokens=1)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", [{"prompt": "a\ud800"}, {"prompt": ["b", "\udc00"]}, {"messages": "a\ud800b"}])
def test_a_lone_surrogate_is_rejected(server: Server, body: dict):
    route = "/v1/completions"
    if "messages" in body:
        route, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": body["messages"]}]}
    content = json.dumps({"model": "v1", **body})
    response = httpx.post(f"{server.url}{route}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert "Unicode" in response.json()["error"]["message"]


def test_fields_that_change_nothing_are_accepted(server: Server):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "echo": False}
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "seed": None}
    neutral |= {"use_beam_search": False, "length_penalty": 1.0, "min_p": 0, "min_tokens": 0, "bad_words": []}
    neutral |= {"repetition_penalty": 1, "stop_token_ids": [], "spaces_between_special_tokens": True, "suffix": ""}
    response = server.post("/v1/completions", model="v1", prompt="hi", max_tokens=2, **harmless, **neutral)
    assert response.status_code == 200, response.text


def test_a_body_that_is_not_json_is_rejected(server: Server):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=b"{no", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_unknown_models_versions_and_paths_are_404(server: Server):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        server.client.completions.create(model="nobody", prompt="x")
    assert server.post("/v1/completions", model="intent@9", prompt="x").json()["error"]["code"] == "model_not_found"
    assert server.post("/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_a_request_that_is_too_long_is_rejected(server: Server):
    with pytest.raises(openai.BadRequestError, match="400"):
        server.client.completions.create(model="v1", prompt="x" * 401, max_tokens=1)
    assert server.num_running() == 0


def test_every_error_type_is_in_the_table():
    from cluster import errors as cluster_errors

    ours = {
        kind
        for module in (cluster_errors, serving_errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, ReloraError)
    }
    assert set(HTTP_ERRORS) == ours
    assert len(ours) > 10
    assert all(400 <= http.status < 600 and http.type and http.code for http in HTTP_ERRORS.values())

    class DerivedError(StorageError):
        """An error that another package derives from one in the table."""

    assert http_error(DerivedError("x")) == HTTP_ERRORS[StorageError]


def test_a_full_queue_is_503_with_retry_after(tmp_path: Path):
    make_checkpoint(tmp_path / "long", max_position_embeddings=20_000)
    config = ServingConfig(memory_bytes=2**25, max_model_tokens=20_000, max_sequences=1, max_queue=2)
    endless = {"model": "long", "prompt": "x", "max_tokens": 19_000, "ignore_eos": True, "n": 2, "stream": True}
    with serve_bases(tmp_path, tmp_path, config, ("long",)) as server, httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{server.url}/v1/completions", json=endless) as stream:
            lines = stream.iter_lines()
            next(lines)
            wait_until(lambda: server.num_running("long") == 2)
            refused = server.post("/v1/completions", model="long", prompt="x", n=2)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            wait_until(lambda: server.num_running("long") == 2)
            assert "error" not in next(line for line in lines if line), "running requests continue"
        wait_until(lambda: server.num_running("long") == 0)
        assert server.post("/v1/completions", model="long", prompt="x").status_code == 200


# Clients that disconnect.


def test_tokens_of_an_interrupted_stream_are_counted(server: Server):
    line = 'relora_tokens_total{base="v1",kind="completion"}'
    before = _value(httpx.get(f"{server.url}/metrics").text, line)
    body = {"model": "v1", "prompt": "x", "max_tokens": 390, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
    wait_until(lambda: _value(httpx.get(f"{server.url}/metrics").text, line) > before, timeout_s=5)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_aborts_the_request(server: Server, stream: bool):
    body = {"model": "intent", "prompt": "x", "max_tokens": 390, "ignore_eos": True, "n": 8, "stream": stream}
    with httpx.Client(timeout=httpx.Timeout(30, read=0.3 if not stream else 30)) as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                lines = response.iter_lines()  # keep it: the response closes when its iterator is collected
                next(lines)
                assert server.num_running() > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/completions", json=body)
    left_at = time.monotonic()
    wait_until(lambda: server.num_running() == 0, timeout_s=2)
    assert time.monotonic() - left_at < 2


async def test_an_error_in_a_stream_is_an_event(server: Server, monkeypatch: pytest.MonkeyPatch):
    async def fail(self, request):
        yield TokenEvent(request.id, tokens=(65,), text="A")
        yield TokenEvent(request.id, finish_reason=FinishReason.ABORT, error=StorageError("the disk is full"))

    monkeypatch.setattr(LocalBackend, "generate", fail)
    response = server.post("/v1/completions", model="v1", prompt="x", stream=True)
    assert response.status_code == 200
    first, error, done = [line.removeprefix("data: ") for line in response.text.strip().split("\n\n")]
    assert json.loads(first)["choices"][0]["text"] == "A"
    assert json.loads(error)["error"]["code"] == "storage_unavailable"
    assert done == "[DONE]"
    with pytest.raises(openai.APIError, match="disk is full"):
        list(server.client.completions.create(model="v1", prompt="x", stream=True))
    assert server.post("/v1/completions", model="v1", prompt="x").status_code == 503


# Adapters, health, metrics.


def test_adapters_are_loaded_and_unloaded_over_http(server: Server, tmp_path: Path):
    asked = {"model": "mine", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    texts = []
    for seed in (3, 4):
        path = make_adapter(tmp_path / str(seed), server.files / "v1", rank=3, seed=seed)
        loaded = server.post("/v1/load_lora_adapter", lora_name="mine", lora_path=str(path), base_model_name="v1")
        assert loaded.json()["model"] == f"mine@{seed - 2}"
        texts.append(server.client.completions.create(**asked).choices[0].text)
    assert texts[0] != texts[1]
    pinned = server.client.completions.create(**{**asked, "model": "mine@1"})
    assert pinned.choices[0].text == texts[0]
    assert server.post("/v1/unload_lora_adapter", lora_name="mine").status_code == 200
    assert server.post("/v1/completions", **asked).status_code == 404
    assert server.post("/v1/unload_lora_adapter", lora_name="mine").status_code == 404


def test_adapters_are_listed_with_their_tiers(server: Server, tmp_path: Path):
    path = make_adapter(tmp_path / "new", server.files / "v1", rank=2, seed=17)
    server.post("/v1/load_lora_adapter", lora_name="listed", lora_path=str(path), base_model_name="v1")
    for _ in range(2):
        server.client.completions.create(model="listed", prompt="x", max_tokens=1)
    listed = httpx.get(f"{server.url}/v1/adapters").json()
    (mine,) = [one for one in listed["data"] if one["id"] == "listed"]
    assert mine.pop("bytes") > 1000
    assert 0 < mine.pop("load_s") < 10
    assert mine == {
        "id": "listed",
        "object": "adapter",
        "version": "listed@1",
        "status": "live",
        "base": "v1",
        "tier": "device",
        "hits": 3,  # the token generated when it was loaded, and two requests
        "running": 0,
    }
    server.post("/v1/unload_lora_adapter", lora_name="listed")


def test_a_salt_separates_caches_and_cache_false_uses_none(server: Server):
    def hits() -> float:
        return server.loops["v1"].stats()["prefix_hit_tokens"]

    body = {"model": "v1", "prompt": "a prompt of more than one page of tokens", "max_tokens": 4, "temperature": 0}
    text = server.post("/v1/completions", **body).json()["choices"][0]["text"]
    before = hits()
    for more in ({"cache_salt": "mine"}, {"cache": False}):
        assert server.post("/v1/completions", **body, **more).json()["choices"][0]["text"] == text
        assert hits() == before
    assert server.post("/v1/completions", **body).json()["choices"][0]["text"] == text
    assert hits() == before + 32


def test_unloading_lets_running_requests_finish(server: Server, tmp_path: Path):
    path = make_adapter(tmp_path / "a", server.files / "v1", rank=2, seed=6)
    server.post("/v1/load_lora_adapter", lora_name="leaving", lora_path=str(path), base_model_name="v1")
    asked = {"model": "leaving", "prompt": "hello", "max_tokens": 100, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    whole = server.client.completions.create(**asked).choices[0].text
    stream = server.client.completions.create(**asked, stream=True)
    text = next(stream).choices[0].text
    assert server.post("/v1/unload_lora_adapter", lora_name="leaving").status_code == 200
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole


@pytest.mark.parametrize(
    ("name", "spoil", "status", "word"),
    [
        ("../up", None, 400, "name"),
        ("v1", None, 409, "base model"),
        ("bad", "rank", 400, "rank"),
        ("bad", "missing", 400, "adapter_model.safetensors"),
        ("bad", "shape", 400, "layers"),
        ("bad", "nowhere", 400, "lora_path"),
        ("bad", TOO_LONG, 400, "lora_path"),
        ("intent", "huge", 400, "logits"),
    ],
)
def test_bad_adapters_are_rejected_with_the_cause(server: Server, tmp_path: Path, name: str, spoil, status, word):
    wide = make_checkpoint(tmp_path / "wide", num_hidden_layers=3) if spoil == "shape" else server.files / "v1"
    path = make_adapter(tmp_path / "adapter", wide, rank=99 if spoil == "rank" else 2)
    if spoil == "missing":
        (path / "adapter_model.safetensors").unlink()
    if spoil == "huge":
        make_adapter(path, wide, scale=1e19)
    lora_path = str(tmp_path / spoil) if spoil in ("nowhere", TOO_LONG) else str(path)
    response = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=lora_path, base_model_name="v1")
    assert response.status_code == status, response.text
    assert word in response.json()["error"]["message"]
    assert server.client.completions.create(model="intent", prompt="x", max_tokens=1).model == "intent@1"


def test_metrics_have_labels_for_base_route_and_status_but_not_adapter(server: Server):
    before = httpx.get(f"{server.url}/metrics").text
    server.client.completions.create(model="intent", prompt="abc", max_tokens=2, extra_body={"ignore_eos": True})
    after = httpx.get(f"{server.url}/metrics").text
    for line, more in (
        ('relora_requests_total{base="v1",route="/v1/completions",status="200"}', 1),
        ('relora_tokens_total{base="v1",kind="prompt"}', 3),
        ('relora_tokens_total{base="v1",kind="completion"}', 2),
        ('relora_request_seconds_count{base="v1",route="/v1/completions"}', 1),
    ):
        assert _value(after, line) - _value(before, line) == more, line
    assert 'relora_engine{base="v2",gauge="' in after
    assert "intent" not in after


def test_an_adapter_that_is_too_large_does_not_replace_the_live_one(files: Path, tmp_path: Path):
    config = replace(CONFIG, host_cache_bytes=40_000, packed_bytes=0)
    with serve_bases(files, tmp_path, config, ("v1",)) as server:
        small = make_adapter(tmp_path / "small", files / "v1", rank=2)
        large = make_adapter(tmp_path / "large", files / "v1", rank=16)
        load = {"lora_name": "mine", "base_model_name": "v1"}
        assert server.post("/v1/load_lora_adapter", **load, lora_path=str(small)).status_code == 200
        refused = server.post("/v1/load_lora_adapter", **load, lora_path=str(large))
        assert refused.status_code == 400
        assert "serving.host_cache_bytes" in refused.json()["error"]["message"]
        assert server.client.completions.create(model="mine", prompt="x", max_tokens=1).model == "mine@1"


def test_an_unexpected_error_counts_as_500(server: Server, monkeypatch: pytest.MonkeyPatch):
    def fail(self):
        raise RuntimeError("unexpected")

    monkeypatch.setattr("serving.gateway.routing.Snapshot.models", fail)
    assert httpx.get(f"{server.url}/v1/models").status_code == 500
    metrics = httpx.get(f"{server.url}/metrics").text
    assert _value(metrics, 'relora_requests_total{base="",route="/v1/models",status="500"}') == 1
    assert 'status="499"' not in "".join(line for line in metrics.splitlines() if 'route="/v1/models"' in line)


def test_health(files: Path, tmp_path: Path):
    with serve_bases(files, tmp_path, CONFIG, ("v1",)) as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        server.loops["v1"].stop()
        sick = httpx.get(f"{server.url}/health")
        assert sick.status_code == 503
        assert sick.json()["error"]["code"] == "engine_unavailable"
        server.loops.clear()


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _value(metrics: str, line: str) -> float:
    found = [entry for entry in metrics.splitlines() if entry.startswith(line)]
    return float(found[0].split()[-1]) if found else 0.0
