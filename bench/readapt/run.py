"""`relora bench readapt`: how soon adapters are ready on a new base, and how good they are, for seven methods.

Runs updates x tasks x seeds x arms on real rows (see `updates`, `specialists`, `arms`, `cells`) and writes the figures
of `figures` and all records. Updates, specialists and records are kept in a work folder, so a second call resumes where
the first one stopped.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.facts import facts, write_report
from bench.readapt import arms, cells, figures
from bench.readapt.arms import ARM_SETTINGS, climb
from bench.readapt.cells import TUNED, Unit, run_unit
from bench.readapt.figures import all_figures, details
from bench.readapt.plots import plot_all
from bench.readapt.records import Journal, Record, forget
from bench.readapt.training_group import group_speedup
from bench.readapt.updates import RECIPES, Update, UpdateFacts, control, make_update, old_base, relative_change
from bench.readapt.workers import free_cores, run_on
from bench.specialists import TASKS, BenchTask, make_specialist, write_bench_task

PACKAGES = ("torch", "transformers", "hyperopt", "sacrebleu", "numpy")
SECONDS_PER_CHAR = 1.2e-4  # of training text, everything included, on one core of the reference machine
READY_SHARE = 0.4  # of the budget; typical of a run that becomes ready
TABLE_ARMS = ("zero_shot", "copy", "copy_ft", "paper", "ours", "data_free", "scratch")


@dataclass(frozen=True)
class Scope:
    """What to run: updates (without the control), tasks, the control's tasks, and seeds."""

    updates: tuple[str, ...] = tuple(recipe.name for recipe in RECIPES)
    tasks: tuple[str, ...] = tuple(task.name for task in TASKS)
    control_tasks: tuple[str, ...] = ("snips", "trec")
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Scope()
QUICK = Scope(("mild",), ("snips", "trec"), ("snips",), (0,))


@dataclass(frozen=True)
class Settings:
    """Folders, the number of workers (None: one per core), and the arms whose earlier records are dropped."""

    kit: Path
    out: Path
    work: Path
    scope: Scope
    jobs: int | None = None
    redo: tuple[str, ...] = ()


def run_bench(settings: Settings, console: Console) -> dict[str, Any]:
    """Run what is missing, write the JSON file and the plots beside it, print the table; return the figures."""
    started = time.perf_counter()
    forget(settings.work / "records", settings.redo)
    cores = free_cores(settings.jobs)
    console.print(f"on {len(cores)} cores; making missing updates and specialists first")
    updates = _prepare(settings, cores)
    units = sorted(_units(settings), key=_cost, reverse=True)
    console.print(
        f"{len(units)} update x task units of {len(settings.scope.seeds)} seeds; {_estimate(units, len(cores))}"
    )
    [(_, grouped)] = run_on(cores[:1], [(_grouped, (old_base(settings.kit),))])
    found: dict[str, Any] = {}
    for num_seeds in range(1, len(settings.scope.seeds) + 1):  # a complete report after each seed
        some = [replace(unit, seeds=unit.seeds[:num_seeds]) for unit in units]
        records = [record for _, made in run_on(cores, [(_run, (unit,)) for unit in some]) for record in made]
        how = {
            "updates": [asdict(u) for u in updates],
            "training_group": grouped,
            "how": _how(settings, cores, started),
        }
        found = write_figures(settings, records, how, grouped["packed_training_speedup"], console)
    return found


def write_figures(
    settings: Settings,
    records: Sequence[Record],
    how: dict[str, Any],
    packed_training_speedup: float | None,
    console: Console,
) -> dict[str, Any]:
    """Write the JSON file (figures, `how`, all records) and the plots; return the figures."""
    found = all_figures(records, packed_training_speedup)
    report = found | details(records) | how | {"records": [asdict(record) for record in records]}
    write_report(settings.out, report, indent=None)
    _show(records, found, settings.out, console)
    return found


def _prepare(settings: Settings, cores: Sequence[int]) -> list[UpdateFacts]:
    """Make missing updates and specialists; return what the updates did."""
    kit, work, scope = settings.kit, settings.work, settings.scope
    recipes = [recipe for recipe in RECIPES if recipe.name in scope.updates]
    updates = [(make_update, (recipe, kit, _folder(work, recipe.name))) for recipe in reversed(recipes)]
    tasks = [(old_base(kit), name) for name in scope.tasks] + [(control(kit).old, n) for n in scope.control_tasks]
    specialists = [
        (make_specialist, (_task(name), seed, base, kit, work)) for seed in scope.seeds for base, name in tasks
    ]
    rows = [(write_bench_task, (_task(name), kit, base, work)) for base, name in tasks]
    made = dict(run_on(cores, [*updates, *specialists, *rows]))
    independent = UpdateFacts("control", relative_change(control(kit).old, control(kit).new), {}, {}, 0, 0.0)
    return [*(made[index][1] for index in range(len(updates))), *([independent] if scope.control_tasks else [])]


def _units(settings: Settings) -> list[Unit]:
    kit, work, scope = settings.kit, settings.work, settings.scope
    updates = [Update(name, old_base(kit), _folder(work, name)) for name in scope.updates]
    pairs = [(update, name) for update in updates for name in scope.tasks]
    pairs += [(control(kit), name) for name in scope.control_tasks]
    return [Unit(update, _task(name), scope.seeds, kit, work) for update, name in pairs]


def _grouped(base: Path) -> dict[str, Any]:
    return group_speedup(base, device=_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(unit: Unit) -> list[Record]:
    return run_unit(unit, climb, say=lambda line: print(line, flush=True))


def _task(name: str) -> BenchTask:
    return next(task for task in TASKS if task.name == name)


def _folder(work: Path, update: str) -> Path:
    return work / "updates" / update


def _cost(unit: Unit) -> float:
    """Return the characters that one arm trains on at its full budget. Units run in falling order of it."""
    rows = (unit.kit / "tasks" / unit.task.name / "valid.jsonl").read_text().splitlines()
    return unit.task.steps * unit.task.batch_rows * sum(map(len, rows)) / len(rows)


def _estimate(units: Sequence[Unit], num_workers: int) -> str:
    """Return a rough forecast from the number of runs, for the reference machine of docs/results.md."""
    seconds = sum(_cost(unit) * SECONDS_PER_CHAR * _budgets_left(unit) for unit in units)
    return f"about {seconds / num_workers / 60:.0f} minutes if the workers finish together"


def _budgets_left(unit: Unit) -> float:
    """Return how many full-budget runs are left; a run up to readiness counts as `READY_SHARE` of one."""
    num_rates, num_more = len(ARM_SETTINGS["scratch"].learning_rates), len(unit.seeds) - 1
    scratch = num_rates + num_more + READY_SHARE * len(unit.seeds)
    tuned = len(TUNED) * (1 + READY_SHARE * (num_rates + num_more)) + num_more
    num_records = num_rates * (1 + len(TUNED)) + len(unit.seeds) * (5 + len(TUNED))  # about
    return (scratch + tuned) * max(0.0, 1 - len(Journal(unit.journal)) / num_records)


def _how(settings: Settings, cores: Sequence[int], started: float) -> dict[str, Any]:
    """Return how this was measured: machine, scope, settings and definitions."""
    return {
        "facts": facts(PACKAGES, _device()),
        "workers_one_thread_each": len(cores),
        "wall_clock_of_this_call_s": round(time.perf_counter() - started, 1),
        "scope": asdict(settings.scope),
        "tasks": [asdict(task) for task in TASKS if task.name in settings.scope.tasks],
        "arms": {arm: asdict(arm_settings) for arm, arm_settings in ARM_SETTINGS.items()},
        "definitions": {"time_to_readiness": arms.__doc__, "figures": figures.__doc__, "runs": cells.__doc__},
    }


def _show(records: Sequence[Record], found: dict[str, Any], out: Path, console: Console) -> None:
    table = Table(*("update, task", *TABLE_ARMS), title="median seconds to readiness (ready/runs), test quality")
    for name, summary in details(records)["by_update_and_task"].items():
        table.add_row(name, *(_cell_text(summary["arms"].get(arm)) for arm in TABLE_ARMS))
    console.print(table)
    for name, figure in found.items():
        console.print(f"{name}: {figure if figure is None else round(figure, 3)}")
    for path in (out, *plot_all(records, out.parent / f"{out.stem}_plots")):
        console.print(f"wrote {path}")


def _cell_text(arm: dict[str, Any] | None) -> str:
    if arm is None:
        return ""
    seconds, quality = arm["ttr_s_median_of_ready"], f"{arm['test_quality_at_the_end']:.1f}"
    return quality if seconds is None else f"{seconds:.1f} s ({arm['ready']}/{arm['runs']}) {quality}"
