"""Commands that keep a fleet's storage and environment in order."""

from typing import Annotated

import typer
from rich.table import Table

from cli.output import AsJson, FleetPath, console, megabytes, print_json, print_line
from cluster.config.fleet_file import load_fleet


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (migrate, gc, doctor):
        app.command()(command)


def migrate(fleet: FleetPath, as_json: AsJson = False) -> None:
    """Bring an older release's registry up to date; needed once for a database server, automatic for a file."""
    from cluster.registry.database import migrate as migrate_database

    before, after = migrate_database(load_fleet(fleet).registry)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        print_line(f"the registry is up to date: revision {after}")
    else:
        print_line(f"the registry is now at revision {after}; it was {f'at {before}' if before else 'empty'}")


def gc(
    fleet: FleetPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
    older_than_h: Annotated[float, typer.Option(help="keep files that are younger than this, in hours", min=0)] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Delete the files in the blob store that no version refers to."""
    from cluster.fleet import open_blobs, open_registry
    from cluster.registry.garbage import garbage

    loaded = load_fleet(fleet)
    registry, blobs = open_registry(loaded), open_blobs(loaded)
    found = []
    for blob in garbage(registry, blobs, older_than_h * 3600):
        if not dry_run:
            blobs.delete(blob)
        found.append(blob)
        if not as_json:
            print_line(f"{'would delete' if dry_run else 'deleted'} {blob.file}: {megabytes(blob.num_bytes)}")
    num_bytes = sum(blob.num_bytes for blob in found)
    if as_json:
        print_json({"dry_run": dry_run, "files": [blob.file for blob in found], "num_bytes": num_bytes})
    else:
        print_line(f"{len(found)} files, {megabytes(num_bytes)}{', nothing was deleted' if dry_run else ''}")


def doctor(
    fleet: Annotated[FleetPath | None, typer.Argument(help="path to fleet.toml; without, only the machine")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and a fleet: versions, GPU, disk, fleet file, registry, blob store, Ray cluster."""
    from cli.checks import Level, all_checks

    checks = all_checks(fleet)
    if as_json:
        print_json([{"check": c.name, "level": str(c.level), "text": c.text} for c in checks])
    else:
        table = Table("", "check", "what it found")
        for check in checks:
            table.add_row(str(check.level), check.name, check.text)
        console.print(table, markup=False)
    if any(check.level is Level.BAD for check in checks):
        raise typer.Exit(1)
