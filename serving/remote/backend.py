"""Somebody else's server as a backend of the gateway: it chooses the tokens, and we turn them into the answer.

See `serving.gateway.backend.Backend` for what the methods promise.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from cluster.adapters.dialect import base_dialect
from cluster.config.engines import EngineSpec
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidAdapterError, NotFoundError, OverloadedError, ReloraError, StorageError
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint
from serving.adapters.residency import Residency
from serving.engine.check import check_request
from serving.engine.dialects import Dialects
from serving.engine.request import AdapterRef, FinishReason, Request, TokenEvent, TokenLogprob, TokenStream
from serving.engine.sequence import SequenceState, new_sequence
from serving.errors import BackendDiedError, BackendFailedError
from serving.remote.adapters import RemoteAdapters
from serving.remote.kinds import can_continue
from serving.remote.server import LostAdapterError, RemoteServer

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}

Chunk = Mapping[str, Any]  # of a streamed completion
Chunks = AsyncGenerator[dict[str, Any], None]


@dataclass(frozen=True)
class _Base:
    """What the answers need to know about the base: its tokenizer and end tokens, and its limits."""

    dialects: Dialects
    vocab_size: int
    model: str  # what the server calls it
    max_tokens: int  # of prompt and output together


class RemoteBackend:
    """One server. `folder` is our copy of the base's checkpoint, of which only tokenizer and configuration are read."""

    def __init__(self, spec: EngineSpec, folder: Path, blobs: BlobStore, serving: ServingConfig):
        self.url = spec.url
        self._spec = spec
        self._folder = folder
        self._blobs = blobs
        self._serving = serving
        self._server = RemoteServer(spec)
        self._adapters = RemoteAdapters(self._server, blobs, serving.adapter_load_timeout_s)
        self._base: _Base | None = None
        self._opening = asyncio.Lock()

    async def aclose(self) -> None:
        """Close the connections to the server, once the unloads under way are done."""
        await self._adapters.aclose()
        await self._server.aclose()

    async def generate(self, request: Request) -> TokenStream:
        """See `Backend.generate`. Raises InvalidRequestError that names a field which the server cannot do."""
        self._server.kind.check(request, self._serving)
        base = await self._opened()
        check_request(request, base.vocab_size, base.max_tokens)
        sequence = await self._sequence(request, base)
        reason = FinishReason.LENGTH if request.sampling.max_tokens == 0 else sequence.replay()
        if reason is not None:
            yield TokenEvent(request.id, finish_reason=reason)
            return
        answer = _Answer(sequence, self.url)
        first, rest = await self._begin(request, base, answer)
        chunk: Chunk | None = first
        async with aclosing(rest):
            with self._adapters.running(request.adapter):
                while chunk is not None:
                    for event in answer.events(chunk):
                        yield event
                    if answer.is_over:
                        return
                    chunk = await anext(rest, None)
        raise BackendDiedError(f"The server at {self.url} ended a stream without a finish reason.")

    async def stats(self) -> dict[str, float]:
        """See `Backend.stats`."""
        return await self._server.stats()

    async def residencies(self) -> list[Residency]:
        """See `Backend.residencies`."""
        return self._adapters.residencies()

    async def release(self, adapter_key: str) -> None:
        """See `Backend.release`. Returns at once."""
        self._adapters.release(adapter_key)

    async def _opened(self) -> _Base:
        """Read the tokenizer, and ask the server for its name of the base and its longest context, once."""
        async with self._opening:
            if self._base is None:
                listed = await self._server.models()
                self._base = await asyncio.to_thread(self._read_base, listed)
        return self._base

    def _read_base(self, listed: list[dict[str, Any]]) -> _Base:
        own = [model for model in listed if not model.get("parent")]
        named = [model for model in own if self._spec.model in ("", model.get("id"))]
        if not named:
            names = ", ".join(str(model.get("id")) for model in own) or "none"
            raise BackendFailedError(f"The server at {self.url} has no model {self._spec.model!r}. It lists: {names}.")
        limit = self._serving.max_model_tokens
        return _Base(
            dialects=Dialects(base_dialect(self._folder)),
            vocab_size=int(open_checkpoint(self._folder).config["vocab_size"]),
            model=str(named[0]["id"]),
            max_tokens=min(limit, named[0].get("max_model_len") or limit),
        )

    async def _sequence(self, request: Request, base: _Base) -> SequenceState:
        """Return the state of the answer. An adapter with its own text files is read as they say."""
        adapter = request.adapter
        if adapter is not None and not base.dialects.has(adapter.dialect):
            await self._load_dialect(adapter, base)
        reading = base.dialects.of(adapter)
        return new_sequence(request, reading.vocabulary, reading.end_ids, base.max_tokens, self._serving)

    async def _load_dialect(self, adapter: AdapterRef, base: _Base) -> None:
        fetch = partial(self._blobs.fetch_folder, adapter.dialect)
        try:
            await asyncio.to_thread(base.dialects.load, adapter.dialect, fetch)
        except InvalidAdapterError as error:  # not the client's fault
            raise BackendFailedError(f"Adapter {adapter.label} cannot be used: {error}") from error
        except NotFoundError as error:
            raise StorageError(f"The text files of adapter {adapter.label} are missing: {error}") from error

    async def _begin(self, request: Request, base: _Base, answer: "_Answer") -> tuple[Chunk, Chunks]:
        """Load the adapter, send the request and wait for the first chunk, all within the first token's deadline."""
        deadline_s = None if request.resumed_tokens else request.terms.first_token_deadline_s
        name = ""
        try:
            async with asyncio.timeout(deadline_s):
                name = await self._adapters.ensure(request.adapter) if request.adapter else ""
                chunks = self._server.complete(self._body(request, base, answer, name))
                return await anext(chunks), chunks
        except TimeoutError as error:
            raise OverloadedError("The first token would miss the request's deadline.") from error
        except StopAsyncIteration as error:
            raise BackendDiedError(f"The server at {self.url} ended a stream without a token.") from error
        except LostAdapterError as error:
            raise self._lost(name, error) from error

    def _body(self, request: Request, base: _Base, answer: "_Answer", name: str) -> dict[str, Any]:
        """Return the body of the request. It ends at our end tokens, whichever the server would take by itself."""
        kind = self._server.kind
        prompt = [*request.prompt_tokens, *(request.resumed_tokens if can_continue(request.sampling) else ())]
        model = kind.adapter_model(base.model, name) if name else base.model
        return kind.body(request, self._serving, model, prompt) | {
            "max_tokens": answer.sequence.limit_tokens - len(prompt),
            "stop": list(request.sampling.stop),
            "stop_token_ids": sorted(answer.sequence.end_ids),
            "ignore_eos": True,
        }

    def _lost(self, name: str, error: LostAdapterError) -> ReloraError:
        """Return the error to raise if the server does not know a model: the next attempt may load it again."""
        if not name:
            self._base = None  # it may have another name since the server restarted
            return BackendFailedError(str(error))
        self._adapters.forget(name)
        if self._server.kind.load_route is not None:
            return error
        return BackendFailedError(
            f"{error} A server of kind {self._spec.kind!r} has to find adapters by itself: in {self._spec.adapters}."
        )


class _Answer:
    """Reads the chunks of one answer: their tokens become text, log-probabilities and the finish reason.

    If the server computes an interrupted answer again from its prompt, the tokens that the client has are skipped.
    """

    def __init__(self, sequence: SequenceState, url: str):
        request = sequence.request
        self.sequence = sequence
        self.is_over = False
        self._url = url
        self._expected = [] if can_continue(request.sampling) else list(reversed(request.resumed_tokens))

    def events(self, chunk: Chunk) -> Iterator[TokenEvent]:
        """Yield the events of a chunk, one per token, up to the last of the answer."""
        for choice in chunk.get("choices", ()):
            yield from self._events(choice)

    def _events(self, choice: Mapping[str, Any]) -> Iterator[TokenEvent]:
        tokens, logprobs = self._new_tokens(choice), self._logprobs(choice)
        for token, logprob in zip(tokens, logprobs[len(logprobs) - len(tokens) :] or repeat(None), strict=False):
            self.sequence.tokens.append(token)
            event = self.sequence.event(token, (logprob,) if logprob else ())
            self.is_over = event.finish_reason is not None
            yield event
            if self.is_over:
                return
        if choice.get("finish_reason"):  # the server has a limit of its own
            self.is_over = True
            text, reason = self.sequence.text.finish(), self._reason(choice["finish_reason"])
            yield TokenEvent(self.sequence.id, text=text, finish_reason=reason)

    def _new_tokens(self, choice: Mapping[str, Any]) -> list[int]:
        tokens = choice.get("token_ids")
        if tokens is None:
            raise BackendFailedError(
                f"The server at {self._url} does not return token ids (`return_token_ids`), which stop strings and "
                "resuming need. vLLM has them since 0.10.2."
            )
        for index, token in enumerate(tokens):
            if not self._expected:
                return list(tokens[index:])
            if token != self._expected.pop():
                raise BackendFailedError(
                    f"The server at {self._url} restarted, and computed another answer than before it did: with "
                    "penalties or a seed an answer can only be resumed if it is the same again."
                )
        return []

    def _reason(self, reason: str) -> FinishReason:
        if reason not in _REASONS:
            raise BackendDiedError(f"The server at {self._url} ended the answer early: {reason}.")
        return _REASONS[reason]

    def _logprobs(self, choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
        found, num_top = choice.get("logprobs"), self.sequence.request.sampling.num_logprobs
        if not found or num_top is None:
            return ()
        return tuple(
            _logprob(_token(token), logprob, top or {}, num_top)
            for token, logprob, top in zip(
                found["tokens"], found["token_logprobs"], found["top_logprobs"] or repeat({}), strict=False
            )
        )


def _logprob(token: int, logprob: float, top: Mapping[str, float], num_top: int) -> TokenLogprob:
    """Return a token's log-probability. A rank below the alternatives is not known: it is the next one."""
    pairs = sorted(((_token(name), value) for name, value in top.items()), key=lambda pair: -pair[1])[:num_top]
    rank = next((place for place, pair in enumerate(pairs, start=1) if pair[0] == token), len(pairs) + 1)
    return TokenLogprob(token, logprob, tuple(pairs), rank)


def _token(written: str) -> int:
    """Return the id of a token that vLLM wrote as "token_id:123"."""
    return int(written.removeprefix("token_id:"))
