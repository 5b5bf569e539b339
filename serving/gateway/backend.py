"""The narrow seam between the gateway and an engine, wherever that runs.

A token passes these asynchronous generators on its way from the engine's thread to the socket:

1. `EngineLoop.generate`: from the engine's thread to asyncio; joins what comes faster than the interval
2. `LocalBackend.generate`: waits for the adapter before
3. `EngineDeployment.generate`: errors become events, so that Ray does not wrap them
4. `HandleBackend.generate`: Ray's errors become ours; closing it cancels the call
5. `Gateway._generate`: resubmits a request whose replica died
6. `merge`: only where an answer has several choices
7. `_events`: to OpenAI's server-sent events

Those of the engine's replica are 1 to 3, those of the gateway the others. In one process 3 and 4 are not there.
"""

from typing import Protocol

from serving.adapters.residency import Residency
from serving.engine.request import Request, TokenStream


class Backend(Protocol):
    """An engine of one base model, here or elsewhere."""

    def generate(self, request: Request) -> TokenStream:
        """The request's events; closing the iterator aborts the request.

        Raises BackendDiedError when the engine is gone: what was yielded so far stays valid. Other errors may be raised
        or come as the `error` of the last event.
        """
        ...

    async def stats(self) -> dict[str, float]:
        """The engine's gauges, summed over its replicas; BackendDiedError if no replica is alive."""
        ...

    async def residencies(self) -> list[Residency]:
        """Where adapters are, from each of its replicas; BackendDiedError if no replica is alive."""
        ...

    async def release(self, adapter_key: str) -> None:
        """Let every replica's memory of an adapter go, once the requests under way with it have ended.

        Whoever asks for the adapter later makes the engine fetch it again. BackendDiedError if no replica is alive.
        """
        ...
