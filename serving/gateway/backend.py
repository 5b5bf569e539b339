"""The protocol between the gateway and an engine, which may run in this process or in another.

A token passes these async generators on its way from the engine's thread to the socket:

1. `EngineLoop.generate` takes events from the engine's thread and joins those that come too fast.
2. `LocalBackend.generate` loads the request's adapter before the first event.
3. `EngineDeployment.generate` turns errors into events, so that Ray does not wrap them.
4. `HandleBackend.generate` turns Ray's errors into ours, and cancels the call when it is closed.
5. `Gateway._generate` resubmits a request whose replica died.
6. `merge` is used only if an answer has several choices.
7. `_events` writes OpenAI's server-sent events.

The first three run in the engine's replica and the others in the gateway. Without Ray, 3 and 4 do not exist. Keep the
list short: each generator costs CPU for every event. For one choice, 5 and 7 take 15 us per event, of which JSON
takes 8. They took 36 us with four more generators and a task per event (2 shared cores, 2026-11-30).
"""

from typing import Protocol

from cluster.errors import InvalidAdapterError, InvalidCheckpointError, ReloraError
from serving.adapters.residency import Residency
from serving.engine.request import FinishReason, Request, TokenEvent, TokenStream
from serving.errors import BackendDiedError, BackendFailedError

# Errors about files. While an engine generates they are the server's fault: the client only named the model.
_FILE_ERRORS = (InvalidAdapterError, InvalidCheckpointError)


class Backend(Protocol):
    """The engines of one base model."""

    def generate(self, request: Request) -> TokenStream:
        """Yield the request's events. Closing the stream aborts the request.

        Raises BackendDiedError if the engine is gone; events yielded before stay valid. Other errors are raised, or
        come as the `error` of the last event.
        """
        ...

    async def stats(self) -> dict[str, float]:
        """Return the engine's gauges, summed over its replicas. Raises BackendDiedError if no replica is alive."""
        ...

    async def residencies(self) -> list[Residency]:
        """Return where adapters are, replica by replica. Raises BackendDiedError if no replica is alive."""
        ...

    async def release(self, adapter_key: str) -> None:
        """Free an adapter's memory on every replica, once its requests in progress have ended.

        A later request for the adapter loads it again. Raises BackendDiedError if no replica is alive.
        """
        ...


def raise_error_of(event: TokenEvent) -> None:
    """Raise the error that an event carries. Errors that are the server's fault become BackendFailedError."""
    if event.error is not None:
        if isinstance(event.error, ReloraError) and not isinstance(event.error, _FILE_ERRORS):
            raise event.error
        raise BackendFailedError(f"The engine failed: {event.error}") from event.error
    if event.finish_reason is FinishReason.ABORT:
        raise BackendDiedError("The engine stopped before it finished the answer.")
