"""The one door: the `relora` command line. It composes the packages and decides nothing."""

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bench.cli
from cluster.errors import ReloraError, StorageError

if TYPE_CHECKING:
    from cluster.registry import Registry, Version
    from cluster.rollout import Rollout
    from readapt.extraction.extract import Spread

FleetPath = Annotated[Path, typer.Argument(help="fleet.toml", exists=True, dir_okay=False)]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Keeps LoRA adapters alive while the base model under them changes.",
)
app.add_typer(bench.cli.app, name="bench")
console = Console(width=None if sys.stdout.isatty() else 150)  # a log has room for the table


@app.command()
def demo(
    quick: Annotated[bool, typer.Option(help="a smaller world, under two minutes")] = False,
    folder: Annotated[Path, typer.Option("--dir", help="where the world and the report go")] = Path(".relora/demo"),
    kit: Annotated[
        Path | None, typer.Option(help="folder of real models and tasks to use instead", exists=True, file_okay=False)
    ] = None,
    tasks: Annotated[str, typer.Option(help="with --kit: its tasks, by commas")] = "snips,trec,subjectivity",
) -> None:
    """A fleet survives a base-model upgrade, on this machine, under load: table and report.html."""
    from demo.run import run_demo

    outcome = run_demo(
        folder.resolve(), is_quick=quick, kit=kit and kit.resolve(), tasks=tasks.split(","), console=console
    )
    if outcome.traffic.failed or outcome.traffic.wrong or not all(a.is_restored for a in outcome.adapters):
        raise typer.Exit(1)


@app.command()
def register(fleet: FleetPath) -> None:
    """Checks every adapter of the fleet file and its rows, and makes it known as version 1, live on its base."""
    from cluster.config import load_fleet
    from cluster.fleet import open_blobs, open_registry, register_adapters
    from readapt.ladder.relabel import check_rows

    loaded = load_fleet(fleet)
    for spec in loaded.adapters:
        check_rows(spec.data)
    registry = open_registry(loaded)
    new = {version.id for version in register_adapters(loaded, registry, open_blobs(loaded))}
    routes = registry.routes()
    for spec in loaded.adapters:
        if spec.name not in routes:
            console.print(f"{spec.name} is registered already; none of its versions is live")
            continue
        live = routes[spec.name].live
        console.print(f"{live.label} is live on {live.base}{'' if live.id in new else ' already'}")


@app.command()
def serve(
    fleet: FleetPath,
    base: Annotated[
        list[str] | None, typer.Option(help="base models to start engines for; default: the live ones")
    ] = None,
    detach: Annotated[bool, typer.Option(help="return once it answers; needs a running cluster")] = False,
) -> None:
    """Serves the fleet over HTTP on the Ray cluster at hand, or on one started here until Ctrl-C."""
    import serving.on_ray
    from cluster.config import load_fleet
    from cluster.fleet import open_blobs, open_registry, register_adapters
    from cluster.on_ray import LocalCluster, connect

    loaded = load_fleet(fleet)
    for name in base or []:
        loaded.base(name)  # an unknown one is told before anything starts
    registry = open_registry(loaded)
    register_adapters(loaded, registry, open_blobs(loaded))
    bases = base or sorted({route.live.base for route in registry.routes().values()})
    with ExitStack() as stack:
        try:
            _join_cluster()
        except StorageError:
            if detach:
                raise  # it would end with this command
            cluster = stack.enter_context(LocalCluster())
            console.print(f"no Ray cluster is running; started one here, dashboard {cluster.dashboard_url}")
            connect(cluster.address)
        serving.on_ray.deploy(loaded, bases)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # the cluster started here ends with us
        console.print(f"serving {', '.join(bases)} at http://{loaded.serving.host}:{loaded.serving.port}/v1")
        for spec in loaded.bases:
            if spec.name not in bases:
                _print_whole(
                    f"to move to {spec.name}: ray job submit -- relora upgrade {fleet.resolve()} --to {spec.name}"
                )
        while not detach:
            time.sleep(1.0)


@app.command()
def assess(
    fleet: FleetPath,
    to: Annotated[str, typer.Option(help="name of the new base model in the fleet file")],
    out: Annotated[Path | None, typer.Option(help="also as JSON, to this file", dir_okay=False)] = None,
) -> None:
    """Tells what awaits every adapter on a new base model, before anything is trained; needs no cluster."""
    from cluster.config import load_fleet
    from cluster.fleet import open_blobs, open_registry, register_adapters
    from readapt.campaign.assess import Assessor, as_json, as_table

    loaded = load_fleet(fleet)
    loaded.base(to)  # an unknown one is told before anything starts
    registry, blobs = open_registry(loaded), open_blobs(loaded)
    register_adapters(loaded, registry, blobs)
    assessments = Assessor(loaded, registry, blobs, to, console.print).assess_all()
    console.print(as_table(assessments, to))
    if out is not None:
        out.write_text(as_json(assessments, to))
    failed = [assessment for assessment in assessments if assessment.error is not None]
    for assessment in failed:
        _print_whole(f"{assessment.version}: {assessment.error}")
    if failed:
        raise typer.Exit(1)


@app.command()
def upgrade(
    fleet: FleetPath,
    to: Annotated[str, typer.Option(help="name of the new base model in the fleet file")],
    rollout: Annotated[bool, typer.Option(help="also move traffic; without: stop at candidates")] = True,
) -> None:
    """Re-adapts every adapter of a served fleet to a new base model and moves its traffic when it is ready."""
    import readapt.on_ray
    import serving.on_ray
    from cluster.checkpoints import open_checkpoint
    from cluster.config import load_fleet
    from cluster.fleet import open_blobs, open_registry, register_adapters
    from cluster.rollout import Rollout
    from readapt.campaign.campaign import Campaign, in_background

    loaded = load_fleet(fleet)
    open_checkpoint(loaded.base(to).path)  # an unknown name or a missing folder is told before anything starts
    registry, blobs = open_registry(loaded), open_blobs(loaded)
    register_adapters(loaded, registry, blobs)
    _join_cluster()
    campaign = Campaign(loaded, registry, blobs, to, readapt.on_ray.RayExecutor(loaded))
    if not rollout:
        campaign.run()
        return
    serving.on_ray.check_gateway(loaded)
    mover = Rollout(registry, to, lambda version: serving.on_ray.probe(loaded, version), loaded.rollout)
    with in_background(campaign) as settled:
        try:
            serving.on_ray.deploy_base(loaded, to)  # meanwhile
            while not settled.done() or mover.is_busy():
                _tick(mover)
                time.sleep(loaded.rollout.poll_s)
        except ReloraError as error:
            _print_whole(f"stopping the campaign: {error}")  # at once: what is in the air may take a while to stop
            raise
    _tally(settled.result(), registry)


@app.command()
def rollout(
    fleet: FleetPath,
    base: Annotated[str | None, typer.Option(help="only candidates on this base model")] = None,
) -> None:
    """Moves the traffic of a served fleet to the candidates that wait, one canary of an adapter at a time."""
    import serving.on_ray
    from cluster.config import load_fleet
    from cluster.fleet import open_registry
    from cluster.registry import Status
    from cluster.rollout import Rollout

    loaded = load_fleet(fleet)
    registry = open_registry(loaded)
    waiting = registry.versions(base=base, statuses=(Status.CANDIDATE, Status.READY, Status.CANARY))
    _join_cluster()
    serving.on_ray.check_gateway(loaded)
    movers = []
    for name in sorted({version.base for version in waiting}):
        if not serving.on_ray.has_engine(name):
            serving.on_ray.deploy_base(loaded, name)
        movers.append(Rollout(registry, name, lambda version: serving.on_ray.probe(loaded, version), loaded.rollout))
    while any(mover.is_busy() for mover in movers):
        for mover in movers:
            _tick(mover)
        time.sleep(loaded.rollout.poll_s)
    _tally(waiting, registry)


@app.command()
def extract(
    base: Annotated[Path, typer.Option(help="checkpoint that the tuning began from", exists=True, file_okay=False)],
    tuned: Annotated[Path, typer.Option(help="checkpoint after full fine-tuning", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="new folder for adapter and report; several rules: a subfolder for each")],
    rank: Annotated[list[int] | None, typer.Option(help="a fixed rank; may be given several times")] = None,
    energy: Annotated[float | None, typer.Option(help="the rank that holds this part; alone the default, 0.95")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="the rank at the knee of the energy curve")] = False,
    budget: Annotated[int | None, typer.Option(help="parameters in all, spent where they hold most energy")] = None,
    max_rank: Annotated[int | None, typer.Option(help="no rank above this", min=1)] = None,
    include: Annotated[str | None, typer.Option(help="only tensors in whose name this expression is found")] = None,
    exclude: Annotated[str | None, typer.Option(help="no tensors in whose name this expression is found")] = None,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="of the stored factors")] = "float32",
    verify: Annotated[Path | None, typer.Option(help="JSONL rows to compare with the tuned model on")] = None,
    on_ray: Annotated[bool, typer.Option("--on-ray", help="spread over the running Ray cluster")] = False,
) -> None:
    """Turns full fine-tuning into a LoRA adapter: truncated SVD of tuned - base, tensor by tensor, with a report."""
    from cluster.checkpoints import open_checkpoint
    from readapt.extraction import extract as extraction
    from readapt.extraction.report import adapters_table, read_report
    from readapt.extraction.verify import read_rows, verify_into_report
    from readapt.lowrank.spectra import rules_of

    settings = extraction.Settings(rules_of(rank or [], energy, knee, budget), max_rank, include, exclude, dtype=dtype)
    if verify is not None:
        read_rows(verify)  # bad ones are told before the work, not after it
    checkpoints = open_checkpoint(base.resolve()), open_checkpoint(tuned.resolve())
    with Progress(console=console) as progress:
        bar = progress.add_task("tensors")
        done = extraction.extract(
            *checkpoints,
            out.resolve(),
            settings,
            _spread() if on_ray else None,
            lambda num_done, total: progress.update(bar, completed=num_done, total=total),
        )
    if verify is not None:
        verify_into_report(done, base, tuned, verify)
    console.print(adapters_table(read_report(done.folder)))


def _spread() -> "Spread":
    """A way to spread extraction over the running cluster."""
    import readapt.on_ray

    _join_cluster()
    return readapt.on_ray.spread


@app.command()
def continual(
    fleet: FleetPath,
    adapter: Annotated[str, typer.Argument(help="the adapter that shall learn new classes")],
    data: Annotated[Path, typer.Option(help="folder with train.jsonl and valid.jsonl of the new classes alone")],
    stage: Annotated[str, typer.Option(help="a name for what is learned now")],
    parent: Annotated[
        int | None, typer.Option(help="number of the version to go on from; default: the live one")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="cut the folded adapter to this rank", min=1)] = None,
    direction_rank: Annotated[
        int | None, typer.Option(help="rank of what the stage trains; default: 32 for recall, else 10", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="optimiser steps (default: 800 for recall, else 200)", min=1)
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="of that direction", min=1e-8)] = 3e-3,
    kind: Annotated[
        Literal["recall", "contrast", "paper", "distil", "code"],
        typer.Option("--method", help="class statistics; look at what is new; or SD-LoRA: paper, distilled, its code"),
    ] = "recall",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Teaches an adapter new classes from their rows alone: a new version, a candidate unless it forgot old ones."""
    from cluster.config import load_fleet
    from cluster.fleet import open_blobs, open_registry, register_adapters
    from cluster.registry import Status
    from readapt.continual.learn import method_of
    from readapt.continual.stage import NextStage, add_stage

    loaded = load_fleet(fleet)
    registry, blobs = open_registry(loaded), open_blobs(loaded)
    register_adapters(loaded, registry, blobs)
    wanted = NextStage(adapter, stage, data.resolve(), parent, rank, seed)
    version = add_stage(loaded, registry, blobs, wanted, method_of(kind, steps, learning_rate, direction_rank))
    points = ", ".join(f"{name} {value:.1f}" for name, value in version.details["accuracy_by_stage"].items())
    _print_whole(f"{version.label}: {version.status} on {version.base}, rank {version.details['rank']}: {points}")
    if version.status is Status.REJECTED:
        _print_whole(f"it does not go live: {version.setback}")
        raise typer.Exit(1)
    _print_whole(f"`relora rollout {fleet}` moves its traffic")


@app.command()
def status(fleet: FleetPath) -> None:
    """Shows every version of every adapter, as the registry has it, and below why those that went wrong did."""
    from cluster.config import load_fleet
    from cluster.fleet import has_registry, open_registry

    loaded = load_fleet(fleet)
    versions = open_registry(loaded).versions() if has_registry(loaded) else []
    if not versions:
        _print_whole(f"nothing is registered yet: `relora register {fleet}` comes first")
        return
    table = Table("version", "base", "status", "quality", "rung")
    for version in versions:
        quality = "" if version.quality is None else f"{version.quality:.1f}"
        table.add_row(version.label, version.base, version.status, quality, str(version.details.get("rung", "")))
    console.print(table)
    for version in versions:
        if version.setback is not None:
            _print_whole(f"{version.label}: {version.status}: {version.setback}")


def _print_whole(line: str) -> None:
    """Without markup, for messages have brackets, and without wrapping: who reads a log searches it by line."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _tick(mover: "Rollout") -> None:
    """One step of a rollout, and what it moved."""
    for version in mover.tick():
        console.print(f"{version.label}: {version.status}")


def _tally(settled: "list[Version]", registry: "Registry") -> None:
    """Says how the campaign's versions ended; what needs a person's eye makes the command fail."""
    from cluster.registry import Status

    statuses = [registry.version(version.id).status for version in settled]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in Status if status in statuses)
    console.print(f"done: {counts or 'nothing was left to do'}")
    if {Status.FAILED, Status.ROLLED_BACK} & set(statuses):
        raise typer.Exit(1)


def _join_cluster() -> None:
    """Connects to the cluster that this process is a job of, or to the one on this machine; StorageError without."""
    from cluster.on_ray import connect

    try:
        connect()
    except ConnectionError as error:
        raise StorageError(
            "No Ray cluster is at hand: submit this as a job (`ray job submit --address URL -- relora ...`), "
            "or start a cluster here with `relora serve`, without --detach."
        ) from error


def main() -> None:
    """Runs the command line; errors that users can mend are one line, not a traceback."""
    try:
        app(prog_name="relora")
    except ReloraError as error:
        # Markup off: messages have brackets, such as adapters[0].base. No wrapping: a log's reader searches by line.
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
