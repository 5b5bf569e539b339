"""The engine's own time: milliseconds that a step takes beside the model's forward, while many sequences decode.

    relora bench overhead --base DIR [--sequences 64 --sequences 1024] [--adapters 32] [--device cuda] [--out FILE.json]

Everything of `Engine.step` but `CausalLM.forward` is counted: scheduling, the batch's tensors, sampling (greedy, over
the model's vocabulary), text for a stream, the books. Prefix caching is on; requests of the base and of all adapters
are mixed; each that ends is followed by another at once, so some steps also admit and prefill.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoTokenizer

from cluster.adapter_files import Adapter, LoraFactors
from cluster.config import MIB, ServingConfig
from serving.engine.engine import Engine
from serving.engine.heap import settle_heap
from serving.engine.request import AdapterRef, Request, SamplingParams
from serving.model.batch import Batch
from serving.model.llama import CausalLM
from serving.model.weights import load_model

PROMPT_TOKENS, OUTPUT_TOKENS = (8, 64), (32, 160)
_RANKS = (8, 16)
_PREFILL_TOKENS = 2048  # a step's budget beside its decodes


def run(
    base: Path, counts: Sequence[int], *, num_adapters: int = 32, num_steps: int = 200, device: str = "cpu"
) -> list[dict[str, float]]:
    """Median and 90th percentile of a step's milliseconds beside the forward, by numbers of running sequences."""
    figures = []
    for count in counts:
        steps_ms = sorted(overheads_ms(base, count, num_adapters, num_steps, device))
        p90_ms = steps_ms[int(0.9 * len(steps_ms))]
        figures.append({"num_sequences": count, "engine_overhead_per_step_ms": median(steps_ms), "p90_ms": p90_ms})
    return figures


def overheads_ms(base: Path, num_sequences: int, num_adapters: int, num_steps: int, device: str) -> list[float]:
    """Milliseconds beside the forward of each step of the steady state; a quarter as many steps warm it up."""
    world = _World(base, num_sequences, num_adapters, device)
    while not world.is_full:
        world.step()
    settle_heap()
    for _ in range(num_steps // 4):
        world.step()
    return [world.step() for _ in range(num_steps)]


class _TimedModel(CausalLM):
    """The same model with a stopwatch on its forward."""

    def __init__(self, model: CausalLM):
        vars(self).update(vars(model))
        self.forward_s = 0.0

    def forward(self, batch: Batch, arena: Tensor, page_tokens: int) -> Tensor:
        started_at = time.perf_counter()
        logits_OV = super().forward(batch, arena, page_tokens)
        if arena.is_cuda:
            torch.cuda.synchronize(arena.device)  # or whoever reads the logits would pay for the forward
        self.forward_s += time.perf_counter() - started_at
        return logits_OV


class _World:
    """An engine with as many requests as are to run at once, and their successors. `is_full`: nobody had to wait."""

    def __init__(self, base: Path, num_sequences: int, num_adapters: int, device: str):
        self._draw = random.Random(0)
        self._model = _TimedModel(load_model(base, torch.float32, device, is_compiled=True))
        self._refs: list[AdapterRef | None] = [None]
        config = _config(self._model, num_sequences, device)
        self.engine = Engine(self._model, AutoTokenizer.from_pretrained(base), config)
        for number in range(num_adapters):
            ref = AdapterRef(f"hash-{number}", f"adapter-{number}", 1, "")
            self.engine.add_adapter(ref, _adapter(self._model, _RANKS[number % len(_RANKS)], number))
            self._refs.append(ref)
        self._num_submitted = 0
        self.is_full = False
        for _ in range(num_sequences):
            self._submit(self._draw.randint(1, OUTPUT_TOKENS[1]))  # as of sequences that are at any point of their life

    def step(self) -> float:
        """One step; milliseconds beside the forward."""
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
    """Memory for all at their longest and all adapters beside them, so that nobody is preempted."""
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
    """Random factors for all linears, small enough that the logits stay finite."""
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LoraFactors(
                torch.randn(rank, num_in, generator=draw) * 0.01, torch.randn(num_out, rank, generator=draw) * 0.01, 1.0
            )
            for path, (num_out, num_in) in model.linear_shapes.items()
        }
    )
