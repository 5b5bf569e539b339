"""`relora upgrade --dry-run`: what an upgrade would do, in which order, without doing it."""

from dataclasses import dataclass

from rich.table import Table

from cli.output import console, print_json, print_line
from cluster.fleet import OpenFleet
from cluster.progress import duration
from cluster.registry.records import Status


@dataclass(frozen=True)
class Step:
    """One adapter of the plan. `note` says why an upgrade would leave it alone, or why nothing can be predicted."""

    version: str
    traffic: float
    rung: str
    expected_s: float | None
    note: str | None


def plan(opened: OpenFleet, to: str) -> list[Step]:
    """Return the adapters that are live on other bases, first those that an upgrade would take first."""
    from readapt.campaign.assess import Assessor  # imported here because it loads torch

    registry = opened.registry
    steps = []
    for found in Assessor(opened.config, registry, opened.blobs, to, lambda line: None).assess_all():
        live = registry.routes()[found.version.rpartition("@")[0]].live
        made = [v for v in registry.versions(adapter=live.adapter, base=to) if v.parent_id == live.id]
        note = found.error
        if live.adapter in registry.paused():
            note = "paused: `relora resume` first"
        elif made and made[0].status not in (Status.PLANNED, Status.ADAPTING, Status.FAILED):
            note = f"{made[0].label} is {made[0].status} already"
        steps.append(Step(found.version, found.traffic, found.rung, found.expected_s, note))
    return sorted(steps, key=lambda step: (step.note is not None, -step.traffic / max(step.expected_s or 1.0, 1e-9)))


def print_plan(opened: OpenFleet, to: str, as_json: bool) -> None:
    """Print the plan, and how long one worker would take."""
    steps = plan(opened, to)
    if as_json:
        print_json({"to": to, "steps": [vars(step) for step in steps]})
        return
    table = Table("version", "traffic", "predicted rung", "seconds", "note", title=f"upgrade to {to}")
    for step in steps:
        seconds = "" if step.expected_s is None else f"{step.expected_s:.1f}"
        table.add_row(step.version, f"{step.traffic:g}", step.rung, seconds, step.note or "")
    console.print(table, markup=False)
    todo = [step for step in steps if step.note is None]
    total_s = sum(step.expected_s or 0.0 for step in todo)
    num_workers = opened.config.readapt.workers.num_workers
    print_line(
        f"{len(todo)} adapters, about {duration(total_s / num_workers)} with {num_workers} workers; "
        "nothing was carried over"
    )
