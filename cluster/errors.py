"""All errors that ReLoRA raises on purpose: for bad input and for failures of the environment.

    ReloraError
    ├── ConfigError              fleet.toml: unknown key, bad value, missing file
    ├── InvalidRequestError      a request that can never be served: malformed, bad name
    │   └── ContextLengthError   a prompt longer than the model's context
    ├── NotFoundError            no such base model, adapter or version
    ├── ConflictError            the name is taken, or another process changed the status first
    ├── OverloadedError          a queue is full; try again after `retry_after_s`
    │   └── TenantLimitError     one tenant's share of a queue is full
    ├── InvalidAdapterError      adapter files that cannot be used: shape, NaN, rank, missing file, pickle
    ├── InvalidCheckpointError   base-model files that cannot be used: missing shard, wrong shape or architecture
    ├── InvalidDataError         task rows that cannot be used; names the file and the line
    ├── StorageError             blob store or registry unreachable, or the disk is full
    ├── TrainingError            a training run that cannot continue (NaN loss)
    └── MissingPackageError      an optional package that is not installed

A typed error reports the user's input or environment; an `assert` reports our bug. Errors can be pickled, because Ray
sends them between processes.
"""


class ReloraError(Exception):
    """The base class of these errors; `str(error)` is a full sentence for the user."""


class ConfigError(ReloraError):
    """The fleet file has an unknown key or a bad value."""


class InvalidRequestError(ReloraError):
    """The request can never be served in this form."""


class ContextLengthError(InvalidRequestError):
    """The prompt is longer than the model's context."""


class NotFoundError(ReloraError):
    """No base model, adapter or version of that name exists."""


class ConflictError(ReloraError):
    """The name is taken, or another process changed the status first."""


class OverloadedError(ReloraError):
    """A queue is full; the caller may try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class TenantLimitError(OverloadedError):
    """One tenant has reached its limit of waiting requests; other tenants are served."""


class InvalidAdapterError(ReloraError):
    """The adapter's files cannot be used."""


class InvalidCheckpointError(ReloraError):
    """The base model's files cannot be used."""


class InvalidDataError(ReloraError):
    """A task's rows cannot be used."""


class StorageError(ReloraError):
    """The blob store or the registry failed, or the disk is full."""


class TrainingError(ReloraError):
    """A training run cannot continue."""


class MissingPackageError(ReloraError):
    """An optional package is not installed; the message names the extra that installs it."""
