"""Runs all suites against one server and writes what passed."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.clients import suites
from bench.clients.checklist import Target
from bench.clients.server import serve
from bench.facts import ROOT, facts, write_report

Record = dict[str, str | None]


def run(model: Path, out: Path, python: Path, only: Sequence[str], console: Console) -> bool:
    """Serve the model, run each suite with `python`, write the report, and return whether all checks pass.

    `python` needs the clients of the extra `clients`. The server's log lies beside the report, which has `checks`,
    `failures` (with their reasons) and one record per check. A suite whose client is not installed is one failed check.
    """
    names = [name for name in suite_names() if not only or name in only]
    records: list[Record] = []
    log = out.with_suffix(".server.log")
    with tempfile.TemporaryDirectory() as folder, serve(model, Path(folder), log) as target:
        for name in names:
            console.print(f"{name} ...")
            records += run_suite(name, python, target)
    write_report(out, {**facts(), **summary(records)})
    console.print(_table(records))
    return all(record["error"] is None for record in records)


def suite_names() -> list[str]:
    """Return the names of all suites."""
    files = resources.files(suites).iterdir()
    return sorted(file.name.removesuffix(".py") for file in files if not file.name.startswith("_"))


def run_suite(name: str, python: Path, target: Target) -> list[Record]:
    """Run one suite in its own process and return its records."""
    command = [str(python), "-m", f"bench.clients.suites.{name}", target.url, target.base, target.adapter]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    if done.returncode:
        records.append({"client": name, "version": None, "check": "starts", "error": done.stderr[-600:]})
    return records


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return the figures of a run."""
    failures = [record for record in records if record["error"] is not None]
    return {"checks": len(records), "failures": failures, "records": list(records)}


def _table(records: Sequence[Record]) -> Table:
    table = Table("client", "version", "checks", "failed")
    for client in sorted({str(record["client"]) for record in records}):
        own = [record for record in records if record["client"] == client]
        failed = [str(record["check"]) for record in own if record["error"] is not None]
        table.add_row(client, str(own[0]["version"]), str(len(own)), ", ".join(failed) or "-")
    return table
