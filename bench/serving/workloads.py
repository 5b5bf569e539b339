"""The workloads: S-LoRA's synthetic one, a production trace, and batches whose requests come at once.

Prompts are random tokens, so no two share a prefix. All requests run to their full length, so every engine has the same
work to do, whatever it generates.
"""

import ast
import csv
import io
import itertools
import math
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

FIRST_TOKEN_ID = 3  # lower ids are special tokens in all models here
_AZURE = "AzureLLMInferenceTrace_conv.csv"
_ALIBABA = "data_trace_processed.tar.gz"


@dataclass(frozen=True)
class Ask:
    """One greedy request for exactly `max_tokens` tokens. `adapter` is an index; None means the base alone."""

    arrival_s: float
    adapter: int | None
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """The tokens, and when the first and last came in seconds since the replay began; `first_s` is None if unknown."""

    first_s: float | None
    end_s: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """Bounds of uniformly drawn lengths in tokens; upper bounds are exclusive."""

    prompt: tuple[int, int]
    output: tuple[int, int]


def slora(
    num_adapters: int,
    rate: float,
    duration_s: float,
    lengths: Lengths,
    vocab_size: int,
    *,
    alpha: float = 1.0,
    cv: float = 1.0,
) -> list[Ask]:
    """Return S-LoRA's workload (arXiv 2311.03285, section 7.1), drawn as its published code does, with the same seed.

    Gaps are gamma-distributed with the coefficient of variation `cv`, at `rate` requests a second. Adapters follow a
    power law with exponent `alpha` (1: uniform).
    """
    draw = np.random.RandomState(42)
    num = int(rate * duration_s)
    adapters = (draw.power(alpha, num) * num_adapters).astype(int)
    prompts, outputs = draw.randint(*lengths.prompt, num), draw.randint(*lengths.output, num)
    arrivals = np.cumsum(draw.gamma(1 / cv**2, cv**2 / rate, num))
    return _asks(arrivals.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), vocab_size)


def batch(adapters: Sequence[int | None], prompt_tokens: int, output_tokens: int, vocab_size: int) -> list[Ask]:
    """Return one request for each of these adapters, all arriving at once."""
    num = len(adapters)
    return _asks([0.0] * num, adapters, [prompt_tokens] * num, [output_tokens] * num, vocab_size)


def zipf(
    num_adapters: int, num: int, rate: float, lengths: Lengths, vocab_size: int, exponent: float = 1.0
) -> list[Ask]:
    """Return requests with Poisson arrivals. The i-th adapter is asked for in proportion to i^-exponent."""
    draw = np.random.RandomState(7)
    weights = np.arange(1, num_adapters + 1) ** -exponent
    adapters = draw.choice(num_adapters, num, p=weights / weights.sum())
    prompts, outputs = draw.randint(*lengths.prompt, num), draw.randint(*lengths.output, num)
    arrivals = np.cumsum(draw.exponential(1 / rate, num))
    return _asks(arrivals.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), vocab_size)


@dataclass(frozen=True)
class Trace:
    """Production requests: arrival, context and generated tokens (Azure), and the uses of each adapter (Alibaba).

    They come from two services, since no public trace of a language model has adapters.
    """

    requests: tuple[tuple[float, int, int], ...]
    adapter_uses: tuple[int, ...]

    def asks(
        self, num: int, num_adapters: int, rate: float, shrink: int, max_tokens: int, vocab_size: int
    ) -> list[Ask]:
        """Return the first `num` requests, scaled to a mean rate and to the model.

        Lengths are divided by `shrink`, then capped at `max_tokens`.
        """
        chosen = self.requests[:num]
        squeeze = num / rate / (chosen[-1][0] - chosen[0][0])
        uses = np.array(self.adapter_uses[:num_adapters], dtype=float)
        adapters = np.random.RandomState(11).choice(len(uses), num, p=uses / uses.sum())
        lengths = [[min(max(math.ceil(n / shrink), 1), max_tokens) for n in request[1:]] for request in chosen]
        arrivals = [(request[0] - chosen[0][0]) * squeeze for request in chosen]
        return _asks(arrivals, adapters.tolist(), [p for p, _ in lengths], [o for _, o in lengths], vocab_size)


def read_trace(kit: Path) -> Trace:
    """Read the kit's traces."""
    with (kit / "traces" / _AZURE).open(newline="") as rows:
        azure = [
            (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(rows)
        ]
    requests = tuple(((at - azure[0][0]).total_seconds(), prompt, output) for at, prompt, output in azure)
    with tarfile.open(kit / "traces" / _ALIBABA) as archive:
        member = archive.extractfile(_ALIBABA.replace(".tar.gz", ".csv"))
        assert member is not None, "the archive lacks its file"
        images = csv.DictReader(io.TextIOWrapper(member))
        uses = Counter(itertools.chain.from_iterable(_adapters_of(row["lora_args"]) for row in images))
    return Trace(requests, tuple(count for _, count in uses.most_common()))


def _adapters_of(text: str) -> list[str]:
    return [entry["modelVersionId"] for entry in ast.literal_eval(text or "[]")]


def _asks(
    arrivals: Iterable[float],
    adapters: Iterable[int | None],
    prompts: Iterable[int],
    outputs: Iterable[int],
    vocab_size: int,
) -> list[Ask]:
    draw = np.random.RandomState(0)
    return [
        Ask(at, adapter, tuple(draw.randint(FIRST_TOKEN_ID, vocab_size, prompt).tolist()), output)
        for at, adapter, prompt, output in zip(arrivals, adapters, prompts, outputs, strict=True)
    ]
