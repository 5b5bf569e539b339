"""Tests what a server that is not ours can do wrong: a small HTTP server does it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.config.engines import EngineSpec
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidRequestError, OverloadedError, ReloraError
from cluster.storage.blobs import BlobStore
from serving.engine import request as engine_request
from serving.engine.request import AdapterRef, SamplingParams, Terms
from serving.errors import BackendDiedError, BackendFailedError
from serving.remote.backend import RemoteBackend
from serving.remote.kinds import KINDS
from tests.worlds.servers import serve
from tests.worlds.serving import make_adapter, make_checkpoint

ANSWERS = {
    "busy": (429, {"error": {"message": "too many", "code": 429}}),
    "closing": (503, {"message": "draining"}),
    "bad": (400, {"object": "error", "message": "top_p is odd", "code": 400}),
    "key": (401, {"error": "Unauthorized"}),
    "dead": (500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}}),
    "gone": (404, {"error": {"message": "The model does not exist.", "code": 404}}),
    "html": (400, "<html>no</html>"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"data": [{"id": "m", "parent": None}, {"id": "other", "parent": None}]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        what = request.headers["x-what"]
        if what in ANSWERS:
            status, content = ANSWERS[what]
            return JSONResponse(content, status, headers={"retry-after": "7"})
        return StreamingResponse(stream(what), media_type="text/event-stream")

    @app.post("/load_lora_adapter")
    async def load(request: Request) -> Response:
        return JSONResponse({"success": False, "error_message": "rank 3 is too high"}, 400)

    async def stream(what: str):
        chunk = '{"choices": [{"text": "a", "token_ids": [65], "finish_reason": null}]}'
        if what == "slow":
            await asyncio.sleep(5)
        if what == "no ids":
            chunk = '{"choices": [{"text": "a", "finish_reason": null}]}'
        if what == "aborted":
            chunk = '{"choices": [{"text": "", "token_ids": [], "finish_reason": "abort"}]}'
        yield f"data: {chunk}\n\n"
        if what == "stalled":
            await asyncio.sleep(5)
        if what == "breaks":
            yield 'data: {"error": {"message": "EngineCore encountered an issue.", "code": 500}}\n\n'
        if what == "garbage":
            yield "data: {\n\n"
        if what != "cut":
            yield "data: [DONE]\n\n"

    with serve(app) as address:
        yield address


async def ask(base: Path, url: str, what: str, tmp_path: Path, adapter: AdapterRef | None = None, **more) -> str:
    spec = EngineSpec(base="v1", url=url, adapters=str(tmp_path / "shared"), **{"timeout_s": 1.0, **more})
    blobs = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    backend = RemoteBackend(spec, base, blobs, ServingConfig())
    await backend._opened()
    backend._server._opened().headers["x-what"] = what
    request = engine_request.Request("r", (1, 2), SamplingParams(temperature=0.0), adapter, terms=Terms())
    try:
        return "".join([event.text async for event in backend.generate(request)])
    finally:
        await backend.aclose()


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("busy", OverloadedError, "too many"),
        ("closing", OverloadedError, "draining"),
        ("bad", InvalidRequestError, "top_p is odd"),
        ("html", InvalidRequestError, "no"),
        ("key", BackendFailedError, "api_key_env"),
        ("dead", BackendDiedError, "EngineCore"),
        ("gone", BackendFailedError, "does not exist"),
        ("slow", BackendFailedError, "sent nothing for 1 s"),
        ("stalled", BackendFailedError, "sent nothing for 1 s"),
        ("no ids", BackendFailedError, "return_token_ids"),
        ("aborted", BackendDiedError, "early: abort"),
        ("breaks", BackendDiedError, "EngineCore"),
        ("garbage", BackendFailedError, "not JSON"),
        ("cut", BackendDiedError, "without a finish reason"),
        ("unfinished", BackendDiedError, "without a finish reason"),
    ],
)
async def test_each_failure_has_its_type_and_its_cause(
    base: Path, url: str, tmp_path: Path, what: str, error: type[ReloraError], words: str
):
    with pytest.raises(error, match=words) as raised:
        await ask(base, url, what, tmp_path)
    assert type(raised.value) is error
    if error is OverloadedError:
        assert raised.value.retry_after_s == 7.0


async def test_a_server_that_is_not_there_counts_as_dead(base: Path, tmp_path: Path):
    with pytest.raises(BackendDiedError, match=r"http://127\.0\.0\.1:9 does not answer: ConnectError"):
        await ask(base, "http://127.0.0.1:9", "", tmp_path, connect_retries=0)


async def test_a_model_that_the_server_does_not_list_is_an_error_that_lists_its_models(
    base: Path, url: str, tmp_path: Path
):
    with pytest.raises(BackendFailedError, match=r"no model 'mine'\. It lists: m, other\."):
        await ask(base, url, "", tmp_path, model="mine")


def stored(base: Path, tmp_path: Path) -> AdapterRef:
    key = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache").put_folder(make_adapter(tmp_path / "a", base, rank=3))
    return AdapterRef(key, "org/intent", 1, key)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("vllm", "cannot load adapter org.intent.* no such route.* VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ("sglang", "cannot load adapter org.intent.* rank 3 is too high"),
        ("openai", "has to find adapters by itself: in .*shared"),
    ],
)
async def test_an_adapter_that_cannot_be_loaded_is_named_with_the_reason(
    base: Path, url: str, tmp_path: Path, kind: str, words: str
):
    with pytest.raises(BackendFailedError, match=words):
        await ask(base, url, "gone", tmp_path, stored(base, tmp_path), kind=kind)
    assert [path.suffix for path in (tmp_path / "shared").iterdir()] == [f".{stored(base, tmp_path).key[:16]}"]


def test_each_kind_of_server_refuses_by_name_what_its_routes_lack():
    def asked(**sampling) -> engine_request.Request:
        return engine_request.Request("r", (1,), SamplingParams(**sampling))

    for name, sampling in (
        ("vllm", {"bad_words": ((1, 2),)}),
        ("sglang", {"num_logprobs": 1}),
        ("openai", {"repetition_penalty": 1.2}),
        ("openai", {"min_tokens": 3}),
    ):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(sampling))}: this model runs on a {name} server"):
            KINDS[name].check(asked(**sampling), ServingConfig())
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        KINDS["openai"].check(asked(), ServingConfig(prefix_cache="off"))
    for kind in KINDS.values():
        kind.check(asked(stop=("x",), stop_token_ids=(3,), seed=1, frequency_penalty=0.5), ServingConfig())


def test_sglang_names_an_adapter_after_its_base_and_has_its_own_word_for_no_limit():
    kind = KINDS["sglang"]
    assert kind.adapter_model("base", "intent.1.ab") == "base:intent.1.ab"
    body = kind.body(engine_request.Request("r", (1,), SamplingParams()), ServingConfig(), "base", [1])
    assert body["top_k"] == -1
    assert body["return_token_ids"] is True
    assert kind.is_lost_adapter(400, "The following requested LoRA adapters are not loaded: x")
    assert not kind.is_lost_adapter(400, "top_p must be in (0, 1]")
