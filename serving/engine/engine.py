"""The engine: one base model, its adapters and its memory. Requests go in, tokens come out, one `step` at a time."""

import logging
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Self

import torch

from cluster.adapters.dialect import Dialect, base_dialect
from cluster.adapters.files import Adapter, check_base_copies, check_fits
from cluster.config.settings import ServingConfig
from cluster.errors import (
    ConfigError,
    InvalidAdapterError,
    InvalidRequestError,
    OverloadedError,
)
from serving.adapters.cache import AdapterCache
from serving.adapters.disk_tier import packing_id
from serving.adapters.packing import PackedAdapter, dora_factors, pack_adapter
from serving.adapters.residency import Residency
from serving.engine.batch_builder import BatchBuilder
from serving.engine.check import check_request, no_token_error
from serving.engine.dialects import Dialects
from serving.engine.masks import MaskBuilder
from serving.engine.matcher import Matcher
from serving.engine.request import AdapterRef, FinishReason, Request, TokenEvent
from serving.engine.running import SchedulerOutput
from serving.engine.sampler import Samples, sample
from serving.engine.scheduler import Scheduler
from serving.engine.score import score_prompts
from serving.engine.sequence import SequenceState, adjust_rows, end_ids_of, new_sequence
from serving.memory.arena import new_arena
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator
from serving.memory.prefixes import PrefixCache
from serving.memory.swap import SwapSpace
from serving.model.batch import Batch
from serving.model.llama import CausalLM
from serving.model.weights import load_model

log = logging.getLogger(__name__)

_STEP_WEIGHT = 0.1  # of the last step in the moving average of step times


class Engine:
    """Serves one base, from one thread at a time unless a method says otherwise.

    `dialect` is the base's. `dialects` has those of the adapters too; a request may name only a loaded one.
    """

    def __init__(
        self,
        model: CausalLM,
        dialect: Dialect,
        config: ServingConfig,
    ):
        self.config = config
        self._model = model
        self.dialects = Dialects(dialect)
        self._masks = MaskBuilder(model.ops, model.vocab_size, config.threads)
        self._max_model_tokens = min(config.max_model_tokens, model.max_position)
        self._dtype = getattr(torch, config.dtype)
        device = torch.device(config.device)
        page_elements = _page_elements(model, config)
        num_pages = config.memory_bytes // (page_elements * self._dtype.itemsize)
        self._arena_PE = new_arena(num_pages, page_elements, self._dtype, device)
        self._allocator = PageAllocator(num_pages)
        evictions = EvictionQueue(self._allocator)
        self._adapters = AdapterCache(self._allocator, evictions, self._arena_PE, config.host_cache_bytes)
        self._prefixes = PrefixCache(self._allocator, evictions, config.page_tokens)
        self._swaps = SwapSpace(self._arena_PE, config.swap_bytes, config.page_tokens)
        self._scheduler = Scheduler(config, self._allocator, self._adapters, self._prefixes, evictions, self._swaps)
        self._layout = model.lora_layout(page_elements)
        self._batches = BatchBuilder(config.page_tokens, device, self._layout)
        self._sequences: dict[str, SequenceState] = {}  # by request id
        self._ended_early: list[TokenEvent] = []  # of requests whose resumed tokens already end them
        self._num_tokens = 0
        self._num_steps = 0
        self._step_seconds = 0.0
        self._recent_step_s = 0.0
        self._num_overdue = 0

    @classmethod
    def open(cls, folder: Path, config: ServingConfig) -> Self:
        """Open an engine on a Hugging Face checkpoint folder. Raises InvalidCheckpointError and ConfigError."""
        torch.set_num_threads(config.threads)
        dtype = getattr(torch, config.dtype)
        model = load_model(folder, dtype, config.device, is_compiled=config.compiled_kernels)
        return cls(model, base_dialect(folder), config)

    # Requests.

    def start_matcher(self, request: Request) -> "Future[Matcher] | None":
        """Compile a request's grammar in the background, for `submit`. None: it has none. Safe from any thread.

        The future's error is an InvalidRequestError that says why the grammar cannot be compiled.
        """
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        vocabulary, eos_ids, grammars = self.dialects.of(request.adapter)
        return grammars.start(grammar, end_ids_of(request.sampling, vocabulary, eos_ids))

    def submit(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request. Its events come from `step`. Without a `matcher`, waits until its grammar is compiled.

        Raises InvalidRequestError if it can never be served, NotFoundError if its adapter is not loaded,
        OverloadedError if the queue is full, and TenantLimitError if the tenant has used up its share of the queue.
        """
        if request.id in self._sequences:
            raise InvalidRequestError(f"request id {request.id} is already in use")
        check_request(request, self._model.vocab_size, self._max_model_tokens)
        vocabulary, eos_ids, _ = self.dialects.of(request.adapter)
        if matcher is None and (compiling := self.start_matcher(request)) is not None:
            matcher = compiling.result()
        sequence = new_sequence(request, vocabulary, eos_ids, self._max_model_tokens, self.config, matcher)
        reason = sequence.replay()
        if reason is None:
            self._scheduler.submit(sequence)
            self._sequences[request.id] = sequence
        else:
            self._ended_early.append(TokenEvent(request.id, finish_reason=reason))

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds, without an event. An unknown id is ignored: it may just have ended."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.finish(sequence)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._sequences or self._ended_early)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Run one step: schedule, acquire, forward, commit. Return an event for each request with a token or an end.

        `schedule` picks the sequences and acquires their pages and adapters. `forward` runs the model on all of them
        at once. `commit` records the sampled tokens and turns them into text.
        """
        started_at = time.perf_counter()
        events, self._ended_early = self._ended_early, []
        events += self._refuse_overdue()
        scheduled = self._scheduler.schedule()
        batch = None
        if scheduled.sequences:
            batch = self._batches.build(scheduled)
            logits_OV = self._model.forward(batch, self._arena_PE.view(-1), self.config.page_tokens)
            if scheduled.num_scores_B.any():
                logits_OV = score_prompts(scheduled, logits_OV)
            rows_O = scheduled.sample_rows_B[scheduled.does_sample_B]
            mask = self._masks.of(scheduled.sampling, rows_O)
            events += self._commit(scheduled, sample(logits_OV, rows_O, partial(adjust_rows, scheduled.sampling), mask))
        self._measure(time.perf_counter() - started_at, batch)
        return events

    # Adapters.

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Lay an adapter out in pages. Safe from any thread. Raises InvalidAdapterError if it does not fit the base."""
        if adapter.max_rank > self.config.max_rank:
            raise InvalidAdapterError(f"rank {adapter.max_rank} is above the limit of {self.config.max_rank}")
        check_fits(adapter, self._model.target_shapes)
        weights = self._model.target_weights()
        check_base_copies(adapter, self._model.weight)
        factors = dora_factors(adapter, weights)
        page_elements = self._arena_PE.shape[1]
        return pack_adapter(adapter, tuple(weights), page_elements, self._dtype, factors, self._layout.order)

    def packing_id(self) -> str:
        """Return a hash of everything that `pack` depends on besides the adapter. Reads every weight of the base."""
        weights, page_elements = self._model.parameters(), self._arena_PE.shape[1]
        return packing_id(weights, page_elements, self._dtype, self.config.max_rank)

    def add_packed(self, ref: AdapterRef, packed: PackedAdapter, load_s: float = 0.0) -> None:
        """Put a packed adapter, which took `load_s` to load, on the host. Does nothing if it is there already.

        Raises InvalidAdapterError if the memory can never hold it, OverloadedError if adapters in use leave no room.
        """
        self._adapters.add(ref.key, packed, load_s)

    def check_packed(self, packed: PackedAdapter) -> None:
        """See `AdapterCache.check_size`. Safe from any thread."""
        self._adapters.check_size(packed)

    def replace_packed(self, key: str, packed: PackedAdapter) -> None:
        """See `AdapterCache.replace`."""
        self._adapters.replace(key, packed)

    def add_adapter(self, ref: AdapterRef, adapter: Adapter) -> None:
        """Call `pack` and `add_packed`."""
        self.add_packed(ref, self.pack(adapter))

    def has_adapter(self, key: str) -> bool:
        """Whether requests may name the adapter. Safe from any thread."""
        return self._adapters.has(key)

    def mapped_adapter(self, key: str) -> PackedAdapter | None:
        """See `AdapterCache.mapped`. Safe from any thread."""
        return self._adapters.mapped(key)

    def remove_adapter(self, key: str) -> None:
        """Refuse new requests for an adapter. Its memory is freed when its last accepted request ends.

        Its cached prefixes are freed with it.
        """
        self._adapters.remove(key)
        self._prefixes.forget(key)

    def residencies(self) -> list[Residency]:
        """Return where each of the engine's adapters is."""
        return self._adapters.residencies()

    # Bookkeeping.

    def stats(self) -> dict[str, float]:
        """Return gauges and totals, which add up over engines. Pages of idle prefixes count as free."""
        num_free, num_cached = self._allocator.num_free, self._prefixes.num_idle
        num_adapter_pages = self._adapters.num_pages_used
        return {
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "pages": self._allocator.num_pages,
            "pages_free": num_free + num_cached,
            "pages_cached": num_cached,
            "pages_kv": self._allocator.num_pages - num_free - num_cached - num_adapter_pages,
            "pages_adapters": num_adapter_pages,
            "adapters_resident": self._adapters.num_resident,
            "adapters_on_host": self._adapters.num_on_host,
            "host_bytes": self._adapters.num_host_bytes,
            "tokens_generated": self._num_tokens,
            "preemptions": self._scheduler.num_preemptions,
            "swap_pages_used": self._swaps.num_pages_used,
            "swap_pages_out": self._swaps.num_pages_out,
            "swap_pages_in": self._swaps.num_pages_in,
            "evictions": self._adapters.num_evictions,
            "overdue": self._num_overdue,
            "prefix_tokens": self._prefixes.num_asked_tokens,
            "prefix_hit_tokens": self._prefixes.num_hit_tokens,
            "steps": self._num_steps,
            "step_seconds": self._step_seconds,
        }

    def check_integrity(self) -> None:
        """Assert that all owners of pages, adapters and sequences agree; for tests and fault runs."""
        self._scheduler.check_integrity()
        assert len(self._sequences) == self._scheduler.num_running + self._scheduler.num_waiting, "a sequence is lost"

    def _refuse_overdue(self) -> list[TokenEvent]:
        """End the requests whose first token would come too late: their clients no longer wait."""
        events = []
        for sequence in self._scheduler.overdue(time.monotonic() + self._recent_step_s):
            self.abort(sequence.id)
            self._num_overdue += 1
            error = OverloadedError("the first token would miss the request's deadline: too many requests are waiting")
            events.append(TokenEvent(sequence.id, finish_reason=FinishReason.ABORT, error=error))
        return events

    def _measure(self, seconds: float, batch: Batch | None) -> None:
        if batch is not None and batch.attention.max_query_tokens > 1:
            self._swaps.record_prefill(len(batch.tokens_T), seconds)
        self._num_steps += 1
        self._step_seconds += seconds
        self._recent_step_s += _STEP_WEIGHT * (seconds - self._recent_step_s)

    def _commit(self, scheduled: SchedulerOutput, samples: Samples) -> list[TokenEvent]:
        """Record a step whose KV is stored, and end the sequences that are complete or have no next token."""
        sampling = scheduled.sampling
        blocked = {sampling[row] for row in samples.blocked}
        poisoned = {sequence for sequence, is_valid in zip(sampling, samples.is_valid, strict=True) if not is_valid}
        events = [self._fail(sequence, is_blocked=sequence in blocked) for sequence in poisoned]
        tokens = [token for token, is_valid in zip(samples.tokens, samples.is_valid, strict=True) if is_valid]
        self._scheduler.commit(scheduled.without(poisoned) if poisoned else scheduled, tokens)
        self._num_tokens += len(tokens)
        for row, (sequence, token, is_valid) in enumerate(zip(sampling, samples.tokens, samples.is_valid, strict=True)):
            if is_valid:
                event = sequence.event(token, (samples.logprobs[row],) if row in samples.logprobs else ())
                events.append(event)
                if event.finish_reason is not None:
                    self.abort(sequence.id)
        return events

    def _fail(self, sequence: SequenceState, *, is_blocked: bool) -> TokenEvent:
        """End a request without a next token. The rest of its batch is sound: no value crosses sequences."""
        error = (sequence.matcher and sequence.matcher.error) or no_token_error(
            sequence.request.adapter, is_blocked=is_blocked
        )
        log.warning("request %s: %s", sequence.id, error)
        self.abort(sequence.id)
        return TokenEvent(sequence.id, finish_reason=FinishReason.ABORT, error=error)


def _page_elements(model: CausalLM, config: ServingConfig) -> int:
    """Return the elements of a page: keys and values of `page_tokens` tokens in all layers.

    Raises ConfigError if a page is too small for a row of an adapter, or the memory for a page.
    """
    token_elements = model.num_layers * 2 * model.num_kv_heads * model.head_dim
    page_elements = token_elements * config.page_tokens
    row_elements = max(max(shape) for shape in model.linear_shapes.values())
    if row_elements > page_elements:
        raise ConfigError(
            f"serving.page_tokens: a page of {config.page_tokens} tokens has {page_elements} elements, but an adapter "
            f"row of this model needs {row_elements}: raise it to {-(-row_elements // token_elements)} or more"
        )
    page_bytes = page_elements * getattr(torch, config.dtype).itemsize
    if config.memory_bytes < page_bytes:
        raise ConfigError(f"serving.memory_bytes: {config.memory_bytes} is less than one page of {page_bytes} bytes")
    return page_elements
