"""A server that speaks vLLM's protocol over one of our engines: `python -m tests.worlds.engine_server FOLDER PORT`.

Its routes, statuses and messages are those of vLLM 0.32 that a gateway meets. The same tests run against vLLM itself
with `--vllm PYTHON`.
"""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from cluster.config.settings import ServingConfig
from cluster.errors import ReloraError
from serving.engine import request as engine_request
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop

MAX_TOKENS = 512
MAX_LOGPROBS = 20
SAMPLING = {field.name for field in fields(engine_request.SamplingParams)}


def create_app(folder: Path) -> FastAPI:
    """Return the application over an engine of the checkpoint in `folder`, which is also the model's name."""
    base = str(folder)
    loop = EngineLoop(Engine.open(folder, ServingConfig(memory_bytes=2**24, max_model_tokens=MAX_TOKENS, max_rank=16)))
    loaded: dict[str, engine_request.AdapterRef] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        loop.stop()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if loop.is_healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        stats = loop.stats()
        lines = [f'vllm:num_requests_{name}{{engine="0"}} {stats[name]}' for name in ("running", "waiting")]
        total = "vllm:generation_tokens_total"
        lines += [f"# TYPE {total} counter", f"{total} {stats['tokens_generated']}", ""]
        return PlainTextResponse("\n".join(lines))

    @app.get("/v1/models")
    async def models() -> Response:
        cards: list[dict[str, Any]] = [{"id": base, "root": base, "parent": None, "max_model_len": MAX_TOKENS}]
        cards += [{"id": name, "root": ref.blob_key, "parent": base} for name, ref in loaded.items()]
        return JSONResponse({"object": "list", "data": cards})

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in loaded:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not path.is_dir():
            return refusal(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        ref = engine_request.AdapterRef(f"{name}-{uuid4().hex}", name, 1, str(path))
        try:
            await loop.ensure_adapter(ref, path)
        except ReloraError as error:
            return refusal(500, str(error), "InternalServerError")
        loaded[name] = ref
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in loaded:
            return refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        await loop.remove_adapter(loaded.pop(name).key)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        if body["model"] not in (base, *loaded):
            return refusal(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if (body.get("logprobs") or 0) > MAX_LOGPROBS:
            return refusal(400, "Requested sample logprobs, which is greater than max allowed.", "BadRequestError")
        if len(body["prompt"]) + body["max_tokens"] > MAX_TOKENS:
            return refusal(400, f"This model's maximum context length is {MAX_TOKENS} tokens.", "BadRequestError")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
        given["logit_bias"] = tuple((int(token), bias) for token, bias in body.get("logit_bias", {}).items())
        sampling = engine_request.SamplingParams(
            **{key: value for key, value in given.items() if key in SAMPLING}, num_logprobs=body.get("logprobs")
        )
        asked = engine_request.Request(uuid4().hex, given["prompt"], sampling, loaded.get(body["model"]))
        return StreamingResponse(events(asked), media_type="text/event-stream")

    async def events(asked: engine_request.Request) -> AsyncIterator[str]:
        async with aclosing(loop.generate(asked, 0.0)) as stream:
            async for event in stream:
                if event.error is not None:
                    yield sse({"error": {"message": str(event.error), "type": "InternalServerError", "code": 500}})
                    break
                choice = {"index": 0, "text": event.text, "token_ids": event.tokens, "logprobs": logprobs(event)}
                yield sse({"choices": [{**choice, "finish_reason": event.finish_reason}]})
        yield "data: [DONE]\n\n"

    return app


def logprobs(event: engine_request.TokenEvent) -> dict[str, Any] | None:
    if not event.logprobs:
        return None
    return {
        "tokens": [f"token_id:{one.token}" for one in event.logprobs],
        "token_logprobs": [one.logprob for one in event.logprobs],
        "top_logprobs": [{f"token_id:{token}": value for token, value in one.top} for one in event.logprobs],
    }


def refusal(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


if __name__ == "__main__":
    uvicorn.run(create_app(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
