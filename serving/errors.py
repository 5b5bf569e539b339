"""Maps errors to HTTP: one table from error type to HTTP status and OpenAI's error type and code."""

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
    MissingPackageError,
    NotFoundError,
    OverloadedError,
    ReloraError,
    StorageError,
    TenantLimitError,
    TrainingError,
)


class BackendDiedError(ReloraError):
    """No engine serves the request: its process died, it shut down, or none runs. Another engine may resume it."""


class BackendFailedError(ReloraError):
    """The server failed, and the client is not to blame: a bug, or files that cannot be used. Retrying may not help."""


@dataclass(frozen=True)
class HttpError:
    """The HTTP status of an error type, and `type` and `code` of OpenAI's error object."""

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
    MissingPackageError: HttpError(500, "server_error", "missing_package"),
    ReloraError: HttpError(500, "server_error", "error"),
}


def http_error(error: ReloraError) -> HttpError:
    """Return the table's entry for the error's type, or for its nearest base class."""
    return next(HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS)


def error_body(message: str, http: HttpError, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": http.type, "param": param, "code": http.code}}


def error_headers(error: ReloraError, http: HttpError) -> dict[str, str]:
    """Return `Retry-After` in whole seconds if the client may try again, else nothing."""
    if http.status not in (429, 503):
        return {}
    return {"Retry-After": str(max(1, round(getattr(error, "retry_after_s", 1.0))))}
