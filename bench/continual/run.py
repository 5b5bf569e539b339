"""Measures class-incremental learning: `relora bench continual`.

There are two streams: the ten domains of 15 intents of CLINC150, and four data sets in turn. There are two subjects: a
pre-trained encoder with a growing classifier, and a causal LM that writes labels. `arms` has the arms and `settings`
their settings. All reported figures are on test rows.
"""

import itertools
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.facts import facts, plain, read_json, write_report

LINEAR_ARMS = ("sequential", "method_linear")
CONTROLS = ("sequential_means", "sequential_masked", "method_linear", "released_code", "oracle")
"""Arms that no target needs. They run with the first seed only."""
MAIN_ARMS = ("sequential", "method", "joint", "oracle")
CHEAPER_ARMS = ("rank_reduction", "distillation")
ARMS = {
    ("clinc150", "encoder"): ("means", *MAIN_ARMS, *CHEAPER_ARMS, *CONTROLS[:-1]),
    ("clinc150", "writer"): ("recall", *MAIN_ARMS, *CHEAPER_ARMS),
    ("mixed", "encoder"): ("means", *MAIN_ARMS, *CHEAPER_ARMS, "sequential_means"),
    ("mixed", "writer"): ("recall", *MAIN_ARMS, *CHEAPER_ARMS),
}
SUBJECTS = ("encoder", "writer")
STREAMS = ("clinc150", "mixed")
QUICK_ARMS = ("sequential", "method", *CHEAPER_ARMS, "joint")


@dataclass(frozen=True)
class Size:
    """The size of a run: rows per class (test rows by stream), steps, number of stages (None: all) and seeds."""

    train_rows: int
    test_rows: dict[str, int]
    encoder_steps: int
    writer_steps: int
    stages: int | None
    seeds: tuple[int, ...]


FULL = Size(
    train_rows=30,
    test_rows={"clinc150": 10, "mixed": 50},
    encoder_steps=24,
    writer_steps=60,
    stages=None,
    seeds=(0, 1, 2),
)
QUICK = Size(
    train_rows=10, test_rows={"clinc150": 5, "mixed": 5}, encoder_steps=8, writer_steps=20, stages=3, seeds=(0,)
)


@dataclass(frozen=True)
class Cell:
    """One arm on one stream and one subject, with one seed."""

    stream: str
    subject: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The key of the cell in the report."""
        return f"{self.stream}/{self.subject}/{self.arm}/{self.seed}"


def run(
    kit: Path,
    out: Path,
    *,
    is_quick: bool = False,
    encoder: Path | None = None,
    jobs: int = 1,
    subjects: Sequence[str] = SUBJECTS,
    streams: Sequence[str] = STREAMS,
    split: str = "test",
    console: Console,
) -> dict[str, Any]:
    """Measure the cells that `out` lacks, print the table and return the report. `out` is written after each cell."""
    size = QUICK if is_quick else FULL
    basis = _basis(size, split)
    done = _read(out, basis)
    missing = [cell for cell in _cells(size, is_quick, subjects, streams) if cell.name not in done]
    for cell, result in _measured(missing, kit, encoder, size, split, jobs):
        done[cell.name] = result
        write_report(out, {"facts": basis, "cells": done})
        console.print(f"{cell.name}: {result['accuracy_final']:.1f} after {result['seconds']:.0f} s")
    report = {"facts": basis, "arms": summarise(done), "cells": done}
    report["targets"] = targets(done)
    write_report(out, report)
    _show(report, console)
    return report


def _basis(size: Size, split: str) -> dict[str, Any]:
    """Return the facts of this run. Cells of an earlier run with the same size, settings and split are reused."""
    from bench.continual.settings import settings_for

    steps = {"encoder": size.encoder_steps, "writer": size.writer_steps}
    settings = {subject: asdict(settings_for(subject, steps[subject])) for subject in SUBJECTS}
    return facts() | plain({"size": asdict(size), "settings": settings, "split": split, "threads": 1})


def _cells(size: Size, is_quick: bool, subjects: Sequence[str], streams: Sequence[str]) -> Iterator[Cell]:
    for seed, stream, subject in itertools.product(size.seeds, streams, subjects):
        for arm in QUICK_ARMS if is_quick else ARMS[stream, subject]:
            if arm not in CONTROLS or seed == size.seeds[0]:
                yield Cell(stream, subject, arm, seed)


def _measured(
    cells: Sequence[Cell], kit: Path, encoder: Path | None, size: Size, split: str, jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(measure, cell, kit, encoder, size, split): cell for cell in cells}
        for future in as_completed(running):
            yield running[future], future.result()


def measure(cell: Cell, kit: Path, encoder: Path | None, size: Size, split: str) -> dict[str, Any]:
    """Measure one cell in this process, on one thread."""
    import torch
    from transformers.utils import logging

    from bench.continual.arms import run_arm
    from bench.continual.settings import settings_for
    from bench.continual.subjects import Head, load_stream, open_subject

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    stream = load_stream(kit, cell.stream, size.train_rows, size.test_rows[cell.stream], split)[: size.stages]
    head: Head = "linear" if cell.arm in LINEAR_ARMS else "means"
    subject = open_subject(cell.subject, kit, encoder, stream, head)
    steps = size.encoder_steps if cell.subject == "encoder" else size.writer_steps
    course = run_arm(cell.arm, subject, len(stream), settings_for(cell.subject, steps), cell.seed)
    return {
        **course.scores([len(task.test) for task in stream]),
        "parameters": course.parameters,
        "seconds": course.seconds,
        "directions": course.directions,
        "moments": course.moments,
        "matrix": course.matrix,
    }


def summarise(done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return means over seeds by "stream/subject/arm", the spread of the final accuracy, and the number of seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in done.items():
        groups.setdefault(name.rpartition("/")[0], []).append(result)
    return {name: _mean(results) for name, results in sorted(groups.items())}


def _mean(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key, value in results[0].items() if isinstance(value, int | float)]
    means: dict[str, Any] = {key: statistics.fmean(result[key] for result in results) for key in numbers}
    finals = [result["accuracy_final"] for result in results]
    return {**means, "accuracy_final_spread": max(finals) - min(finals), "seeds": len(results)}


def targets(done: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the differences that have targets, in points, by "stream/subject", and shares of parameters.

    Two arms are compared on the seeds that both have.
    """
    places: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for name, result in done.items():
        place, arm, seed = name.rsplit("/", 2)
        places.setdefault(place, {}).setdefault(arm, {})[seed] = result
    return {place: dict(_differences(at)) for place, at in sorted(places.items())}


def _differences(at: dict[str, dict[str, dict[str, Any]]]) -> Iterator[tuple[str, float]]:
    for ours, prefix in (("method", ""), ("recall", "recall_")):
        for other in ("sequential", "sequential_means", "sequential_masked", "means"):
            yield from _difference(f"{prefix}above_{other}", at, ours, other)
        yield from _difference(f"{prefix}below_joint", at, "joint", ours)
    for arm in CHEAPER_ARMS:
        yield from _difference(f"{arm}_below_method", at, "method", arm)
        if arm in at and "method" in at:
            one, whole = (next(iter(at[name].values()))["parameters"] for name in (arm, "method"))
            yield f"{arm}_share_of_parameters", one / whole


def _difference(
    key: str, at: dict[str, dict[str, dict[str, Any]]], more: str, less: str
) -> Iterator[tuple[str, float]]:
    """Yield the mean final accuracy of one arm minus another's, if they share a seed."""
    seeds = at.get(more, {}).keys() & at.get(less, {}).keys()
    if seeds:
        gaps = [at[more][seed]["accuracy_final"] - at[less][seed]["accuracy_final"] for seed in seeds]
        yield key, statistics.fmean(gaps)


def _read(out: Path, basis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cells of an earlier run with the same size, settings and split."""
    report = read_json(out)
    is_same = all(report.get("facts", {}).get(key) == basis[key] for key in ("size", "settings", "split"))
    return dict(report["cells"]) if is_same else {}


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table("stream, subject, arm", "final", "average", "forgetting", "parameters", "train s")
    for name, arm in report["arms"].items():
        points = [f"{arm[key]:.1f}" for key in ("accuracy_final", "accuracy_average", "forgetting")]
        table.add_row(name, *points, f"{arm['parameters']:,.0f}", f"{arm['seconds']:.0f}")
    console.print(table)
    for place, values in report["targets"].items():
        console.print(f"{place}: " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
