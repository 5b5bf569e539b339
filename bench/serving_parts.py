"""What `relora bench serving` measures, one function a part; each returns what its part of the JSON file holds.

Throughput is generated tokens a second from the first arrival to the last token. Where engines are compared they answer
the same requests in turn, round by round, and the median round counts; rivals in processes of their own (vLLM,
llama.cpp) have all their rounds just before ours.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench.serving_ours import PAGE_TOKENS, Ours, config, replay_live, running, visit_all
from bench.serving_overhead import measure_overhead
from bench.serving_peft import Peft
from bench.serving_workloads import Answer, Ask, Lengths, batch, read_trace, slora, zipf
from bench.serving_world import ATTENTION, World, make_world
from cluster.config import MIB
from serving.engine import Engine

Replay = Callable[[Sequence[Ask]], list[Answer]]
LENGTHS = Lengths(prompt=(8, 64), output=(8, 64))  # an eighth of S-LoRA's
S1, S2 = (8,), (64, 32, 16, 8)  # S-LoRA's settings for its 7B model
SLO_S = 6.0  # S-LoRA's for the first token
MIXED = 32  # rows, and distinct adapters among them


@dataclass(frozen=True)
class Size:
    """How much is measured.

    `counts` are numbers of adapters, `peft_counts` those at which PEFT runs too. `rate` is far above what any engine
    here bears. `loads` are shares of what ours bears.
    """

    model: str = "stories3m-v1"
    counts: tuple[int, ...] = (1, 5, 100, 1000, 2000)
    peft_counts: tuple[int, ...] = (5, 100)
    rate: float = 400.0
    duration_s: float = 2.5
    peft_duration_s: float = 0.5
    lengths: Lengths = LENGTHS
    rounds: int = 3
    decode_tokens: int = 64
    batches: tuple[int, ...] = (1, 8, 32)
    zipf_adapters: int = 1000
    zipf_requests: int = 1500
    zipf_rounds: int = 5
    cold_share: float = 0.1
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.1)
    trace_requests: int = 1000
    running: tuple[int, ...] = (64, 1024)
    chaos_requests: int = 100_000


QUICK = Size(
    counts=(1, 2, 4),
    peft_counts=(2,),
    duration_s=0.1,
    peft_duration_s=0.05,
    lengths=Lengths((4, 16), (4, 12)),
    rounds=1,
    decode_tokens=8,
    batches=(1, 2),
    zipf_adapters=12,
    zipf_requests=40,
    zipf_rounds=1,
    cold_share=0.6,
    loads=(0.5,),
    trace_requests=20,
    running=(8,),
    chaos_requests=300,
)


@dataclass(frozen=True)
class Bench:
    """Where the parts find what they need: the kit, a folder for what is made, and how much is to be measured."""

    kit: Path
    work: Path
    size: Size

    def world(self, num_adapters: int, ranks: tuple[int, ...] = S1, modules: tuple[str, ...] | None = None) -> World:
        """Adapters on the model, those on all its linears unless `modules` says otherwise."""
        model = self.kit / "models" / self.size.model
        return make_world(self.work, model, num_adapters, ranks, *([modules] if modules else []))


def summary(asks: Sequence[Ask], answers: Sequence[Answer]) -> dict[str, float]:
    """Figures of one replay; those of first tokens only where the engine tells when they came."""
    tokens = sum(len(answer.tokens) for answer in answers)
    assert tokens == sum(ask.max_tokens for ask in asks), "an engine has not generated what was asked for"
    seconds = max(answer.end_s for answer in answers) - asks[0].arrival_s
    latencies = [answer.end_s - ask.arrival_s for ask, answer in zip(asks, answers, strict=True)]
    found = {
        "requests": len(asks),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(asks) / seconds,
        "latency_mean_s": mean(latencies),
        "latency_p99_s": float(np.percentile(latencies, 99)),
    }
    firsts = first_tokens_s(asks, answers)
    if firsts:
        found |= {f"first_token_p{p}_s": float(np.percentile(firsts, p)) for p in (50, 99)}
        found["slo_attainment"] = mean(first <= SLO_S for first in firsts)
    return found


def first_tokens_s(asks: Sequence[Ask], answers: Sequence[Answer]) -> list[float]:
    """Seconds from arrival to first token, of those answers that tell when it came."""
    return [a.first_s - ask.arrival_s for ask, a in zip(asks, answers, strict=True) if a.first_s is not None]


def compare(replays: dict[str, Replay], asks: Sequence[Ask], rounds: int) -> dict[str, dict[str, Any]]:
    """Each engine's median round (by throughput), and how many of its answers are those of the first engine."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in replays}
    expected: list[Answer] = []
    for _ in range(rounds):
        for name, replay in replays.items():
            answers = replay(asks)
            expected = expected or answers
            same = mean(a.tokens == b.tokens for a, b in zip(answers, expected, strict=True))
            results[name].append(summary(asks, answers) | {"same_answers": same})
    return {name: _median_round(found) for name, found in results.items()}


def adapters(bench: Bench) -> dict[str, Any]:
    """S-LoRA's synthetic workload S1 at growing numbers of adapters, all on the host, more requests than it bears."""
    size = bench.size
    world = bench.world(max(size.counts), S1, ATTENTION)
    engines = {count: Ours(world, count) for count in size.counts}
    asks = {n: slora(n, size.rate, size.duration_s, size.lengths, world.vocab_size) for n in size.counts}
    rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in size.counts}
    for _ in range(size.rounds):
        for count, engine in engines.items():
            rounds[count].append(summary(asks[count], engine.replay(asks[count])))
    found: dict[str, Any] = {str(count): {"ours": _median_round(many)} for count, many in rounds.items()}
    for count in size.peft_counts:
        few = slora(count, size.rate, size.peft_duration_s, size.lengths, world.vocab_size)
        pair: dict[str, Replay] = {
            "ours": engines[count].replay,
            "peft one adapter at a time": Peft(world, count).replay_by_adapter,
        }
        found[str(count)]["same requests"] = compare(pair, few, size.rounds)
    return found


def mixed(bench: Bench) -> dict[str, Any]:
    """A batch whose rows all have adapters of their own, on all linears; the bare base beside it."""
    world, size = bench.world(MIXED), bench.size
    engine, peft = Ours(world, MIXED), Peft(world, MIXED)
    asks = mixed_asks(world, size)
    replays: dict[str, Replay] = {"ours": engine.replay, "peft mixed": peft.replay_mixed}
    found: dict[str, Any] = compare(replays, asks, size.rounds)
    bare = batch([None] * MIXED, 32, size.decode_tokens, world.vocab_size)
    rounds = [(summary(asks, engine.replay(asks)), summary(bare, engine.replay(bare))) for _ in range(size.rounds)]
    found["ours beside base only"] = _median_round([distinct for distinct, _ in rounds])
    found["ours base only"] = _median_round([base for _, base in rounds])
    return found


def mixed_asks(world: World, size: Size) -> list[Ask]:
    """One request for each of the first adapters, all at once."""
    return batch(range(MIXED), 32, size.decode_tokens, world.vocab_size)


def decode(bench: Bench) -> dict[str, dict[str, Any]]:
    """Tokens a second of pure decoding, and the tokens, by rows at once, all with one adapter; prompts of 32 tokens."""
    world, size = bench.world(1), bench.size
    engine = Ours(world, 1, config(max_batch_tokens=32 * max(size.batches)))
    return {str(rows): _decode_run(engine, rows, world.vocab_size, size) for rows in size.batches}


def cold(bench: Bench) -> dict[str, Any]:
    """Many adapters under Zipf's law: all resident, against room for few of them in the arena and on the host.

    The same requests in turn, at half of what the resident engine bears; percentiles are of all rounds together. Cold
    adapters come from the packed files on the disk, which a first visit to each has written.
    """
    size = bench.size
    world = bench.world(size.zipf_adapters)
    adapter_bytes = (world.adapters[0] / "adapter_model.safetensors").stat().st_size
    all_bytes = int(1.2 * adapter_bytes * size.zipf_adapters) + 128 * MIB
    few_bytes = int(adapter_bytes * size.zipf_adapters * size.cold_share)
    resident = config(all_bytes, all_bytes)
    small = config(few_bytes + 16 * MIB, few_bytes)
    packed = bench.work / "packed"
    firsts: dict[str, list[float]] = {"resident": [], "cold": []}
    rounds = []
    with running(world, resident, packed) as warm, running(world, small, packed) as tight:
        for loop in (warm, tight):
            visit_all(loop, world)
        crowd = zipf(size.zipf_adapters, size.zipf_requests // 4, size.rate, size.lengths, world.vocab_size)
        rate = summary(crowd, replay_live(warm, world, crowd))["requests_per_s"] / 2
        asks = zipf(size.zipf_adapters, size.zipf_requests, rate, size.lengths, world.vocab_size)
        for _ in range(size.zipf_rounds):
            answers = {"resident": replay_live(warm, world, asks), "cold": replay_live(tight, world, asks)}
            rounds.append({name: summary(asks, these) for name, these in answers.items()})
            for name, these in answers.items():
                firsts[name] += first_tokens_s(asks, these)
        stats = tight.stats()
    p99 = {name: float(np.percentile(these, 99)) for name, these in firsts.items()}
    return {
        "ratio": p99["cold"] / p99["resident"],
        "first_token_p99_s": p99,
        "requests_per_s": rate,
        "adapters_resident_when_cold": stats["adapters_resident"],
        "loads_when_cold": stats["adapter_loads"] - size.zipf_adapters,
        "rounds": rounds,
    }


def trace(bench: Bench) -> dict[str, Any]:
    """The production trace at growing load: Azure's arrivals and lengths (an eighth), Alibaba's use of adapters."""
    size = bench.size
    num_adapters = min(874, max(size.counts))
    world = bench.world(num_adapters)
    engine, requests = Ours(world, num_adapters), read_trace(bench.kit)

    def asks(rate: float) -> list[Ask]:
        return requests.asks(size.trace_requests, num_adapters, rate, 8, 200, world.vocab_size)

    flood = asks(1e4)
    most = summary(flood, engine.replay(flood))["requests_per_s"]
    loads = {}
    for load in size.loads:
        these = asks(load * most)
        loads[str(load)] = summary(these, engine.replay(these)) | {"offered_requests_per_s": load * most}
    return {"most_requests_per_s": most, "loads": loads}


def waste(bench: Bench) -> dict[str, Any]:
    """The part of the arena's pages in use that holds nothing, over all steps of S-LoRA's workload S2."""
    size = bench.size
    count = min(100, max(size.counts))
    world = bench.world(count, S2, ATTENTION)
    asks = slora(count, size.rate, size.duration_s, size.lengths, world.vocab_size)
    held, empty = 0, 0.0

    def book(engine: Engine) -> None:
        nonlocal held, empty
        pages, waste = engine.memory_waste()
        held, empty = held + pages, empty + waste

    found = summary(asks, Ours(world, count).replay(asks, book))
    return {"memory_waste_fraction": empty / held, "page_tokens": PAGE_TOKENS, "run": found}


def overhead(bench: Bench) -> dict[str, float]:
    """Milliseconds of a step beside the forward, by running sequences."""
    model = bench.kit / "models" / "stories260k"
    return {str(count): measure_overhead(model, count) for count in bench.size.running}


def prompts(rows: int, tokens: int, vocab_size: int) -> list[tuple[int, ...]]:
    """The prompts of the decoding parts, the same for every engine."""
    draw = random.Random(0)
    return [tuple(draw.choices(range(3, vocab_size), k=tokens)) for _ in range(rows)]


def _decode_run(engine: Ours, rows: int, vocab_size: int, size: Size) -> dict[str, Any]:
    """The rate after the step that ends all prompts."""
    asks = [Ask(0.0, 0, prompt, size.decode_tokens) for prompt in prompts(rows, 32, vocab_size)]
    rates = []
    for _ in range(size.rounds + 1):  # the first brings the adapter into the arena
        answers = engine.replay(asks)
        first_s = max(answer.first_s or 0.0 for answer in answers)
        rates.append(rows * (size.decode_tokens - 1) / (max(answer.end_s for answer in answers) - first_s))
    return {"tokens_per_s": median(rates[1:]), "tokens": [answer.tokens for answer in answers]}


def _median_round(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_rate = sorted(rounds, key=lambda one: float(one["tokens_per_s"]))
    return by_rate[len(by_rate) // 2] | {"tokens_per_s_of_rounds": [one["tokens_per_s"] for one in rounds]}
