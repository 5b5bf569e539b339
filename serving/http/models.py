"""The routes about models: what is served, and vLLM's two for loading and unloading adapters."""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from serving.adapters.residency import Residency
from serving.gateway.gateway import Gateway
from serving.gateway.routing import Target, residencies
from serving.http.app_state import gateway_of
from serving.http.bodies.adapters import LoadAdapterBody, UnloadAdapterBody

router = APIRouter()


@router.get("/v1/models")
async def models(request: HttpRequest) -> Response:
    """List the served base models, and the adapters with their live versions."""
    gateway = gateway_of(request)
    entries = await asyncio.to_thread(lambda: [_model(gateway, target) for target in gateway.snapshot.models()])
    return JSONResponse({"object": "list", "data": entries})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: HttpRequest) -> Response:
    """Return one entry of the list of models. A name may contain `/`."""
    gateway = gateway_of(request)
    for target in gateway.snapshot.models():
        if name in (_id(target), target.label):
            return JSONResponse(await asyncio.to_thread(_model, gateway, target))
    raise HTTPException(404, f"The model {name!r} does not exist.")


@router.get("/v1/adapters")
async def adapters(request: HttpRequest) -> Response:
    """List live versions and canaries: where their weights are, their size, and how often they are used."""
    known = await residencies(gateway_of(request).snapshot)
    return JSONResponse({"object": "list", "data": [_adapter(target, where) for target, where in known]})


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterBody, request: HttpRequest) -> Response:
    """Make an adapter's files the live version of its name."""
    version = await gateway_of(request).load_adapter(body.lora_name, body.lora_path, body.base_model_name)
    answer = {"status": "loaded", "model": version.label, "base": version.base}
    return JSONResponse({**answer, **({"warnings": list(version.warnings)} if version.warnings else {})})


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterBody, request: HttpRequest) -> Response:
    """Stop serving an adapter; requests in progress finish."""
    version = await gateway_of(request).unload_adapter(body.lora_name)
    return JSONResponse({"status": "unloaded", "model": version.label, "base": version.base})


def _id(target: Target) -> str:
    return target.version.adapter if target.version else target.base


def _model(gateway: Gateway, target: Target) -> dict[str, Any]:
    """Return OpenAI's model object with vLLM's additions: `root` is where the files are, `parent` an adapter's base."""
    base, version = gateway.snapshot.bases[target.base], target.version
    return {
        "id": _id(target),
        "object": "model",
        "created": int(version.created_at if version else base.created_at),
        "owned_by": "relora",
        "root": version.blob_key if version else base.path,
        "parent": base.name if version else None,
        "max_model_len": gateway.max_model_tokens(base.name),
        "version": version.label if version else None,
    }


def _adapter(target: Target, where: Residency) -> dict[str, Any]:
    assert target.version is not None, "only adapters have residencies"
    return {
        "id": target.version.adapter,
        "object": "adapter",
        "version": target.label,
        "status": target.version.status.value,
        "base": target.base,
        "tier": where.tier.value,
        "bytes": where.num_bytes,
        "hits": where.num_hits,
        "running": where.num_running,
        "load_s": round(where.load_s, 6),
    }
