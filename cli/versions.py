"""Commands that show what the registry knows, and hand out adapters."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cli.output import AsJson, FleetPath, Model, console, megabytes, print_json, print_line
from cluster.adapters.size import size_of
from cluster.config.fleet_file import load_fleet
from cluster.errors import ConflictError, InvalidAdapterError
from cluster.names import parse_model
from cluster.registry.records import Version
from cluster.registry.registry import Registry
from cluster.registry.steering import ON_THEIR_WAY, find

if TYPE_CHECKING:
    from cluster.storage.blobs import BlobStore


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(status)
    app.command("list")(list_adapters)
    app.command()(show)
    app.command()(export)


def status(fleet: FleetPath, as_json: AsJson = False) -> None:
    """Show every version of every adapter in the registry, and why versions were rejected, failed or rolled back."""
    registry = _registry(fleet)
    versions = [] if registry is None else registry.versions()
    if as_json:
        print_json([_summary(version) for version in versions])
        return
    if registry is None or not versions:
        print_line(f"nothing is registered yet: run `relora register {fleet}` first")
        return
    console.print(_table(versions))
    _print_notes(versions)
    for name in sorted(registry.paused()):
        print_line(f"{name}: paused; `relora resume {fleet} {name}` lets its upgrade and its rollout go on")


def list_adapters(fleet: FleetPath, as_json: AsJson = False) -> None:
    """List the adapters: which version is live where, how good and how large it is, and what is on its way."""
    registry = _registry(fleet)
    rows = [] if registry is None else _adapter_rows(registry)
    if as_json:
        print_json(rows)
        return
    if not rows:
        print_line(f"nothing is registered yet: run `relora register {fleet}` first")
        return
    table = Table("adapter", "live", "base", "quality", "rank", "size", "traffic", "on its way")
    for row in rows:
        notes = [*row["on_its_way"], *(["paused"] if row["is_paused"] else [])]
        live = row["live"] or {"version": "none", "base": "", "quality": None, "rank": None, "num_bytes": None}
        table.add_row(
            row["adapter"], live["version"], live["base"], *_figures(live), f"{row['traffic']:g}", *[", ".join(notes)]
        )
    console.print(table)


def show(fleet: FleetPath, model: Model, as_json: AsJson = False) -> None:
    """Show one adapter, or one of its versions: lineage, gate, rungs, files, rank and bytes."""
    from cluster.fleet import open_blobs, open_registry  # imported here because it loads torch

    name, number = parse_model(model)
    loaded = load_fleet(fleet)
    registry, blobs = open_registry(loaded), open_blobs(loaded)
    if number is None:
        _show_adapter(registry, blobs, name, as_json)
    else:
        _show_version(registry, blobs, registry.find(name, number), as_json)


def export(
    fleet: FleetPath,
    model: Model,
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist yet", file_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Write a version, by default the live one, as a folder that PEFT loads."""
    from cluster.fleet import open_blobs, open_registry

    loaded = load_fleet(fleet)
    version = find(open_registry(loaded), *parse_model(model))
    if version.blob_key is None:
        raise InvalidAdapterError(f"{version.label} is {version.status} and has no files.")
    if out.exists():
        raise ConflictError(f"{out} exists already. Name a new folder.")
    shutil.copytree(open_blobs(loaded).fetch_folder(version.blob_key), out)
    if as_json:
        print_json({"version": version.label, "base": version.base, "folder": str(out)})
    else:
        print_line(f"{version.label}, for {version.base}, is in {out}")


def _registry(fleet: Path) -> Registry | None:
    """Open the fleet's registry; None if it does not exist yet, and then do not create it."""
    from cluster.fleet import has_registry, open_registry

    loaded = load_fleet(fleet)
    return open_registry(loaded) if has_registry(loaded) else None


def _adapter_rows(registry: Registry) -> list[dict[str, Any]]:
    routes, paused = registry.routes(), registry.paused()
    waiting = registry.versions(statuses=ON_THEIR_WAY)
    return [
        {
            "adapter": record.name,
            "live": _summary(routes[record.name].live) if record.name in routes else None,
            "on_its_way": [f"{v.label} {v.status}" for v in waiting if v.adapter == record.name],
            "traffic": record.traffic,
            "is_paused": record.name in paused,
        }
        for record in registry.adapters()
    ]


def _show_adapter(registry: Registry, blobs: "BlobStore", name: str, as_json: bool) -> None:
    record = registry.adapter(name)
    versions = registry.versions(adapter=name)
    sizes = {version.id: size_of(version, blobs) for version in versions}
    if as_json:
        facts = {"adapter": name, "data": record.data, "metric": record.metric, "traffic": record.traffic}
        listed = [_summary(version) | sizes[version.id] for version in versions]
        print_json(facts | {"is_paused": name in registry.paused(), "versions": listed})
        return
    paused = ", paused" if name in registry.paused() else ""
    print_line(f"{name}: metric {record.metric}, traffic {record.traffic:g}, data {record.data or 'none'}{paused}")
    console.print(_table(versions, sizes))
    _print_notes(versions)


def _show_version(registry: Registry, blobs: "BlobStore", version: Version, as_json: bool) -> None:
    lineage = _lineage(registry, version)
    files = _files(blobs, version)
    attempts = version.details.get("attempts", [])
    if as_json:
        more = {"lineage": [v.label for v in lineage], "files": files, "attempts": attempts, "gate": _gate(version)}
        print_json(_summary(version) | size_of(version, blobs) | more)
        return
    rank, size = _rank_and_size(size_of(version, blobs))
    print_line(f"{version.label}: {version.status} on {version.base} since {_time(version.updated_at)}")
    print_line("lineage: " + " <- ".join(f"{v.label} ({v.base})" for v in lineage))
    print_line(f"size: rank {rank or 'unknown'}, {size or 'unknown'}")
    for line in _gate_lines(version):
        print_line(line)
    _print_notes([version])
    if attempts:
        table = Table("rung", "quality", "seconds", "note", title="rungs")
        for attempt in attempts:
            quality, seconds = f"{attempt['quality']:.1f}", f"{attempt['seconds']:.1f}"
            table.add_row(attempt["rung"], quality, seconds, attempt.get("error") or "")
        console.print(table)
    for name, num_bytes in files.items():
        print_line(f"file {name}: {megabytes(num_bytes)}")


def _lineage(registry: Registry, version: Version) -> list[Version]:
    """Return the version, its parent, that one's parent and so on."""
    lineage = [version]
    while lineage[-1].parent_id is not None:
        lineage.append(registry.version(lineage[-1].parent_id))
    return lineage


def _files(blobs: "BlobStore", version: Version) -> dict[str, int]:
    if version.blob_key is None:
        return {}
    folder = blobs.fetch_folder(version.blob_key)
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def _gate(version: Version) -> dict[str, Any]:
    keys = ("reference_quality", "copy_quality", "rung", "alpha", "beta")
    return {key: version.details[key] for key in keys if key in version.details}


def _gate_lines(version: Version) -> list[str]:
    gate = _gate(version)
    if "reference_quality" not in gate:
        return []
    copied = gate.get("copy_quality")
    copy_part = "" if copied is None else f"; the copy reached {copied:.1f}"
    quality = "unknown" if version.quality is None else f"{version.quality:.1f}"
    return [f"gate: quality {quality}, reference {gate['reference_quality']:.1f}, rung {gate.get('rung')}{copy_part}"]


def _summary(version: Version) -> dict[str, Any]:
    return {
        "version": version.label,
        "base": version.base,
        "status": str(version.status),
        "quality": version.quality,
        "rung": version.details.get("rung"),
        **size_of(version),
        "setback": version.setback,
        "warnings": list(version.warnings),
        "created_at": version.created_at,
        "updated_at": version.updated_at,
    }


def _table(versions: list[Version], sizes: dict[int, dict[str, Any]] | None = None) -> Table:
    table = Table("version", "base", "status", "quality", "rung", "rank", "size")
    for version in versions:
        size = _rank_and_size(size_of(version) if sizes is None else sizes[version.id])
        rung = str(version.details.get("rung", ""))
        table.add_row(version.label, version.base, version.status, _quality(version.quality), rung, *size)
    return table


def _figures(summary: dict[str, Any]) -> tuple[str, str, str]:
    return _quality(summary["quality"]), *_rank_and_size(summary)


def _quality(quality: float | None) -> str:
    return "" if quality is None else f"{quality:.1f}"


def _rank_and_size(size: dict[str, Any]) -> tuple[str, str]:
    rank, num_bytes = size["rank"], size["num_bytes"]
    return "" if rank is None else str(rank), "" if num_bytes is None else megabytes(num_bytes)


def _print_notes(versions: list[Version]) -> None:
    for version in versions:
        if version.setback is not None:
            print_line(f"{version.label}: {version.status}: {version.setback}")
        for warning in version.warnings:
            print_line(f"{version.label}: warning: {warning}")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
