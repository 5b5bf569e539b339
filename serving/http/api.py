"""The HTTP application over a gateway: the routes of this folder, and how errors become answers.

Handlers only translate.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from cluster.errors import InvalidRequestError, ReloraError
from serving.errors import HTTP_ERRORS, HttpError, error_body, error_headers, http_error
from serving.gateway.gateway import Gateway
from serving.http import generation, models, operations, pages, responses, tokenization
from serving.http.metrics import Metrics, MetricsMiddleware


def create_app(gateway: Gateway, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return the application over a gateway. It starts and stops the gateway with itself.

    Browsers let pages of `cors_origins` call it; "*" stands for all origins.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        yield
        await gateway.stop()

    app = FastAPI(title="ReLoRA", lifespan=lifespan, docs_url=None, redoc_url=None)  # these load scripts from a CDN
    app.state.gateway = gateway
    app.state.metrics = Metrics()
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "x-relora-version", "x-relora-base"],
        )
    app.add_exception_handler(ReloraError, _on_relora_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    for module in (generation, responses, models, tokenization, operations, pages):
        app.include_router(module.router)
    return app


async def _on_relora_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ReloraError)
    http = http_error(error)
    return JSONResponse(error_body(str(error), http), http.status, headers=error_headers(error, http))


async def _on_invalid_body(request: HttpRequest, error: Exception) -> Response:
    """Name the first invalid field, as OpenAI does. A field that this server does not support is invalid."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] in ("json_invalid", "model_attributes_type"):  # there is no field to name
        message = "The body must be a JSON object, sent with content-type: application/json."
        return JSONResponse(error_body(message, HTTP_ERRORS[InvalidRequestError]), 400)
    param = ".".join(str(step) for step in first["loc"] if step != "body")
    reason = "this server does not support it" if first["type"] == "extra_forbidden" else first["msg"]
    reason = reason.removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else reason
    return JSONResponse(error_body(message, HTTP_ERRORS[InvalidRequestError], param or None), 400)


async def _on_http_exception(request: HttpRequest, error: Exception) -> Response:
    """Handle Starlette's own errors, such as an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    http = HttpError(error.status_code, "invalid_request_error", "not_found" if error.status_code == 404 else "http")
    return JSONResponse(error_body(str(error.detail), http), http.status, headers=error.headers)


async def _on_bug(request: HttpRequest, error: Exception) -> Response:
    """Handle an untyped error, which is our bug. Its text stays in the server's log."""
    return JSONResponse(error_body("Internal server error.", HTTP_ERRORS[ReloraError]), 500)
