"""The engine's own time: milliseconds that a step takes beside the model's forward, while many sequences decode.

    python -m bench.serving_overhead --base DIR [--sequences 64 1024] [--adapters 32] [--threads 1] [--out FILE.json]

Everything of `Engine.step` but `CausalLM.forward` is counted: scheduling, the batch's tensors, sampling (greedy, over
the model's vocabulary), text for a stream, the books. Prefix caching is on; requests of the base and of all adapters
are mixed; each that ends is followed by another at once, so some steps also admit and prefill.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoTokenizer

from cluster.adapter_files import Adapter, LoraFactors
from cluster.config import MIB, ServingConfig
from serving.batch import Batch
from serving.engine import Engine
from serving.model import CausalLM
from serving.request import AdapterRef, Request, SamplingParams
from serving.weights import load_model

PROMPT_TOKENS, OUTPUT_TOKENS = (8, 64), (32, 160)
_RANKS = (8, 16)
_PREFILL_TOKENS = 2048  # a step's budget beside its decodes


def measure_overhead(
    base: Path, num_sequences: int, *, num_adapters: int = 32, num_steps: int = 200, seed: int = 0
) -> float:
    """Median milliseconds of a step beside the forward, with so many sequences running, over `num_steps` steps."""
    return median(overheads_ms(base, num_sequences, num_adapters=num_adapters, num_steps=num_steps, seed=seed))


def overheads_ms(
    base: Path, num_sequences: int, *, num_adapters: int = 32, num_steps: int = 200, seed: int = 0
) -> list[float]:
    """Milliseconds beside the forward of each step of the steady state; a quarter as many steps warm it up."""
    world = _World(base, num_sequences, num_adapters, seed)
    while not world.is_full:
        world.step()
    gc.freeze()  # as a replica does
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
        self.forward_s += time.perf_counter() - started_at
        return logits_OV


class _World:
    """An engine with as many requests as are to run at once, and their successors. `is_full`: nobody had to wait."""

    def __init__(self, base: Path, num_sequences: int, num_adapters: int, seed: int):
        self._draw = random.Random(seed)
        self._model = _TimedModel(load_model(base, torch.float32, "cpu", is_compiled=True))
        self._refs: list[AdapterRef | None] = [None]
        config = _config(self._model, num_sequences)
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


def _config(model: CausalLM, num_sequences: int) -> ServingConfig:
    """Memory for all at their longest and all adapters beside them, so that nobody is preempted."""
    token_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 4
    settings = {
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


def _measured(base: Path, counts: list[int], num_adapters: int, num_steps: int) -> Iterator[dict[str, Any]]:
    for num_sequences in counts:
        steps_ms = sorted(overheads_ms(base, num_sequences, num_adapters=num_adapters, num_steps=num_steps))
        yield {
            "num_sequences": num_sequences,
            "engine_overhead_per_step_ms": round(median(steps_ms), 3),
            "p90_ms": round(steps_ms[int(0.9 * len(steps_ms))], 3),
        }


def main() -> None:
    """Prints the figures as JSON, and writes them where asked to."""
    parser = argparse.ArgumentParser(description="The engine's own time per step.")
    parser.add_argument("--base", type=Path, required=True, help="folder of a Hugging Face checkpoint, a small one")
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = list(_measured(args.base, args.sequences, args.adapters, args.steps))
    text = json.dumps({"base": args.base.name, "num_adapters": args.adapters, "figures": figures}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
