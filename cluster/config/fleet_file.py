"""Reading and checking a fleet file.

An unknown key, a wrong type or a value out of bounds is a ConfigError that names the key. Nothing here opens the named
files and folders; the code that opens one checks that it exists.
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cluster.config.readapt import Rung
from cluster.config.settings import Fleet
from cluster.errors import ConfigError
from cluster.names import check_name, flat_name
from cluster.storage.sources import check_source

_UNKNOWN = "There is no such key."


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file; a ConfigError lists every bad key, one per line, and what is wrong with it."""
    raw = _read_toml(path)
    folder = path.absolute().parent
    faults = [f"folder: {_UNKNOWN}"] if "folder" in raw else []
    try:
        # Validate as JSON: its strict mode accepts arrays for tuples and strings for paths, but not "16" for a number.
        text = json.dumps({**raw, "folder": str(folder)}, default=str)
        fleet = TypeAdapter(Fleet).validate_json(text, strict=True, context={"folder": folder})
        faults += _contradictions(fleet)
    except ValidationError as error:
        faults += [_described(fault) for fault in error.errors()]
    if faults:
        raise ConfigError("\n".join(f"{path.name}: {fault}" for fault in faults))
    return fleet


def model_fleet_file(model: str, folder: Path) -> Path:
    """Return the fleet file, under `folder`, of a fleet with one base model and no adapters. Write it on first use.

    `model` is whatever a base's `path` may be. The base has the name of the folder, or the hub id. Raises
    InvalidRequestError if that cannot be a name, and ConfigError if the file exists and is about another base.
    """
    is_folder = Path(model).is_dir()
    source = str(Path(model).resolve()) if is_folder else check_source(model)
    name = check_name(Path(source).name if is_folder or "://" in source else source.partition("@")[0])
    file = folder.absolute() / flat_name(name) / "fleet.toml"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        quoted = json.dumps(source, ensure_ascii=False)
        file.write_text(f'name = "{name}"\n\n[[bases]]\nname = "{name}"\npath = {quoted}\n', encoding="utf-8")
    expected = source if "://" in source else str(file.parent / source)
    paths = [str(spec.path) for spec in load_fleet(file).bases]
    if paths != [expected]:
        raise ConfigError(f"{file} serves {', '.join(paths)}, not {expected}. Write a fleet file of your own.")
    return file


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a TOMLDecodeError, which has the line, or text that is not UTF-8
        raise ConfigError(f"{path.name}: not valid TOML: {error}") from error


def _described(fault: ErrorDetails) -> str:
    keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"])
    is_unknown = fault["type"] == "unexpected_keyword_argument"
    message = f"{_UNKNOWN}{_hint(fault['loc'])}" if is_unknown else fault["msg"].removeprefix("Value error, ")
    return f"{keys.removeprefix('.')}: {message}"


def _hint(location: Sequence[int | str]) -> str:
    """Return a question that names the key that was probably meant, or nothing."""
    *tables, key = (part for part in location if isinstance(part, str))
    meant = ".".join([*tables, key])
    known = list(_keys(Fleet, ""))
    here = [name for name in known if name.rpartition(".")[0] == ".".join(tables)]
    moved = [name for name in known if name.rpartition(".")[2] == key]  # the right key in the wrong table
    close = moved or get_close_matches(meant, here, 1) or get_close_matches(meant, known, 1, cutoff=0.8)
    return f" Did you mean {close[0]!r}?" if close else ""


def _keys(table: type, prefix: str) -> Iterator[str]:
    """Yield the dotted keys of a table of the fleet file, and those of its tables."""
    types = get_type_hints(table)
    for field in fields(table):
        if prefix or field.name != "folder":
            yield f"{prefix}{field.name}"
        for inner in (types[field.name], *get_args(types[field.name])):
            if isinstance(inner, type) and is_dataclass(inner):
                yield from _keys(inner, f"{prefix}{field.name}.")


def _contradictions(fleet: Fleet) -> Iterator[str]:
    """Yield the faults that show only when several keys are compared."""
    yield from _name_clashes(fleet)
    bases = [base.name for base in fleet.bases]
    for i, engine in enumerate(fleet.engines):
        if engine.base not in bases:
            yield f"engines[{i}].base: no base {engine.base!r} among: {', '.join(bases) or 'none'}"
    if fleet.serving.max_replicas < fleet.serving.min_replicas:
        yield "serving.max_replicas: Input should be at least serving.min_replicas"
    yield from _impossible_rungs(fleet.readapt.ladder.rungs)
    if "transplant" in fleet.readapt.ladder.rungs:
        yield from _unservable_ranks(fleet)
    if fleet.readapt.search.beta_max <= fleet.readapt.search.beta_min:
        yield "readapt.search.beta_max: Input should be greater than readapt.search.beta_min"


def _name_clashes(fleet: Fleet) -> Iterator[str]:
    """Bases and adapters share one namespace, because a request's `model` can be either."""
    entries = [(f"bases[{i}].name", base.name) for i, base in enumerate(fleet.bases)]
    entries += [(f"adapters[{i}].name", adapter.name) for i, adapter in enumerate(fleet.adapters)]
    first: dict[str, str] = {}
    for key, name in entries:
        if name in first:
            yield f"{key}: {name!r} is already the name of {first[name].removesuffix('.name')}"
        first.setdefault(name, key)


def _impossible_rungs(rungs: Sequence[Rung]) -> Iterator[str]:
    if not rungs:
        yield "readapt.ladder.rungs: Input should have at least one rung"
    if len(set(rungs)) < len(rungs):
        yield "readapt.ladder.rungs: Input should name no rung twice"
    if "train" in rungs and {"copy", "transplant", "fused"}.isdisjoint(rungs[: rungs.index("train")]):
        yield "readapt.ladder.rungs: 'train' should come after a start to train from: copy, transplant or fused"


def _unservable_ranks(fleet: Fleet) -> Iterator[str]:
    for key, rank in zip(("rank", "wide_rank"), fleet.readapt.transplant.ranks, strict=True):
        if rank > fleet.serving.max_rank:
            yield f"readapt.transplant.{key}: Input should be at most serving.max_rank, or the result cannot be served"
