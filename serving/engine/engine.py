"""One base model, its adapters and its memory: requests in, tokens out, one `step` at a time. One thread at a time.

Shape letters: O rows whose logits are wanted, V vocabulary, P pages, E elements of a page.
"""

import gc
import json
import logging
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.adapter_files import Adapter, check_base_copies, check_fits
from cluster.config import ServingConfig
from cluster.errors import (
    ConfigError,
    ContextLengthError,
    InvalidAdapterError,
    InvalidCheckpointError,
    InvalidRequestError,
    OverloadedError,
    ReloraError,
)
from serving.adapters.cache import AdapterCache, ResidentAdapter
from serving.adapters.disk_tier import packing_id
from serving.adapters.packing import PackedAdapter, dora_factors, pack_adapter
from serving.adapters.residency import Residency
from serving.engine.batch_builder import BatchBuilder
from serving.engine.detokenizer import Vocabulary
from serving.engine.job import Job, make_job
from serving.engine.request import AdapterRef, FinishReason, Request, TokenEvent
from serving.engine.running import SchedulerOutput
from serving.engine.sampler import Samples, sample
from serving.engine.scheduler import Scheduler
from serving.memory.arena import new_arena
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator
from serving.memory.prefixes import PrefixCache
from serving.memory.swap import SwapSpace
from serving.model.batch import Batch
from serving.model.llama import CausalLM
from serving.model.weights import load_model

log = logging.getLogger(__name__)

# Of objects, more than a step with a thousand sequences makes and lets go again.
_COLLECTION_THRESHOLD = 20_000
_STEP_WEIGHT = 0.1  # of the last step in the moving average of their time


def settle_heap() -> None:
    """Spare a process that serves, once its engines are open, most of the garbage collector's work.

    What is here stays: to look through it again in each full collection takes some 0.1 s. And what a step makes lives
    until the next one: to look through that three times a step, as by default, takes 0.3 ms with 1,024 sequences.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTION_THRESHOLD)


class Engine:
    """Not thread-safe, except for what any thread may ask of adapters: each such method says so.

    `eos_ids` are the tokens that end a sequence.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        config: ServingConfig,
        eos_ids: frozenset[int] = frozenset(),
    ):
        self.config = config
        self._model = model
        self._vocabulary = Vocabulary(tokenizer)
        self._eos_ids = eos_ids
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
        self._jobs: dict[str, Job] = {}
        self._ended_early: list[TokenEvent] = []
        self._num_tokens = 0
        self._num_steps = 0
        self._step_seconds = 0.0
        self._recent_step_s = 0.0
        self._num_overdue = 0

    @classmethod
    def open(cls, folder: Path, config: ServingConfig) -> "Engine":
        """An engine of a Hugging Face checkpoint folder. Raises InvalidCheckpointError and ConfigError."""
        torch.set_num_threads(config.threads)
        dtype = getattr(torch, config.dtype)
        model = load_model(folder, dtype, config.device, is_compiled=config.compiled_kernels)
        return cls(model, AutoTokenizer.from_pretrained(folder), config, read_eos_ids(folder))

    # Requests.

    def submit(self, request: Request) -> None:
        """Queue a request; its events come from `step`.

        Raises InvalidRequestError if it can never be served, NotFoundError if its adapter is not loaded,
        OverloadedError if the queue is full, TenantLimitError if the tenant's share of it is.
        """
        self._check(request)
        job = make_job(request, self._vocabulary, self._eos_ids, self._max_model_tokens, self.config)
        reason = job.replay()
        if reason is None:
            self._scheduler.submit(job)
            self._jobs[request.id] = job
        else:
            self._ended_early.append(TokenEvent(request.id, finish_reason=reason))

    def abort(self, request_id: str) -> None:
        """Forget a request and give back all that it holds; no event follows. Unknown ids are those that just ended."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._scheduler.finish(job)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._jobs or self._ended_early)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One forward pass of what the scheduler picks: the news of each request that got a token or ended."""
        started_at = time.perf_counter()
        events, self._ended_early = self._ended_early, []
        events += self._refuse_overdue()
        plan = self._scheduler.schedule()
        batch = None
        if plan.sequences:
            batch = self._batches.build(plan)
            logits_OV = self._model.forward(batch, self._arena_PE.view(-1), self.config.page_tokens)
            jobs = cast(list[Job], plan.sampling)
            samples = sample(logits_OV, [None if job.is_plain else job.sample_row() for job in jobs])
            events += self._commit(plan, jobs, samples)
        self._book_step(time.perf_counter() - started_at, batch)
        return events

    # Adapters.

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Lay an adapter out for this engine; any thread may do it. Raises InvalidAdapterError if it does not fit."""
        if adapter.max_rank > self.config.max_rank:
            raise InvalidAdapterError(f"rank {adapter.max_rank} is above the limit of {self.config.max_rank}")
        check_fits(adapter, self._model.target_shapes)
        weights = self._model.target_weights()
        check_base_copies(adapter, weights)
        factors = dora_factors(adapter, weights)
        page_elements = self._arena_PE.shape[1]
        return pack_adapter(adapter, tuple(weights), page_elements, self._dtype, factors, self._layout.order)

    def packing_id(self) -> str:
        """A hash of all that decides what `pack` makes of an adapter; reads every weight."""
        weights, page_elements = self._model.parameters(), self._arena_PE.shape[1]
        return packing_id(weights, page_elements, self._dtype, self.config.max_rank)

    def add_packed(self, ref: AdapterRef, packed: PackedAdapter, load_s: float = 0.0) -> None:
        """Put a packed adapter on the host, where it came from in so many seconds; nothing happens if it is there.

        Raises InvalidAdapterError if the memory can never hold it, OverloadedError if adapters in use leave no room.
        """
        self._adapters.add(ref.key, packed, load_s)

    def check_packed(self, packed: PackedAdapter) -> None:
        """See `AdapterCache.check_size`; any thread may ask."""
        self._adapters.check_size(packed)

    def replace_packed(self, key: str, packed: PackedAdapter) -> None:
        """See `AdapterCache.replace`."""
        self._adapters.replace(key, packed)

    def add_adapter(self, ref: AdapterRef, adapter: Adapter) -> None:
        """`pack` and `add_packed`."""
        self.add_packed(ref, self.pack(adapter))

    def has_adapter(self, key: str) -> bool:
        """Whether requests may name the adapter; any thread may ask."""
        return self._adapters.has(key)

    def mapped_adapter(self, key: str) -> PackedAdapter | None:
        """See `AdapterCache.mapped`; any thread may ask."""
        return self._adapters.mapped(key)

    def remove_adapter(self, key: str) -> None:
        """Refuse new requests for an adapter; its memory comes back with the last one that was accepted before.

        So does that of its cached prefixes.
        """
        self._adapters.remove(key)
        self._prefixes.forget(key)

    def residencies(self) -> list[Residency]:
        """Where each adapter is that the engine has."""
        return self._adapters.residencies()

    # Books.

    def stats(self) -> dict[str, float]:
        """Gauges and totals; those of several engines may be added up. Pages of idle prefixes count as free."""
        num_free, num_adapter_pages = self._allocator.num_free, self._adapters.num_pages_used
        num_cached = self._prefixes.num_idle
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

    def memory_waste(self) -> tuple[int, float]:
        """The pages in use, and how many pages' worth of them is empty: behind last tokens and around adapters' rows.

        In use are the pages of running sequences (one that several share counts once) and of resident adapters. The
        waste is the second number over the first.
        """
        page_elements, num_adapter_pages = self._arena_PE.shape[1], self._adapters.num_pages_used
        num_pages = self._allocator.num_pages - self._allocator.num_free - self._prefixes.num_idle
        rows = sum(map(self._num_row_elements, self._adapters.residents()))
        slack = self._scheduler.num_slack_tokens * page_elements // self.config.page_tokens
        return num_pages, num_adapter_pages + (slack - rows) / page_elements

    def _num_row_elements(self, adapter: ResidentAdapter) -> int:
        shapes = self._model.target_shapes.values()
        triples = zip(shapes, adapter.ranks_M.tolist(), adapter.is_dora_M.tolist(), strict=True)
        return sum(rank * (num_out + num_in) + is_dora * num_out for (num_out, num_in), rank, is_dora in triples)

    def check_integrity(self) -> None:
        """Assert that all books agree; for tests."""
        self._scheduler.check_integrity()
        assert len(self._jobs) == self._scheduler.num_running + self._scheduler.num_waiting, "a job is lost"

    def _check(self, request: Request) -> None:
        num_prompt, limit = len(request.prompt_tokens), self._max_model_tokens - 1
        if request.id in self._jobs:
            raise InvalidRequestError(f"request {request.id} is here already")
        if num_prompt == 0:
            raise InvalidRequestError("the prompt is empty: there is no token to continue from")
        if num_prompt > limit:
            raise ContextLengthError(f"the prompt has {num_prompt} tokens, the model takes at most {limit}")
        if request.sampling.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {request.sampling.max_tokens}, it has to be at least 1")
        tokens = (*request.prompt_tokens, *request.resumed_tokens)
        if not 0 <= min(tokens) <= max(tokens) < self._model.vocab_size:
            raise InvalidRequestError(f"the prompt has token ids outside of the vocabulary of {self._model.vocab_size}")

    def _refuse_overdue(self) -> list[TokenEvent]:
        """End those whose first token cannot come in time any more, rather than compute for nobody."""
        events = []
        for sequence in self._scheduler.overdue(time.monotonic() + self._recent_step_s):
            request = sequence.request
            self.abort(request.id)
            self._num_overdue += 1
            error = OverloadedError("the first token cannot come before the request's deadline: too many are waiting")
            events.append(TokenEvent(request.id, finish_reason=FinishReason.ABORT, error=error))
        return events

    def _book_step(self, seconds: float, batch: Batch | None) -> None:
        if batch is not None and batch.attention.max_query_tokens > 1:
            self._swaps.record_prefill(len(batch.tokens_T), seconds)
        self._num_steps += 1
        self._step_seconds += seconds
        self._recent_step_s += _STEP_WEIGHT * (seconds - self._recent_step_s)

    def _commit(self, plan: SchedulerOutput, jobs: Seq[Job], samples: Samples) -> list[TokenEvent]:
        """Book a step; `jobs` and `samples` are of those that sample, in order."""
        poisoned = {job for job, is_valid in zip(jobs, samples.is_valid, strict=True) if not is_valid}
        events = [self._fail(job) for job in poisoned]
        tokens = [token for token, is_valid in zip(samples.tokens, samples.is_valid, strict=True) if is_valid]
        self._scheduler.commit(plan.without(poisoned) if poisoned else plan, tokens)
        self._num_tokens += len(tokens)
        for row, (job, token, is_valid) in enumerate(zip(jobs, samples.tokens, samples.is_valid, strict=True)):
            if is_valid:
                text, reason = job.read(token, len(job.tokens))
                logprobs = (samples.logprobs[row],) if row in samples.logprobs else ()
                events.append(TokenEvent(job.id, (token,), text, logprobs, reason))
                if reason is not None:
                    self.abort(job.id)
        return events

    def _fail(self, job: Job) -> TokenEvent:
        """End a request whose logits are not finite. Its batch mates are not touched: no value crosses sequences."""
        adapter = job.request.adapter
        error: ReloraError = (
            InvalidCheckpointError("the base model's logits are not finite for this prompt")
            if adapter is None
            else InvalidAdapterError(f"adapter {adapter.label} makes the logits NaN or infinite")
        )
        log.warning("request %s: %s", job.id, error)
        self.abort(job.id)
        return TokenEvent(job.id, finish_reason=FinishReason.ABORT, error=error)


def read_eos_ids(folder: Path) -> frozenset[int]:
    """The tokens that end a sequence, from generation_config.json, else config.json; one number or a list there."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _page_elements(model: CausalLM, config: ServingConfig) -> int:
    """Elements of a page: keys and values of `page_tokens` tokens in all layers. Raises ConfigError if too few."""
    token_elements = model.num_layers * 2 * model.num_kv_heads * model.head_dim
    page_elements = token_elements * config.page_tokens
    row_elements = max(max(shape) for shape in model.linear_shapes.values())
    if row_elements > page_elements:
        raise ConfigError(
            f"serving.page_tokens: a page of {config.page_tokens} tokens has {page_elements} elements, a row of an "
            f"adapter of this model up to {row_elements}: raise it to {-(-row_elements // token_elements)} or more"
        )
    page_bytes = page_elements * getattr(torch, config.dtype).itemsize
    if config.memory_bytes < page_bytes:
        raise ConfigError(f"serving.memory_bytes: {config.memory_bytes} is less than one page of {page_bytes} bytes")
    return page_elements
