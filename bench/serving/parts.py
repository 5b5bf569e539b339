"""The parts of `relora bench serving`: each function measures one, and returns its part of the JSON file.

Throughput is generated tokens per second from the first arrival to the last token. Compared engines answer the same
requests in turn, round by round, and the median round counts. Rivals in their own processes (vLLM, llama.cpp) run all
their rounds just before ours.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench.serving.ours import PAGE_TOKENS, Ours, config, replay_live, running, visit_all
from bench.serving.overhead import overheads_ms
from bench.serving.peft import Peft
from bench.serving.served import ATTENTION, LINEARS, ServedModel, copy_model, make_adapters, write_random_model
from bench.serving.shapes import Size, Subject
from bench.serving.waste import MeasuredEngine
from bench.serving.workloads import Answer, Ask, batch, read_trace, slora, zipf

Replay = Callable[[Sequence[Ask]], list[Answer]]
S1, S2 = (8,), (64, 32, 16, 8)  # S-LoRA's settings for its 7B model
SLO_S = 6.0  # S-LoRA's limit for the first token
MIXED = 32  # rows, and distinct adapters among them


@dataclass(frozen=True)
class Bench:
    """What the parts need: the kit, a work folder, what is served and how much."""

    kit: Path
    work: Path
    subject: Subject
    size: Size

    def served(self, num_adapters: int, ranks: tuple[int, ...] = S1, modules: tuple[str, ...] = LINEARS) -> ServedModel:
        """Return the model with adapters. They are made unless an earlier run has made them."""
        shape, device = self.subject.shape, self.subject.device
        base = self.work / self.subject.folder
        if not base.exists():
            if shape.sizes is None:
                copy_model(self.kit / "models" / shape.name, base, self.subject.dtype)
            else:
                write_random_model(shape.sizes, base, self.subject.dtype, device)
        return make_adapters(base, num_adapters, ranks, modules, shape.num_files, device)

    def ours(self, served: ServedModel, num_adapters: int, max_batch_tokens: int = 512) -> Ours:
        """Return our engine with the shape's memory."""
        return Ours(
            served, num_adapters, config(served, self.subject.shape.memory_bytes, max_batch_tokens=max_batch_tokens)
        )


def summary(asks: Sequence[Ask], answers: Sequence[Answer]) -> dict[str, float]:
    """Return the figures of one replay. Figures of first tokens are missing if the engine does not report them."""
    tokens = sum(len(answer.tokens) for answer in answers)
    assert tokens == sum(ask.max_tokens for ask in asks), "an engine has not generated all tokens asked for"
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
    """Return the seconds from arrival to first token of all answers that know it."""
    return [a.first_s - ask.arrival_s for ask, a in zip(asks, answers, strict=True) if a.first_s is not None]


def compare(replays: dict[str, Replay], asks: Sequence[Ask], rounds: int) -> dict[str, dict[str, Any]]:
    """Return each engine's median round by throughput, and how many of its answers equal the first engine's."""
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
    """Measure S-LoRA's synthetic workload S1 at growing numbers of adapters, with more requests than it can serve.

    One engine has all adapters on the host. At a count of n, requests are for the first n adapters.
    """
    size = bench.size
    served = bench.served(max(size.counts), S1, ATTENTION)
    engine = bench.ours(served, max(size.counts))
    asks = {n: slora(n, size.rate, size.duration_s, size.lengths, served.vocab_size) for n in size.counts}
    rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in size.counts}
    for _ in range(size.rounds):
        for count in size.counts:
            rounds[count].append(summary(asks[count], engine.replay(asks[count])))
    found: dict[str, Any] = {str(count): {"ours": _median_round(many)} for count, many in rounds.items()}
    for count in size.peft_counts:
        few = slora(count, size.rate, size.peft_duration_s, size.lengths, served.vocab_size)
        pair: dict[str, Replay] = {
            "ours": engine.replay,
            "peft one adapter at a time": Peft(served, count).replay_by_adapter,
        }
        found[str(count)]["same requests"] = compare(pair, few, size.rounds)
    return found


def mixed(bench: Bench) -> dict[str, Any]:
    """Measure a batch whose rows all have different adapters on all linears, and the base alone beside it."""
    served, size = bench.served(MIXED), bench.size
    engine, peft = bench.ours(served, MIXED), Peft(served, MIXED)
    asks = mixed_asks(served, size)
    replays: dict[str, Replay] = {"ours": engine.replay, "peft mixed": peft.replay_mixed}
    found: dict[str, Any] = compare(replays, asks, size.rounds)
    bare = batch([None] * MIXED, 32, size.decode_tokens, served.vocab_size)
    rounds = [(summary(asks, engine.replay(asks)), summary(bare, engine.replay(bare))) for _ in range(size.rounds)]
    found["ours beside base only"] = _median_round([distinct for distinct, _ in rounds])
    found["ours base only"] = _median_round([base for _, base in rounds])
    return found


def mixed_asks(served: ServedModel, size: Size) -> list[Ask]:
    """Return one request for each of the first adapters, all at once."""
    return batch(range(MIXED), 32, size.decode_tokens, served.vocab_size)


def decode(bench: Bench) -> dict[str, dict[str, Any]]:
    """Measure pure decoding with one adapter and prompts of 32 tokens, for each number of rows at once."""
    served, size = bench.served(1), bench.size
    engine = bench.ours(served, 1, 32 * max(size.batches))
    return {str(rows): _decode_run(engine, rows, served.vocab_size, size) for rows in size.batches}


def cold(bench: Bench) -> dict[str, Any]:
    """Measure many adapters under Zipf's law: all resident, against room for few of them in arena and host.

    Both engines get the same requests in turn, at half the rate that the resident engine can serve. Percentiles are
    over all rounds. Cold adapters come from the disk tier, to which a first visit has written them.
    """
    size, shape = bench.size, bench.subject.shape
    served = bench.served(size.zipf_adapters, S1, shape.many)
    all_bytes = int(1.2 * served.adapter_bytes * size.zipf_adapters) + shape.kv_bytes
    few_bytes = int(served.adapter_bytes * size.zipf_adapters * size.cold_share)
    resident = config(served, all_bytes, all_bytes)
    small = config(served, few_bytes + shape.kv_bytes, few_bytes)
    packed_dir = bench.work / "packed"
    firsts: dict[str, list[float]] = {"resident": [], "cold": []}
    rounds = []
    with running(served, resident, packed_dir) as warm, running(served, small, packed_dir) as tight:
        for loop in (warm, tight):
            visit_all(loop, served)
        crowd = zipf(size.zipf_adapters, size.zipf_requests // 4, size.rate, size.lengths, served.vocab_size)
        rate = summary(crowd, replay_live(warm, served, crowd))["requests_per_s"] / 2
        asks = zipf(size.zipf_adapters, size.zipf_requests, rate, size.lengths, served.vocab_size)
        for _ in range(size.zipf_rounds):
            answers = {"resident": replay_live(warm, served, asks), "cold": replay_live(tight, served, asks)}
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
    """Measure the production trace at growing load: Azure's arrivals and shrunk lengths, Alibaba's adapter uses."""
    size, shape = bench.size, bench.subject.shape
    num_adapters = min(874, max(size.counts))
    served = bench.served(num_adapters, S1, shape.many)
    engine, requests = bench.ours(served, num_adapters), read_trace(bench.kit)

    def asks(rate: float) -> list[Ask]:
        shrunk = shape.trace_shrink, shape.trace_max_tokens
        return requests.asks(size.trace_requests, num_adapters, rate, *shrunk, served.vocab_size)

    flood = asks(1e4)
    most = summary(flood, engine.replay(flood))["requests_per_s"]
    loads = {}
    for load in size.loads:
        these = asks(load * most)
        loads[str(load)] = summary(these, engine.replay(these)) | {"offered_requests_per_s": load * most}
    return {"most_requests_per_s": most, "loads": loads}


def waste(bench: Bench) -> dict[str, Any]:
    """Measure the empty share of the arena's pages in use, over all steps of S-LoRA's workload S2."""
    size = bench.size
    count = min(100, max(size.counts))
    served = bench.served(count, S2, ATTENTION)
    asks = slora(count, size.rate, size.duration_s, size.lengths, served.vocab_size)
    held, empty = 0, 0.0

    def add_up(engine: MeasuredEngine) -> None:
        nonlocal held, empty
        pages, waste = engine.memory_waste()
        held, empty = held + pages, empty + waste

    found = summary(asks, bench.ours(served, count).replay(asks, add_up))
    return {"memory_waste_fraction": empty / held, "page_tokens": PAGE_TOKENS, "run": found}


def overhead(bench: Bench) -> dict[str, float]:
    """Measure a step's overhead in milliseconds by running sequences, always with the kit's smallest model."""
    model, device = bench.kit / "models" / "stories260k", bench.subject.device
    return {str(count): median(overheads_ms(model, count, 32, 200, device)) for count in bench.size.running}


def prompts(rows: int, tokens: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Return the prompts of the decoding parts, the same for every engine."""
    draw = random.Random(0)
    return [tuple(draw.choices(range(3, vocab_size), k=tokens)) for _ in range(rows)]


def _decode_run(engine: Ours, rows: int, vocab_size: int, size: Size) -> dict[str, Any]:
    """Measure the decode rate, from the step that ends all prompts."""
    asks = [Ask(0.0, 0, prompt, size.decode_tokens) for prompt in prompts(rows, 32, vocab_size)]
    rates = []
    for _ in range(size.rounds + 1):  # the first one copies the adapter into the arena
        answers = engine.replay(asks)
        first_s = max(answer.first_s or 0.0 for answer in answers)
        rates.append(rows * (size.decode_tokens - 1) / (max(answer.end_s for answer in answers) - first_s))
    return {"tokens_per_s": median(rates[1:]), "tokens": [answer.tokens for answer in answers]}


def _median_round(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_rate = sorted(rounds, key=lambda one: float(one["tokens_per_s"]))
    return by_rate[len(by_rate) // 2] | {"tokens_per_s_of_rounds": [one["tokens_per_s"] for one in rounds]}
