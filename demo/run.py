"""The demo from start to end: a fleet serves v1 under load, a Ray job upgrades it to v2, and a judge checks both."""

import json
import logging
import os
import platform
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import serving.on_ray
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs, open_registry, register_adapters
from cluster.on_ray import JobHandle, LocalCluster, connect, submit_job
from cluster.registry.registry import Registry, Status
from demo.judge import Judge
from demo.load import SteadyLoad
from demo.outcome import Outcome
from demo.report import summary, table, write_html
from demo.scratch import ScratchRun, scratch_runs
from demo.specialists import single_threaded
from demo.world import NEW, OLD, WorldInfo, kit_world, make_world
from readapt.training.data import load_task

NUM_PROMPTS = 6  # per adapter in the load
ANSWER_TOKENS = 16
REQUESTS_PER_S = 8.0
UPGRADE_TIMEOUT_S = 3600.0
RAY_SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # in this mode a stop would otherwise take 30 s
}
SETTLED = (Status.LIVE, Status.REJECTED, Status.FAILED, Status.ROLLED_BACK)


def run_demo(folder: Path, *, is_quick: bool, kit: Path | None, tasks: list[str], console: Console) -> Outcome:
    """Run the demo, print the table and write `report.html`, `result.json` and `upgrade.log` into `folder`."""
    started = time.monotonic()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its lines would break the progress bars
    with single_threaded(), _progress(console) as progress:
        with _Stage(progress, "making the world") as stage:
            info = _world(folder, is_quick, kit, tasks, stage)
        fleet = load_fleet(info.new_run(folder / "run"))
        registry = open_registry(fleet)
        with LocalCluster(env=RAY_SETTINGS) as cluster:
            with _Stage(progress, f"serving {OLD}") as stage:
                _serve_old_base(fleet, registry, cluster, stage)
            load = SteadyLoad(_url(fleet), _prompts(fleet), REQUESTS_PER_S, ANSWER_TOKENS).start()
            with _Stage(progress, f"upgrade to {NEW}") as stage:
                submitted_at, upgrade_s = _upgrade(fleet, registry, cluster, folder, stage)
            with _Stage(progress, "control: training from scratch") as stage:
                scratch = _scratch(fleet, registry, stage)
            answers = load.stop()
        with _Stage(progress, "checking every answer, scoring test rows") as stage:
            judge = Judge(fleet, registry, ANSWER_TOKENS)
            traffic = judge.traffic(load.num_sent, answers)
            adapters = judge.adapters(scratch, submitted_at, lambda share: stage("", share))
    total_s = time.monotonic() - started
    outcome = Outcome(info.title, submitted_at, upgrade_s, total_s, adapters, traffic, answers, _hardware())
    _publish(outcome, folder, console)
    return outcome


class _Stage:
    """One stage of the demo: a progress bar in a terminal, dated lines in a log."""

    def __init__(self, progress: Progress, title: str):
        self._progress = progress
        self._title = title
        self._note = ""

    def __enter__(self) -> "_Stage":
        self._started = time.monotonic()
        self._task = self._progress.add_task(self._title, total=1.0)
        self._log(self._title)
        return self

    def __exit__(self, *failure: object) -> None:
        outcome = "failed" if failure[0] is not None else "done"
        self._log(f"{self._title}: {outcome} after {time.monotonic() - self._started:.0f} s")
        if failure[0] is None:
            self._progress.update(self._task, completed=1.0)

    def __call__(self, note: str, share: float) -> None:
        """Show what the stage does now, and which share of it is done (0 to 1)."""
        title = f"{self._title}: {note}" if note else self._title
        self._progress.update(self._task, completed=min(share, 0.99), description=title)
        if note and note != self._note:
            self._note = note
            self._log(title)

    def _log(self, line: str) -> None:
        """Print a line where a bar cannot be seen: in a file or a CI log."""
        console = self._progress.console
        if not console.is_terminal:
            console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _world(folder: Path, is_quick: bool, kit: Path | None, tasks: list[str], stage: _Stage) -> WorldInfo:
    if kit is not None:
        return kit_world(folder / "world-kit", kit, tasks, stage)
    size: Literal["full", "quick"] = "quick" if is_quick else "full"
    return make_world(folder / f"world-{size}", size, stage)


def _serve_old_base(fleet: Fleet, registry: Registry, cluster: LocalCluster, stage: _Stage) -> None:
    stage("registering", 0.1)
    register_adapters(fleet, registry, open_blobs(fleet))
    stage(f"dashboard {cluster.dashboard_url}", 0.3)
    connect(cluster.address)
    serving.on_ray.deploy(fleet, [OLD])
    stage(f"{_url(fleet)}, dashboard {cluster.dashboard_url}", 0.9)


def _url(fleet: Fleet) -> str:
    return f"http://{fleet.serving.host}:{fleet.serving.port}/v1"


def _prompts(fleet: Fleet) -> dict[str, list[str]]:
    tasks = {spec.name: load_task(spec.data) for spec in fleet.adapters}
    return {name: [str(row.prompt) for row in task.test[:NUM_PROMPTS]] for name, task in tasks.items()}


def _upgrade(
    fleet: Fleet, registry: Registry, cluster: LocalCluster, folder: Path, stage: _Stage
) -> tuple[float, float]:
    """Upgrade the fleet. Return when the job was submitted (`time.time()`) and how many seconds it took."""
    time.sleep(2.0)  # some traffic before the upgrade, for the pictures
    submitted_at = time.time()
    command = [sys.executable, "-m", "relora", "upgrade", str(fleet.folder / "fleet.toml"), "--to", NEW]
    job = submit_job(cluster.dashboard_url, shlex.join(command))
    log = threading.Thread(target=_keep_log, args=(job, folder / "upgrade.log"), daemon=True)
    log.start()
    while not job.status().is_terminal() and time.time() - submitted_at < UPGRADE_TIMEOUT_S:
        stage(*_standing(registry, len(fleet.adapters)))
        time.sleep(0.5)
    upgrade_s = time.time() - submitted_at
    job.wait(timeout_s=0.0)  # raises if it failed or has not ended
    stage(*_standing(registry, len(fleet.adapters)))
    log.join(10.0)
    return submitted_at, upgrade_s


def _keep_log(job: JobHandle, path: Path) -> None:
    with path.open("w") as file:
        for line in job.tail():
            file.write(line + "\n")
            file.flush()


def _standing(registry: Registry, num_adapters: int) -> tuple[str, float]:
    statuses = [version.status for version in registry.versions(base=NEW)]
    note = ", ".join(f"{statuses.count(status)} {status}" for status in Status if status in statuses)
    return note, sum(status in SETTLED for status in statuses) / num_adapters


def _scratch(fleet: Fleet, registry: Registry, stage: _Stage) -> dict[str, ScratchRun]:
    versions = registry.versions(base=NEW)
    references = {v.adapter: v.details["reference_quality"] for v in versions if "reference_quality" in v.details}
    runs: dict[str, ScratchRun] = {}
    for run in scratch_runs(fleet, NEW, references):
        runs[run.name] = run
        stage("", len(runs) / len(references))
    return runs


def _hardware() -> str:
    memory_gib = psutil.virtual_memory().total / 2**30
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores ({model}), {memory_gib:.0f} GiB"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _publish(outcome: Outcome, folder: Path, console: Console) -> None:
    write_html(outcome, folder / "report.html")
    (folder / "result.json").write_text(json.dumps(outcome.to_json(), indent=1))
    console.print(table(outcome))
    for sentence in summary(outcome):
        console.print(sentence)
    console.print(f"Report: {folder / 'report.html'}")
