"""What all commands share: the fleet file as an argument, and how they print."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.progress import dated
from cluster.registry.records import jsonable

FleetPath = Annotated[Path, typer.Argument(help="path to fleet.toml", exists=True, dir_okay=False)]
Model = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="an adapter, or one of its versions")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead, for programs")]

# Wide enough for the tables in a log. Without emoji, because `:fire:` may be a part of a name.
console = Console(width=None if sys.stdout.isatty() else 150, emoji=False)


def print_line(line: str) -> None:
    """Print without markup (messages contain brackets) and without wrapping (logs are searched by line)."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line about what is under way, with the time of day."""
    dated(print_line)(line)


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinities become null."""
    print(json.dumps(jsonable(value), indent=2))


def megabytes(num_bytes: int) -> str:
    """Return a size for a person to read."""
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes < 1e8 else f"{num_bytes / 1e9:.2f} GB"
