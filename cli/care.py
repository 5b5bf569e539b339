"""Commands that keep a fleet's storage in order."""

import typer

from cli.output import AsJson, FleetPath, print_json, print_line


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(migrate)


def migrate(fleet: FleetPath, as_json: AsJson = False) -> None:
    """Bring an older release's registry up to date; needed once for a database server, automatic for a file."""
    from cluster.database import migrate as migrate_database
    from cluster.fleet_file import load_fleet

    before, after = migrate_database(load_fleet(fleet).registry)
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        print_line(f"the registry is up to date: revision {after}")
    else:
        print_line(f"the registry is now at revision {after}; it was {f'at {before}' if before else 'empty'}")
