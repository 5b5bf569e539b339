"""Records how a benchmark was run, and reads and writes its JSON files."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parent.parent


def facts(packages: Sequence[str] = ("torch", "transformers"), device: str = "cpu") -> dict[str, Any]:
    """Return the command, commit, hardware, threads, versions and date, ready for JSON.

    `gpu` is the GPU that `device` names. It is null on a CPU, even if the machine has a GPU.
    """
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 1024**3, 1),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if there is no such file."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def plain(value: Any) -> Any:
    """Return the value as a JSON file gives it back, so that it can be compared with a stored one."""
    return json.loads(json.dumps(value))


def write_report(out: Path, report: Any, indent: int | None = 1) -> None:
    """Write a JSON file atomically."""
    aside = out.with_suffix(".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(report, indent=indent) + "\n")
    aside.replace(out)


def _commit() -> str | None:
    """Return the commit of the code, with "-dirty" after changes, or None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
