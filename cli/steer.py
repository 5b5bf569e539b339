"""Commands with which a person steers one adapter: back, forward, once more, not now, not at all."""

from typing import Annotated

import typer

from cli.output import AsJson, FleetPath, Model, print_json, print_line
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.names import check_name, parse_model
from cluster.registry import steering
from cluster.registry.records import Version
from cluster.registry.registry import Registry

Name = Annotated[str, typer.Argument(help="name of an adapter")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (rollback, promote, retry, pause, resume, unregister):
        app.command()(command)


def rollback(fleet: FleetPath, name: Name, as_json: AsJson = False) -> None:
    """Take back an adapter's newest step: its canary or candidate, or else its live version."""
    loaded, registry = _open(fleet)
    changed = steering.roll_back(registry, check_name(name))
    _print(changed, as_json)
    _note_base(loaded, registry, name, as_json)


def promote(fleet: FleetPath, model: Model, as_json: AsJson = False) -> None:
    """Make an adapter's canary live at once, or, as NAME@VERSION, a version that was live before."""
    loaded, registry = _open(fleet)
    name, number = parse_model(model)
    _print([steering.promote(registry, name, number)], as_json)
    _note_base(loaded, registry, name, as_json)


def retry(fleet: FleetPath, model: Model, as_json: AsJson = False) -> None:
    """Let the next upgrade or rollout try a version again that was rejected, failed or rolled back."""
    _, registry = _open(fleet)
    version = steering.retry(registry, *parse_model(model))
    _print([version], as_json)
    if not as_json:
        is_candidate = version.status is steering.Status.CANDIDATE
        command = "relora rollout" if is_candidate else f"relora upgrade --to {version.base}"
        print_line(f"`{command}` takes it up")


def pause(fleet: FleetPath, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter where it is: no upgrade takes it up and no rollout moves it, until `relora resume`."""
    _, registry = _open(fleet)
    registry.pause(check_name(name))
    _print_pause(registry, name, as_json)


def resume(fleet: FleetPath, name: Name, as_json: AsJson = False) -> None:
    """Let upgrades and rollouts move an adapter again."""
    _, registry = _open(fleet)
    registry.resume(check_name(name))
    _print_pause(registry, name, as_json)


def unregister(
    fleet: FleetPath,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove an adapter with all its versions; `relora gc` then deletes its files from the blob store."""
    loaded, registry = _open(fleet)
    registry.adapter(check_name(name))
    if not yes:
        typer.confirm(f"Remove {name} and {len(registry.versions(adapter=name))} versions?", abort=True)
    removed = registry.remove_adapter(name)
    if as_json:
        print_json({"adapter": name, "removed": [version.label for version in removed]})
        return
    print_line(f"{name} is removed, with {len(removed)} versions")
    if any(spec.name == name for spec in loaded.adapters):
        print_line(f"{fleet} still lists it: remove its [[adapters]] table, or the next command registers it again")


def _open(fleet: FleetPath) -> tuple[Fleet, Registry]:
    from cluster.fleet import open_registry  # imported here because it loads torch

    loaded = load_fleet(fleet)
    return loaded, open_registry(loaded)


def _print(versions: list[Version], as_json: bool) -> None:
    if as_json:
        print_json([{"version": v.label, "base": v.base, "status": str(v.status)} for v in versions])
    else:
        for version in versions:
            print_line(f"{version.label}: {version.status} on {version.base}")


def _print_pause(registry: Registry, name: str, as_json: bool) -> None:
    is_paused = name in registry.paused()
    if as_json:
        print_json({"adapter": name, "is_paused": is_paused})
    else:
        print_line(f"{name} is {'paused' if is_paused else 'not paused'}")


def _note_base(fleet: Fleet, registry: Registry, name: str, as_json: bool) -> None:
    """Say so if the fleet file no longer has the live version's base, because an engine needs it."""
    route = registry.routes().get(name)
    if route is not None and not as_json and all(spec.name != route.live.base for spec in fleet.bases):
        print_line(f"the fleet file has no base {route.live.base!r}: add it, or no engine can be started for it")
