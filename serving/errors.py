"""Errors on their way to the client: ONE table from error type to HTTP status and OpenAI error type and code."""

from dataclasses import dataclass
from typing import Any

from cluster.errors import (
    ConfigError,
    ConflictError,
    ContextLengthError,
    InvalidAdapterError,
    InvalidCheckpointError,
    InvalidDataError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReloraError,
    StorageError,
    TenantLimitError,
    TrainingError,
)


class BackendDiedError(ReloraError):
    """The engine went away under a request: its process died, it shut down, or none runs; another may go on with it."""


class BackendFailedError(ReloraError):
    """The engine failed on a request in a way that it should not; the same request might fail anywhere."""


@dataclass(frozen=True)
class HttpError:
    """How an error type looks over HTTP: the status, and `type` and `code` of OpenAI's error object."""

    status: int
    type: str
    code: str


HTTP_ERRORS: dict[type[ReloraError], HttpError] = {
    InvalidRequestError: HttpError(400, "invalid_request_error", "invalid_request"),
    ContextLengthError: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    InvalidAdapterError: HttpError(400, "invalid_request_error", "invalid_adapter"),
    InvalidCheckpointError: HttpError(400, "invalid_request_error", "invalid_checkpoint"),
    InvalidDataError: HttpError(400, "invalid_request_error", "invalid_data"),
    NotFoundError: HttpError(404, "not_found_error", "model_not_found"),
    ConflictError: HttpError(409, "conflict_error", "conflict"),
    OverloadedError: HttpError(503, "overloaded_error", "overloaded"),
    TenantLimitError: HttpError(429, "rate_limit_error", "rate_limit_exceeded"),
    BackendDiedError: HttpError(503, "unavailable_error", "engine_unavailable"),
    BackendFailedError: HttpError(500, "server_error", "engine_failed"),
    StorageError: HttpError(503, "unavailable_error", "storage_unavailable"),
    ConfigError: HttpError(500, "server_error", "bad_config"),
    TrainingError: HttpError(500, "server_error", "training_failed"),
    ReloraError: HttpError(500, "server_error", "error"),
}


def http_error(error: ReloraError) -> HttpError:
    """The table's entry of the error's own type or of its nearest ancestor."""
    return next(HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS)


def error_body(message: str, http: HttpError, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": http.type, "param": param, "code": http.code}}


def error_headers(error: ReloraError, http: HttpError) -> dict[str, str]:
    """`Retry-After` in whole seconds where trying again makes sense."""
    if http.status not in (429, 503):
        return {}
    return {"Retry-After": str(max(1, round(getattr(error, "retry_after_s", 1.0))))}
