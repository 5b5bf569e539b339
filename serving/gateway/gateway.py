"""Answers calls: finds the version that a model name means and streams tokens from an engine of the version's base.

This module knows neither Ray nor HTTP. A background task refreshes a snapshot of the registry's routes, so most
requests never wait for the database. There are two exceptions: a name that the snapshot lacks causes a refresh, and a
pinned version (`name@version`) is looked up for each request.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from cluster.config.settings import RolloutConfig, ServingConfig
from cluster.errors import (
    InvalidAdapterError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReloraError,
    StorageError,
)
from cluster.names import parse_model
from cluster.registry.registry import Registry, Version
from cluster.registry.rollout import CANARY_FAILURE
from cluster.storage.blobs import BlobStore
from serving.chat.settings import ChatSettings, FleetChatSettings, ParserSpec
from serving.engine.request import AdapterRef, Request, SamplingParams
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.backend import Backend, raise_error_of
from serving.gateway.calls import Answer, Call, Part, cut_prompt, keep_best, requests_of
from serving.gateway.merge import merge
from serving.gateway.prompters import Prompters
from serving.gateway.prompts import Prompter
from serving.gateway.publish import publish, store, withdraw
from serving.gateway.routing import HEALTH_TIMEOUT_S, Snapshot, Target, max_position, release, release_gone

log = logging.getLogger(__name__)

MAX_RESUBMISSIONS = 3
BACKOFF_S = 0.2
NO_ENGINE = "No engine is running yet."


class Gateway:
    """Takes every request of a process. Owns the snapshot and the task that refreshes it.

    `backends` returns the running engines by base name; it may block. `chats` says how answers are read, by model name.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        backends: Callable[[], Mapping[str, Backend]],
        serving: ServingConfig,
        rollout: RolloutConfig,
        chats: Mapping[str, ParserSpec] | None = None,
    ):
        self._registry = registry
        self._blobs = blobs
        self._list_backends = backends
        self._serving = serving
        self._rollout = rollout
        self._chats = FleetChatSettings(chats or {}, serving.trust_request_chat_template)
        self._refreshing = asyncio.Lock()
        self._prompters = Prompters(blobs)
        self._poller: asyncio.Task[None] | None = None
        self._poll_error: ReloraError | None = None
        self._num_resubmissions: Counter[str] = Counter()
        self.snapshot = Snapshot()

    async def start(self) -> None:
        """Take the first snapshot and start to refresh it. Raises StorageError if the registry cannot be read."""
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop the background task."""
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller

    async def refresh(self) -> None:
        """Make sure that the snapshot is no older than this call. Concurrent calls share one refresh."""
        asked_at = time.monotonic()
        before = None
        async with self._refreshing:
            if self.snapshot.taken_at < asked_at:
                before, self.snapshot = self.snapshot, await asyncio.to_thread(self._take_snapshot)
        if before is not None:
            await release_gone(before, self.snapshot)

    async def answer(self, call: Call, *, whole: bool) -> Answer:
        """Start a call and wait for the first part of its answer, or for all parts if `whole`.

        Nothing has been sent to the client before. So if a canary fails until then, its failure is logged for the
        rollout and the live version answers instead.
        """
        *canaries, last = await self._targets(call.model, call.id)
        for canary in canaries:
            try:
                return await self._begin(call, canary, whole)
            except InvalidRequestError:
                raise
            except ReloraError as error:
                await self._log_canary_failure(canary, error)
        return await self._begin(call, last, whole)

    async def load_adapter(self, name: str, folder: str, base: str | None) -> Version:
        """Make an adapter's files the LIVE version of a name, after an engine has run them once.

        Raises what `store` raises, and InvalidAdapterError if the engine cannot run the adapter. Clients see no change
        then.
        """
        await self.refresh()
        if not self.snapshot.backends:
            raise BackendDiedError(NO_ENGINE)
        served, max_rank = self.snapshot.backends.keys(), self._serving.max_rank
        store_adapter = partial(store, self._registry, self._blobs, served_bases=served, max_rank=max_rank)
        stored = await asyncio.to_thread(store_adapter, name, folder, base)
        try:
            await self._try_out(stored.ref(name), stored.base)
        except ReloraError:
            if (stored.base, stored.key) not in self.snapshot.adapters():
                await release(self.snapshot.backend(stored.base), stored.key)
            raise
        version = await asyncio.to_thread(publish, self._registry, name, stored)
        await self.refresh()
        return version

    async def _try_out(self, adapter: AdapterRef, base: str) -> None:
        """Generate one token. Only an engine can tell that an adapter exceeds its memory or makes logits NaN."""
        request = Request(f"try-{uuid4().hex}", (0,), SamplingParams(temperature=0.0, max_tokens=1), adapter)
        try:
            async for _ in self._generate(0, request, Target(base)):
                pass
        except BackendFailedError as error:
            raise InvalidAdapterError(f"The adapter cannot run on {base}: {error}") from error

    async def unload_adapter(self, name: str) -> Version:
        """Stop serving a name; requests in progress finish. Raises NotFoundError if it has no LIVE version."""
        version = await asyncio.to_thread(withdraw, self._registry, name)
        await self.refresh()
        return version

    async def check_health(self) -> None:
        """Raise an error that names what fails: the refresh, or the engine of a served base or a live adapter."""
        if self._poll_error is not None:
            raise self._poll_error
        if not self.snapshot.backends:
            raise BackendDiedError(NO_ENGINE)
        await asyncio.gather(*map(self.stats, self.snapshot.needed_bases()))

    async def stats(self, base: str) -> dict[str, float]:
        """Return the gauges of a base's engines and the number of resubmissions.

        Raises BackendDiedError if no engine answers within HEALTH_TIMEOUT_S.
        """
        try:
            gauges = await asyncio.wait_for(self.snapshot.backend(base).stats(), HEALTH_TIMEOUT_S)
            return {**gauges, "resubmissions": self._num_resubmissions[base]}
        except TimeoutError as error:
            raise BackendDiedError(f"The engine of {base} did not answer within {HEALTH_TIMEOUT_S:g} s.") from error

    def max_model_tokens(self, base: str) -> int:
        """Return the most tokens that a base's engines take, prompt and output together."""
        return min(self._serving.max_model_tokens, max_position(self.snapshot.bases[base].path))

    # From a name to targets.

    async def prompter(self, model: str) -> tuple[Target, Prompter, ChatSettings]:
        """Return what a model's name means now (of an adapter, the live version), and how its text becomes tokens."""
        target = (await self._targets(model, ""))[-1]
        return target, *await self._open(target)

    async def _targets(self, model: str, call_id: str) -> list[Target]:
        """Return the targets to try, in order. Only the last one's error reaches the client."""
        name, number = parse_model(model)
        version = None if number is None else await asyncio.to_thread(self._registry.find, name, number)
        with suppress(NotFoundError):
            return self._known_targets(call_id, name, version)
        await self.refresh()
        return self._known_targets(call_id, name, version)

    def _known_targets(self, call_id: str, name: str, pinned: Version | None) -> list[Target]:
        if pinned is not None:
            return [self.snapshot.pinned(pinned)]
        return self.snapshot.named(name, call_id, self._rollout.canary_share)

    # From a target to tokens.

    async def _begin(self, call: Call, target: Target, whole: bool) -> Answer:
        prompter, chats = await self._open(target)
        prompts, sampling, format = await asyncio.to_thread(prompter.prepare, call, chats)
        limit = partial(self.max_model_tokens, target.base)
        prompts = [cut_prompt(call, prompt, prompter, limit) for prompt in prompts]
        requests = requests_of(replace(call, sampling=sampling), target, prompts, self._serving)
        streams = [self._generate(index, request, target) for index, request in enumerate(requests)]
        parts = merge(streams) if len(streams) > 1 else streams[0]
        head = [part async for part in parts] if whole else [await anext(parts)]
        if call.best_of is not None:
            head = keep_best(call, head)
        return Answer(target, prompter, format, call, prompts, head, parts)

    async def _generate(self, index: int, request: Request, target: Target) -> AsyncGenerator[Part, None]:
        """Yield the request's events as parts of choice `index`. If a replica dies, another continues its tokens."""
        tokens: list[int] = []
        for attempt in range(MAX_RESUBMISSIONS + 1):
            # The stack closes the stream outside the `try`: an error in closing must not resubmit the request.
            async with AsyncExitStack() as stack:
                try:
                    backend = self.snapshot.backend(target.base)
                    resumed = replace(request, resumed_tokens=tuple(tokens))
                    events = await stack.enter_async_context(aclosing(backend.generate(resumed)))
                    async for event in events:
                        raise_error_of(event)
                        tokens.extend(event.tokens)
                        yield index, event
                        if event.finish_reason is not None:
                            return
                    raise BackendDiedError(f"The engine of {target.base} ended a stream without a finish reason.")
                except BackendDiedError as error:
                    if attempt == MAX_RESUBMISSIONS:
                        raise
                    log.warning("resubmitting request %s after %d tokens: %s", request.id, len(tokens), error)
                    self._num_resubmissions[target.base] += 1
            await asyncio.sleep(BACKOFF_S * 2**attempt)

    async def _open(self, target: Target) -> tuple[Prompter, ChatSettings]:
        prompter = await self._prompters.of(target, Path(self.snapshot.bases[target.base].path))
        return prompter, self._chats.of(target.names)

    async def _log_canary_failure(self, canary: Target, error: ReloraError) -> None:
        """Log a failure for the rollout, unless the canary was only busy, which says nothing about the version."""
        assert canary.version is not None, "a canary is a version"
        log.warning("canary %s failed, so the live version answers: %s", canary.label, error)
        if isinstance(error, OverloadedError):
            return
        version = canary.version
        with suppress(StorageError):
            await asyncio.to_thread(self._registry.log, CANARY_FAILURE, version.id, reason=str(error))

    # The snapshot.

    def _take_snapshot(self) -> Snapshot:
        taken_at = time.monotonic()
        bases = {base.name: base for base in self._registry.bases()}
        return Snapshot(self._registry.routes(), bases, self._list_backends(), taken_at)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._rollout.poll_s)
            try:
                await self.refresh()
                self._poll_error = None
            except ReloraError as error:  # the old snapshot stays in use, and /health reports the error
                self._poll_error = error
                log.warning("could not refresh the routes: %s", error)
            except Exception as error:
                self._poll_error = BackendFailedError(f"The gateway cannot refresh its routes: {error!r}.")
                log.exception("could not refresh the routes")
