"""From a call to its answer: name -> version (the registry's routes) -> an engine of the version's base -> tokens.

No Ray and no HTTP here. The routes are a snapshot that a background task renews, so that a request never waits for the
database; only a name that the snapshot does not know makes the gateway look again at once, and a pinned version is
looked up when it is asked for.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from cluster.blobs import BlobStore
from cluster.config import RolloutConfig, ServingConfig
from cluster.errors import (
    InvalidAdapterError,
    InvalidCheckpointError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReloraError,
    StorageError,
)
from cluster.names import parse_model
from cluster.registry import Registry, Version
from cluster.rollout import CANARY_FAILURE
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams, Terms, TokenEvent
from serving.errors import BackendDiedError, BackendFailedError
from serving.gateway.backend import Backend
from serving.gateway.merge import merge
from serving.gateway.prompts import Prompt, Prompter
from serving.gateway.publish import publish, store, withdraw
from serving.gateway.routing import HEALTH_TIMEOUT_S, Snapshot, Target, release, release_gone

log = logging.getLogger(__name__)

MAX_RESUBMISSIONS = 3
BACKOFF_S = 0.2

# What the engine may find wrong with files while it generates: a client that only named them is not to blame.
_NOT_THE_CLIENTS = (InvalidAdapterError, InvalidCheckpointError)

Part = tuple[int, TokenEvent]  # the index of a choice, and what is new of it


@dataclass(frozen=True)
class Call:
    """What a client wants: `num_choices` continuations of each prompt by the model of that name.

    Choice c of prompt p has index `p * num_choices + c`. With `is_unlimited` an answer may fill the model's context.
    """

    id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    num_choices: int = 1
    is_unlimited: bool = False
    terms: Terms = field(default_factory=Terms)


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer under way: who gives it, and its parts until every choice has finished.

    `head` is the first part, or all of them in an answer that was asked for whole; closing `rest` aborts the others.
    """

    target: Target
    prompter: Prompter
    num_prompt_tokens: int
    head: list[Part]
    rest: AsyncGenerator[Part, None]


class Gateway:
    """The way in for every request. One per process; owns its snapshot and the task that renews it.

    `backends` tells which engines there are now, by base name; it may block and is called off the event loop.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        backends: Callable[[], Mapping[str, Backend]],
        serving: ServingConfig,
        rollout: RolloutConfig,
    ):
        self._registry = registry
        self._blobs = blobs
        self._list_backends = backends
        self._serving = serving
        self._rollout = rollout
        self._refreshing = asyncio.Lock()
        self._prompters: dict[str, Prompter] = {}
        self._poller: asyncio.Task[None] | None = None
        self._trouble: ReloraError | None = None
        self._num_resubmissions: Counter[str] = Counter()
        self.snapshot = Snapshot()

    async def start(self) -> None:
        """Takes the first snapshot and keeps it fresh; a registry out of reach is a StorageError."""
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stops the background task."""
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller

    async def refresh(self) -> None:
        """Takes a snapshot not older than this call; calls that come together share one."""
        asked_at = time.monotonic()
        before = None
        async with self._refreshing:
            if self.snapshot.taken_at < asked_at:
                before, self.snapshot = self.snapshot, await asyncio.to_thread(self._look)
        if before is not None:
            await release_gone(before, self.snapshot)

    async def answer(self, call: Call, *, whole: bool) -> Answer:
        """Starts a call; returns with its first part there, or with all of them when `whole`.

        Until then nothing has been sent, so a canary that fails is forgiven: the failure is logged for the rollout, and
        the live version answers instead.
        """
        *canaries, last = await self._targets(call)
        for canary in canaries:
            try:
                return await self._begin(call, canary, whole)
            except InvalidRequestError:
                raise
            except ReloraError as error:
                await self._log_canary_failure(canary, error)
        return await self._begin(call, last, whole)

    async def load_adapter(self, name: str, folder: str, base: str | None) -> Version:
        """Makes an adapter's files the LIVE version of that name, once an engine has run them.

        Raises what `store` raises; nothing has changed for clients then.
        """
        await self.refresh()
        found, key = await asyncio.to_thread(
            store,
            *(self._registry, self._blobs, name, folder, base),
            served_bases=self.snapshot.backends.keys(),
            max_rank=self._serving.max_rank,
        )
        try:
            await self._try_out(AdapterRef(key, name, 0, blob_key=key), found)
        except ReloraError:
            if (found, key) not in self.snapshot.adapters():
                await release(self.snapshot.backend(found), key)
            raise
        version = await asyncio.to_thread(publish, self._registry, name, found, key)
        await self.refresh()
        return version

    async def _try_out(self, adapter: AdapterRef, base: str) -> None:
        """One token, so that what only an engine can tell is told in time: too large for its memory, or NaN logits."""
        request = Request(f"try-{uuid4().hex}", (0,), SamplingParams(temperature=0.0, max_tokens=1), adapter)
        try:
            async for _ in self._generate(0, request, Target(base)):
                pass
        except BackendFailedError as error:
            raise InvalidAdapterError(f"The adapter does not run on {base}: {error}") from error

    async def unload_adapter(self, name: str) -> Version:
        """Takes a name out of service; requests under way finish. NotFoundError if it has no LIVE version."""
        version = await asyncio.to_thread(withdraw, self._registry, name)
        await self.refresh()
        return version

    async def check_health(self) -> None:
        """An error that names what is out of order: the registry, or the engine of a base that has live adapters."""
        if self._trouble is not None:
            raise self._trouble
        await asyncio.gather(*map(self.stats, self.snapshot.needed_bases()))

    async def stats(self, base: str) -> dict[str, float]:
        """The gauges of a base's engines and of the way to them; BackendDiedError if none answers in time."""
        try:
            gauges = await asyncio.wait_for(self.snapshot.backend(base).stats(), HEALTH_TIMEOUT_S)
            return {**gauges, "resubmissions": self._num_resubmissions[base]}
        except TimeoutError as error:
            raise BackendDiedError(f"The engine of {base} did not answer in {HEALTH_TIMEOUT_S} s.") from error

    # From the name to a target.

    async def _targets(self, call: Call) -> list[Target]:
        """Whom to try in order: the last one's failure is the client's failure."""
        name, number = parse_model(call.model)
        version = None if number is None else await asyncio.to_thread(self._registry.find, name, number)
        with suppress(NotFoundError):
            return self._known_targets(call, name, version)
        await self.refresh()
        return self._known_targets(call, name, version)

    def _known_targets(self, call: Call, name: str, pinned: Version | None) -> list[Target]:
        if pinned is not None:
            return [self.snapshot.pinned(pinned)]
        return self.snapshot.named(name, call.id, self._rollout.canary_share)

    # From the target to tokens.

    async def _begin(self, call: Call, target: Target, whole: bool) -> Answer:
        prompter = await self._prompter(target.base)
        prompts = await asyncio.to_thread(lambda: [prompter.encode(prompt) for prompt in call.prompts])
        streams = [
            self._generate(index, request, target)
            for index, request in enumerate(self._requests(call, target, prompts))
        ]
        parts = merge(streams) if len(streams) > 1 else streams[0]
        head = [part async for part in parts] if whole else [await anext(parts)]
        return Answer(target, prompter, sum(map(len, prompts)), head, parts)

    def _requests(self, call: Call, target: Target, prompts: list[tuple[int, ...]]) -> list[Request]:
        return [
            Request(
                id=f"{call.id}-{index}-{choice}",
                prompt_tokens=tokens,
                sampling=self._sampling(call, choice, len(tokens)),
                adapter=target.adapter,
                terms=self._terms(call),
            )
            for index, tokens in enumerate(prompts)
            for choice in range(call.num_choices)
        ]

    def _terms(self, call: Call) -> Terms:
        deadline_s = call.terms.first_token_deadline_s or self._serving.first_token_deadline_s or None
        return replace(call.terms, first_token_deadline_s=deadline_s)

    def _sampling(self, call: Call, choice: int, num_prompt_tokens: int) -> SamplingParams:
        sampling = call.sampling
        if call.is_unlimited:
            sampling = replace(sampling, max_tokens=max(1, self._serving.max_model_tokens - num_prompt_tokens))
        if sampling.seed is not None and choice:
            sampling = replace(sampling, seed=sampling.seed + choice)
        return sampling

    async def _generate(self, index: int, request: Request, target: Target) -> AsyncGenerator[Part, None]:
        """The request's events as parts of choice `index`. If a replica dies, another one continues from its tokens."""
        tokens: list[int] = []
        for attempt in range(MAX_RESUBMISSIONS + 1):
            try:
                backend = self.snapshot.backend(target.base)
                async with aclosing(backend.generate(replace(request, resumed_tokens=tuple(tokens)))) as events:
                    async for event in events:
                        raise_error_of(event)
                        tokens.extend(event.tokens)
                        yield index, event
                        if event.finish_reason is not None:
                            return
                raise BackendDiedError(f"The engine of {target.base} ended a stream without a reason.")
            except BackendDiedError as error:
                if attempt == MAX_RESUBMISSIONS:
                    raise
                log.warning("request %s is resubmitted after %d tokens: %s", request.id, len(tokens), error)
                self._num_resubmissions[target.base] += 1
            await asyncio.sleep(BACKOFF_S * 2**attempt)

    async def _prompter(self, base: str) -> Prompter:
        if base not in self._prompters:
            self._prompters[base] = await asyncio.to_thread(Prompter, Path(self.snapshot.bases[base].path))
        return self._prompters[base]

    async def _log_canary_failure(self, canary: Target, error: ReloraError) -> None:
        """Tells the rollout, unless the canary was merely busy: that says nothing about the version."""
        assert canary.version is not None, "a base has no canary"
        log.warning("canary %s failed, the live version answers: %s", canary.label, error)
        if isinstance(error, OverloadedError):
            return
        version = canary.version
        with suppress(StorageError):
            await asyncio.to_thread(self._registry.log, CANARY_FAILURE, version.id, reason=str(error))

    # The snapshot.

    def _look(self) -> Snapshot:
        taken_at = time.monotonic()
        bases = {base.name: base for base in self._registry.bases()}
        return Snapshot(self._registry.routes(), bases, self._list_backends(), taken_at)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._rollout.poll_s)
            try:
                await self.refresh()
                self._trouble = None
            except ReloraError as error:  # the old snapshot serves on; /health tells
                self._trouble = error
                log.warning("routes not refreshed: %s", error)
            except Exception as error:
                self._trouble = BackendFailedError(f"The gateway cannot refresh its routes: {error!r}.")
                log.exception("routes not refreshed")


def raise_error_of(event: TokenEvent) -> None:
    """Raises the error that an event carries, if any, as one that says whose fault it is."""
    if event.error is not None:
        if isinstance(event.error, ReloraError) and not isinstance(event.error, _NOT_THE_CLIENTS):
            raise event.error
        raise BackendFailedError(f"The engine failed: {event.error}") from event.error
    if event.finish_reason is FinishReason.ABORT:
        raise BackendDiedError("The engine stopped before the answer was complete.")
