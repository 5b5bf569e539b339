"""`relora bench extract`: how fast, how near to optimal and how frugal extraction is, and what it is worth when served.

Four parts: the truncated SVD against the full one (`svd`), peak memory (`memory`), a real model fully fine-tuned
for a task, extracted and served (`tuned`), and other extractors side by side (`rivals`).
The headline figures are the worst of their part: the slowest spectrum, the largest gap, the hungrier of the two ways.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.extract import memory, rivals, svd, tuned
from bench.extract.tuned import DEFAULT_ENERGY, Recipe
from bench.facts import facts, plain, read_json, write_report

TARGETS = {
    "speedup_vs_full_svd": ">= 8",
    "energy_gap": "<= 0.005",
    "peak_rss_over_largest_tensor": "<= 6",
    "served_quality_lost": "<= 1 point",
}


@dataclass(frozen=True)
class Size:
    """The sizes of all measurements."""

    svd_side: int = 4096
    svd_rank: int = 64
    repeats: int = 3
    memory_side: int = 4096
    rival_hidden: int = 2048
    tasks: tuple[str, ...] = ("snips", "trec")
    steps: int = 300


QUICK = Size(1280, 16, 1, 1024, 256, ("snips",), 60)


def run(kit: Path, out: Path, is_quick: bool, mergekit: Path | None, console: Console) -> dict[str, Any]:
    """Measure everything, write the JSON file and print the table. `mergekit` is a `mergekit-extract-lora` executable.

    The file is written after each part. Parts that it already has at the same size are not measured again.
    """
    size = QUICK if is_quick else Size()
    work = out.parent / f"{out.stem}.work"
    work.mkdir(parents=True, exist_ok=True)
    report, say = _earlier(out, size), console.print
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "svd": lambda: svd.measure(size.svd_side, size.svd_rank, size.repeats, say),
        "memory": lambda: _memory(work, size),
        "tasks": lambda: {t: tuned.measure(kit, work, Recipe(t, size.steps), console.print) for t in size.tasks},
        "rivals": lambda: _rivals(kit, work, size, mergekit, console),
    }
    for name, measure in parts.items():
        if name not in report:
            report[name] = measure()
            write_report(out, report)
    report = _headline(report) | report
    write_report(out, report)
    _show(report, console)
    return report


def _earlier(out: Path, size: Size) -> dict[str, Any]:
    """Return the report in the file if it has the same size, or else a new one."""
    found = read_json(out)
    is_same = found.get("facts", {}).get("size") == plain(vars(size))
    return found if is_same else {"facts": _facts(size)}


def _memory(work: Path, size: Size) -> dict[str, Any]:
    pair = memory.write_pair(work / "memory", size.memory_side)
    found = {}
    for name, rank in (("rank 64, randomised", 64), ("energy 0.95, exact", 0)):
        shutil.rmtree(work / "memory" / "out", ignore_errors=True)
        found[name] = memory.measure(*pair, work / "memory" / "out", rank)
    shutil.rmtree(work / "memory")
    return found


def _rivals(kit: Path, work: Path, size: Size, mergekit: Path | None, console: Console) -> dict[str, Any]:
    wide = rivals.write_wide_pair(work / "wide", size.rival_hidden)
    found: dict[str, Any] = {"wide": rivals.measure(*wide, work / "wide", size.svd_rank, mergekit, console.print)}
    shutil.rmtree(work / "wide")
    task, base = size.tasks[0], kit / "models" / "stories3m-v1"
    place, tuned = work / f"rivals-{task}", work / f"tuned-{task}"
    place.mkdir(exist_ok=True)
    found[task] = rivals.measure(base, tuned, place, 32, mergekit, console.print)
    adapters = {name: place / name for name, one in found[task].items() if "not_run" not in one}
    for name, alike in rivals.likeness(base, tuned, adapters, work / f"test-{task}.jsonl").items():
        found[task][name] |= alike
    return found


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    rule = f"energy-{DEFAULT_ENERGY:g}"
    tasks, spectra = report["tasks"].values(), report["svd"].values()
    return {
        "speedup_vs_full_svd": min(case["speedup"] for case in spectra),
        "speedup_vs_full_svd_best": max(case["speedup"] for case in spectra),
        "energy_gap": max(case["energy_gap"] for case in spectra),
        "peak_rss_over_largest_tensor": max(m["peak_rss_over_largest_tensor"] for m in report["memory"].values()),
        "kl_to_tuned": max(task["verify"]["adapters"][rule]["kl"] for task in tasks),
        "top1_agreement": min(task["verify"]["adapters"][rule]["top1_agreement"] for task in tasks),
        "served_quality_lost": max(task["tuned"] - task["adapters"][rule]["quality"] for task in tasks),
        "targets": TARGETS,
    }


def _facts(size: Size) -> dict[str, Any]:
    definitions = [module.__doc__ for module in (svd, memory, tuned, rivals)]
    return facts(("torch", "transformers", "safetensors")) | {"size": vars(size), "definitions": definitions}


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table("figure", "measured", "target", title="extraction")
    for key in ("speedup_vs_full_svd", "energy_gap", "peak_rss_over_largest_tensor", "kl_to_tuned", "top1_agreement"):
        table.add_row(key, f"{report[key]:.4g}", TARGETS.get(key, ""))
    for name, task in report["tasks"].items():
        found = task["adapters"][f"energy-{DEFAULT_ENERGY:g}"]
        row = f"{found['quality']:.1f} % at rank {found['rank_min']}..{found['rank_max']}"
        table.add_row(f"{name}, served", row, f"{task['tuned']:.1f} % (tuned) - 1")
    console.print(table)
