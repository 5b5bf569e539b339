"""Measures the engine's own time: milliseconds of a step outside the model's forward, while many sequences decode.

    relora bench overhead --base DIR [--sequences 64 --sequences 1024] [--adapters 32] [--device cuda] [--out FILE.json]

This is all of `Engine.step` except `CausalLM.forward`: scheduling, building the batch's tensors, greedy sampling over
the vocabulary, detokenizing and bookkeeping. Prefix caching is on. Requests for the base and for all adapters are
mixed. A new request follows each one that ends, so some steps also admit and prefill.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from pydantic import TypeAdapter
from torch import Tensor

from cluster.adapters.dialect import base_dialect
from cluster.adapters.files import Adapter, LoraFactors
from cluster.config.settings import MIB, ServingConfig
from serving.engine.engine import Engine
from serving.engine.heap import settle_heap
from serving.engine.request import AdapterRef, Request, SamplingParams
from serving.model.batch import Batch
from serving.model.llama import CausalLM
from serving.model.weights import load_model

PROMPT_TOKENS, OUTPUT_TOKENS = (8, 64), (32, 160)
_RANKS = (8, 16)
_PREFILL_TOKENS = 2048  # tokens of a step in addition to its decodes


def run(
    base: Path, counts: Sequence[int], *, num_adapters: int = 32, num_steps: int = 200, device: str = "cpu"
) -> list[dict[str, float]]:
    """Return median and 90th percentile of a step's overhead in milliseconds, for each number of running sequences."""
    figures = []
    for count in counts:
        steps_ms = sorted(overheads_ms(base, count, num_adapters, num_steps, device))
        p90_ms = steps_ms[int(0.9 * len(steps_ms))]
        figures.append({"num_sequences": count, "engine_overhead_per_step_ms": median(steps_ms), "p90_ms": p90_ms})
    return figures


def overheads_ms(base: Path, num_sequences: int, num_adapters: int, num_steps: int, device: str) -> list[float]:
    """Return the overhead in milliseconds of `num_steps` steps, after a warm-up of a quarter as many."""
    traffic = _SteadyTraffic(base, num_sequences, num_adapters, device)
    while not traffic.is_full:
        traffic.step()
    settle_heap()
    for _ in range(num_steps // 4):
        traffic.step()
    return [traffic.step() for _ in range(num_steps)]


class _TimedModel(CausalLM):
    """A model that measures the time of its forward."""

    def __init__(self, model: CausalLM):
        vars(self).update(vars(model))
        self.forward_s = 0.0

    def forward(self, batch: Batch, arena: Tensor, page_tokens: int) -> Tensor:
        started_at = time.perf_counter()
        logits_OV = super().forward(batch, arena, page_tokens)
        if arena.is_cuda:
            torch.cuda.synchronize(arena.device)  # else reading the logits would include the forward's time
        self.forward_s += time.perf_counter() - started_at
        return logits_OV


class _SteadyTraffic:
    """An engine under steady traffic of `num_sequences` requests. `is_full` means that all of them run."""

    def __init__(self, base: Path, num_sequences: int, num_adapters: int, device: str):
        self._draw = random.Random(0)
        self._model = _TimedModel(load_model(base, torch.float32, device, is_compiled=True))
        self._refs: list[AdapterRef | None] = [None]
        config = _config(self._model, num_sequences, device)
        self.engine = Engine(self._model, base_dialect(base), config)
        for number in range(num_adapters):
            ref = AdapterRef(f"hash-{number}", f"adapter-{number}", 1, "")
            self.engine.add_adapter(ref, _adapter(self._model, _RANKS[number % len(_RANKS)], number))
            self._refs.append(ref)
        self._num_submitted = 0
        self.is_full = False
        for _ in range(num_sequences):
            self._submit(self._draw.randint(1, OUTPUT_TOKENS[1]))  # as if each had been running for a random time

    def step(self) -> float:
        """Run one step and return its overhead in milliseconds."""
        before_s, started_at = self._model.forward_s, time.perf_counter()
        events = self.engine.step()
        seconds = time.perf_counter() - started_at - (self._model.forward_s - before_s)
        self.is_full = not self.engine.stats()["waiting"]
        for event in events:
            assert event.error is None, event
            if event.finish_reason is not None:
                self._submit(self._draw.randint(*OUTPUT_TOKENS))
        return 1e3 * seconds

    def _submit(self, max_tokens: int) -> None:
        number, draw = self._num_submitted, self._draw
        prompt = tuple(draw.choices(range(self._model.vocab_size), k=draw.randint(*PROMPT_TOKENS)))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.submit(Request(str(number), prompt, sampling, self._refs[number % len(self._refs)]))
        self._num_submitted += 1


def _config(model: CausalLM, num_sequences: int, device: str) -> ServingConfig:
    """Return settings with memory for all sequences at their longest and all adapters, so that none is preempted."""
    token_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 4
    settings = {
        "device": device,
        "max_sequences": num_sequences,
        "max_batch_tokens": num_sequences + _PREFILL_TOKENS,
        "max_queue": 2 * num_sequences,
        "memory_bytes": num_sequences * (PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]) * token_bytes + 64 * MIB,
    }
    return TypeAdapter(ServingConfig).validate_python(settings)


def _adapter(model: CausalLM, rank: int, seed: int) -> Adapter:
    """Return random factors for all linears, small enough that the logits stay finite."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LoraFactors(
                torch.randn(rank, num_in, generator=draw) * 0.01, torch.randn(num_out, rank, generator=draw) * 0.01, 1.0
            )
            for path, (num_out, num_in) in model.linear_shapes.items()
        }
    )
