"""The `relora` command line: it parses arguments, calls the packages and prints; the decisions are theirs."""

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import bench.cli
import cli.care
import cli.steer
import cli.versions
from cli.interrupts import Interruptible
from cli.output import FleetPath, console, print_line, say
from cluster.errors import ReloraError
from cluster.extras import EXTRAS, optional_imports
from cluster.progress import Counted

if TYPE_CHECKING:
    from readapt.extraction.extract import Spread
    from upgrade import UpgradeResult

app = typer.Typer(
    cls=Interruptible,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Keeps LoRA adapters working while the base model under them changes.",
)
app.add_typer(bench.cli.app, name="bench")
for group in (cli.versions, cli.steer, cli.care):
    group.add_to(app)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="run a smaller example, in a few minutes")] = False,
    folder: Annotated[Path, typer.Option("--dir", help="folder for the example fleet and the report")] = Path(
        ".relora/demo"
    ),
    kit: Annotated[
        Path | None, typer.Option(help="folder of real models and tasks to use instead", exists=True, file_okay=False)
    ] = None,
    tasks: Annotated[str, typer.Option(help="with --kit: its tasks, separated by commas")] = "snips,trec,subjectivity",
) -> None:
    """Upgrade the base model of a small fleet on this machine under traffic; print a table and write report.html."""
    from demo.run import run_demo

    outcome = run_demo(
        folder.resolve(), is_quick=quick, kit=kit and kit.resolve(), tasks=tasks.split(","), console=console
    )
    if outcome.traffic.failed or outcome.traffic.wrong or not all(a.is_restored for a in outcome.adapters):
        raise typer.Exit(1)


@app.command()
def register(fleet: FleetPath) -> None:
    """Check every adapter of the fleet file and its data, and register it as version 1, live on its base."""
    from cluster.config.fleet_file import load_fleet
    from cluster.fleet import open_fleet
    from readapt.ladder.relabel import check_rows

    loaded = load_fleet(fleet)
    for spec in loaded.adapters:
        check_rows(spec.data)
    opened = open_fleet(loaded, say)
    new = {version.id for version in opened.new_versions}
    routes = opened.registry.routes()
    for spec in loaded.adapters:
        if spec.name not in routes:
            console.print(f"{spec.name} is already registered; none of its versions is live")
            continue
        live = routes[spec.name].live
        console.print(f"{live.label} is {'' if live.id in new else 'already '}live on {live.base}")
        for warning in live.warnings:
            print_line(f"{live.label}: warning: {warning}")


@app.command()
def serve(
    fleet: Annotated[Path | None, typer.Argument(help="path to fleet.toml", exists=True, dir_okay=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="checkpoint folder, bucket URL or cached hub id to serve without a fleet file")
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="base model to start an engine for (repeatable); default: those with live adapters"),
    ] = None,
    detach: Annotated[bool, typer.Option(help="return once it answers; needs a running cluster")] = False,
) -> None:
    """Serve the fleet over HTTP on the running Ray cluster, or on one that is started here and stopped with Ctrl-C."""
    import serving.on_ray
    from cluster.config.fleet_file import load_fleet, model_fleet_file
    from cluster.fleet import bases_to_serve, open_fleet
    from cluster.on_ray import join_or_start

    if (fleet is None) == (model is None):
        raise typer.BadParameter("give either the path of a fleet file or --model with a checkpoint")
    if model is not None:
        fleet = model_fleet_file(model, Path(".relora"))
        print_line(f"the fleet file is {fleet}: change its settings there")
    assert fleet is not None, "one of the two is given"
    loaded = load_fleet(fleet)
    for name in base or []:
        loaded.base(name)  # report an unknown name before anything starts
    bases = bases_to_serve(open_fleet(loaded), base or [])
    with join_or_start(may_start=not detach) as started:
        submit = "ray job submit"
        if started is not None:
            submit += f" --address {started.dashboard_url}"
            console.print(f"no Ray cluster is running; started one here, dashboard {started.dashboard_url}")
        serving.on_ray.deploy(loaded, bases)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # so that a cluster started here is stopped
        console.print(f"serving {', '.join(bases)} at http://{loaded.serving.host}:{loaded.serving.port}/v1")
        for spec in loaded.bases:
            if spec.name not in bases:
                print_line(f"to move to {spec.name}: {submit} -- relora upgrade {fleet.resolve()} --to {spec.name}")
        while not detach:
            time.sleep(1.0)


@app.command()
def assess(
    fleet: FleetPath,
    to: Annotated[str, typer.Option(help="name of the new base model in the fleet file")],
    out: Annotated[Path | None, typer.Option(help="also write the result as JSON to this file", dir_okay=False)] = None,
) -> None:
    """Predict how each adapter will fare on a new base model, before any training; needs no cluster."""
    from cluster.config.fleet_file import load_fleet
    from cluster.fleet import open_fleet
    from readapt.campaign.assess import LEGEND, Assessor, as_json, as_table

    loaded = load_fleet(fleet)
    loaded.base(to)  # report an unknown name before anything starts
    opened = open_fleet(loaded, say)
    assessments = Assessor(loaded, opened.registry, opened.blobs, to, say).assess_all()
    console.print(as_table(assessments, to))
    print_line(LEGEND)
    if out is not None:
        out.write_text(as_json(assessments, to))
    failed = [assessment for assessment in assessments if assessment.error is not None]
    for assessment in failed:
        print_line(f"{assessment.version}: {assessment.error}")
    if failed:
        raise typer.Exit(1)


@app.command()
def upgrade(
    fleet: FleetPath,
    to: Annotated[str, typer.Option(help="name of the new base model in the fleet file")],
    rollout: Annotated[bool, typer.Option(help="also move the traffic; without, stop at candidates")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="assess and print the plan; needs no cluster")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run: print JSON")] = False,
) -> None:
    """Carry every adapter of a served fleet over to a new base model, and move its traffic as soon as it is ready."""
    from cli.plan import print_plan
    from cluster.config.fleet_file import load_fleet
    from cluster.fleet import open_fleet
    from cluster.on_ray import join
    from cluster.storage.checkpoints import open_checkpoint
    from upgrade import make_candidates, upgrade_fleet

    loaded = load_fleet(fleet)
    open_checkpoint(loaded.base(to).path)  # report an unknown name or a missing folder before anything starts
    if dry_run:
        print_plan(open_fleet(loaded), to, as_json)
        return
    opened = open_fleet(loaded, say)
    join()
    _print_result(upgrade_fleet(opened, to, say) if rollout else make_candidates(opened, to, say))


@app.command()
def rollout(
    fleet: FleetPath,
    base: Annotated[str | None, typer.Option(help="move only candidates on this base model")] = None,
) -> None:
    """Move the traffic of a served fleet to its waiting candidates, one canary per adapter at a time."""
    from cluster.config.fleet_file import load_fleet
    from cluster.fleet import open_registry
    from cluster.on_ray import join
    from upgrade import roll_out

    loaded = load_fleet(fleet)
    registry = open_registry(loaded)
    if loaded.rollout.traffic == "gateway":  # otherwise a rollout talks to the servers alone
        join()
    _print_result(roll_out(loaded, registry, base, say))


@app.command()
def extract(
    base: Annotated[Path, typer.Option(help="checkpoint before fine-tuning", exists=True, file_okay=False)],
    tuned: Annotated[Path, typer.Option(help="checkpoint after full fine-tuning", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="new folder for adapter and report; one subfolder per rule if several")],
    rank: Annotated[list[int] | None, typer.Option(help="a fixed rank (repeatable)")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="smallest rank that keeps this share of the energy; default without rules: 0.95"),
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="rank at the knee of the energy curve")] = False,
    budget: Annotated[int | None, typer.Option(help="total parameters, spent where they keep most energy")] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(help="upper limit of every rank; default: 128, the most that an engine serves by default", min=1),
    ] = None,
    include: Annotated[str | None, typer.Option(help="only tensors whose name matches this expression")] = None,
    exclude: Annotated[str | None, typer.Option(help="no tensors whose name matches this expression")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="data type of the stored factors")
    ] = "float32",
    verify: Annotated[
        Path | None, typer.Option(help="JSONL rows on which to compare the result with the tuned model")
    ] = None,
    on_ray: Annotated[bool, typer.Option("--on-ray", help="spread the work over the running Ray cluster")] = False,
) -> None:
    """Turn full fine-tuning into a LoRA adapter by truncated SVD of tuned - base, tensor by tensor; write a report."""
    from cluster.config.settings import ServingConfig
    from cluster.storage.checkpoints import open_checkpoint
    from readapt.extraction import extract as extraction
    from readapt.extraction.report import PLOT, adapters_table, read_report, warnings_of
    from readapt.extraction.verify import read_rows, verify_into_report
    from readapt.lowrank.spectra import rules_of

    rules = rules_of(rank or [], energy, knee, budget)
    settings = extraction.Settings(rules, max_rank or ServingConfig().max_rank, include, exclude, dtype=dtype)
    if verify is not None:
        read_rows(verify)  # report bad rows before the work starts
    checkpoints = open_checkpoint(base.resolve()), open_checkpoint(tuned.resolve())
    counted = Counted("tensor", say, every_s=5.0)
    spread = _spread() if on_ray else None
    done = extraction.extract(*checkpoints, out.resolve(), settings, spread, counted.update)
    if verify is not None:
        verify_into_report(done, base, tuned, verify)
    written = read_report(done.folder)
    console.print(adapters_table(written))
    for warning in warnings_of(written):
        print_line(f"warning: {warning}")
    if not (done.folder / PLOT).exists():
        print_line(f"{PLOT} was not drawn: it needs matplotlib (pip install 'relora[{EXTRAS['matplotlib']}]')")


def _spread() -> "Spread":
    """Join the running cluster and return the function that spreads extraction over it."""
    import readapt.on_ray
    from cluster.on_ray import join

    join()
    return readapt.on_ray.spread


@app.command()
def continual(
    fleet: FleetPath,
    adapter: Annotated[str, typer.Argument(help="the adapter that learns new classes")],
    data: Annotated[Path, typer.Option(help="folder with train.jsonl and valid.jsonl of only the new classes")],
    stage: Annotated[str, typer.Option(help="name of this learning stage")],
    parent: Annotated[
        int | None, typer.Option(help="number of the version to continue from; default: the live one")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="cut the folded adapter to this rank", min=1)] = None,
    direction_rank: Annotated[
        int | None,
        typer.Option(help="rank of the direction that this stage trains; default: recall 32, else 10", min=1),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps; default: recall 800, else 200", min=1)] = None,
    learning_rate: Annotated[float, typer.Option(help="learning rate of that direction", min=1e-8)] = 3e-3,
    kind: Annotated[
        Literal["recall", "contrast", "paper", "distil", "code"],
        typer.Option(
            "--method",
            help="class statistics (recall), contrast, or SD-LoRA as in its paper, distilled, or in its code",
        ),
    ] = "recall",
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
) -> None:
    """Teach an adapter new classes from their rows alone; reject the new version if it forgot old classes."""
    from cluster.config.fleet_file import load_fleet
    from cluster.fleet import open_fleet
    from cluster.registry.registry import Status
    from readapt.continual.learn import method_of
    from readapt.continual.stage import NextStage, add_stage

    opened = open_fleet(load_fleet(fleet), say)
    wanted = NextStage(adapter, stage, data.resolve(), parent, rank, seed)
    method = method_of(kind, steps, learning_rate, direction_rank)
    version = add_stage(opened.config, opened.registry, opened.blobs, wanted, method, say)
    points = ", ".join(f"{name} {value:.1f}" for name, value in version.details["accuracy_by_stage"].items())
    print_line(f"{version.label}: {version.status} on {version.base}, rank {version.details['rank']}: {points}")
    if version.status is Status.REJECTED:
        print_line(f"it does not go live: {version.setback}")
        raise typer.Exit(1)
    print_line(f"`relora rollout {fleet}` moves its traffic")


def _print_result(result: "UpgradeResult") -> None:
    """Print how the versions ended; exit with code 1 if a person should look at them."""
    console.print(f"done: {result}")
    if result.needs_attention:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; print a ReloraError as one line instead of a traceback."""
    try:
        with optional_imports():
            app(prog_name="relora")
    except ReloraError as error:
        # No markup: messages contain brackets, such as adapters[0].base. No wrapping: logs are searched by line.
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
