"""The fault run: many requests to a small model while everything that can go wrong does, and a check of every answer.

    relora bench chaos --kit DIR [--requests 100000] [--seed 0] [--out FILE.json]

The real engine runs on its thread with its loader threads. Adapters of every kind are files, and clients run on an
event loop, in waves (see `events`). The run checks:

- every token against Hugging Face and PEFT with the adapter that the request started with,
- every admission against the bound on waiting of `serving.engine.waiting`,
- every error against the causes that it may have,
- and after each wave, that all memory is free again.
"""

import asyncio
import gc
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.facts import facts, write_report
from bench.serving.chaos.clients import Clients
from bench.serving.chaos.engines import Engines
from bench.serving.chaos.events import WAVES, Wave, draw_events
from bench.serving.chaos.tally import Tally
from bench.serving.chaos.world import World, describe, make_world
from cluster.config.settings import MIB

MODEL = "stories260k"
_MOST_ADAPTERS, _LEAST_ADAPTERS = 200, 11
_MOST_PROMPTS, _LEAST_PROMPTS = 64, 12


def run_chaos(kit: Path | None, num_requests: int, seed: int, out: Path | None = None) -> dict[str, Any]:
    """Run all waves and return the records. Without a kit, the base has random weights."""
    started_at = time.perf_counter()
    torch.set_num_threads(1)
    num_adapters = min(max(num_requests // 250, _LEAST_ADAPTERS), _MOST_ADAPTERS)
    num_prompts = min(max(num_requests // 250, _LEAST_PROMPTS), _MOST_PROMPTS)
    base = None if kit is None else kit / "models" / MODEL
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        world = make_world(Path(folder), base, num_adapters, num_prompts, seed)
        world_s = time.perf_counter() - started_at
        tally, waves = Tally(world), []
        for wave, size in zip(WAVES, _sizes(num_requests), strict=True):
            waves.append(_run_wave(world, wave, size, seed, tally))
        records = _records(tally, waves) | {"world": describe(world) | {"seconds": round(world_s, 1)}}
    records |= {"seed": seed, "seconds": round(time.perf_counter() - started_at, 1), "facts": facts()}
    if out is not None:
        write_report(out, records)
    return records


def is_clean(records: dict[str, Any]) -> bool:
    """Whether the records show nothing that must never happen."""
    outcomes = records["requests_by_outcome"]
    counts = (records["wrong_adapter_tokens"], records["max_wait_bound_violations"], outcomes.get("hung", 0))
    return not any(counts) and not records["unexplained"]


def _sizes(num_requests: int) -> list[int]:
    """Return the number of requests of each wave; the first gets the rounding remainder."""
    sizes = [int(num_requests * wave.share) for wave in WAVES]
    return [sizes[0] + num_requests - sum(sizes), *sizes[1:]]


def _run_wave(world: World, wave: Wave, num_requests: int, seed: int, tally: Tally) -> dict[str, Any]:
    before, started_at, switch_s = tally.num_tokens, time.perf_counter(), sys.getswitchinterval()
    sys.setswitchinterval(wave.switch_s)
    try:
        engines = asyncio.run(_play(world, wave, num_requests, seed, tally))
    finally:
        sys.setswitchinterval(switch_s)
    gc.collect()  # tracebacks keep engines that have died in memory
    return {
        "wave": wave.name,
        "requests": num_requests,
        "seconds": round(time.perf_counter() - started_at, 1),
        "tokens_checked": tally.num_tokens - before,
        "rss_mib": round(psutil.Process().memory_info().rss / MIB, 1),
        "longest_wait_share_of_bound": round(engines.longest_share, 3),
        **engines.totals,
    }


async def _play(world: World, wave: Wave, num_requests: int, seed: int, tally: Tally) -> Engines:
    return await Clients(world, wave, tally).play(draw_events(world, wave, num_requests, seed))


def _records(tally: Tally, waves: list[dict[str, Any]]) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    for wave in waves:
        totals.update({key: wave[key] for key in ("max_wait_bound_violations", "integrity_checks", "admissions")})
    return {
        "requests": sum(wave["requests"] for wave in waves),
        **tally.verdict(),
        "max_wait_bound_violations": totals["max_wait_bound_violations"],
        "requests_by_outcome": dict(tally.outcomes.most_common()),
        "unexplained": dict(tally.unexplained),
        "tokens_checked": tally.num_tokens,
        "admissions": totals["admissions"],
        "integrity_checks": totals["integrity_checks"],
        "resumed_on_another_engine": tally.num_resumed,
        "faults_injected": dict(sorted(tally.faults.items())),
        "waves": waves,
    }
