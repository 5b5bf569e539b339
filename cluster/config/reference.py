"""Writes fleet.toml, the reference of all settings, from `cluster.config.settings`.

To regenerate it: `python -m cluster.config.reference > fleet.toml`.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cluster.config import engines as config_engines
from cluster.config import readapt as config_readapt
from cluster.config import settings as config
from cluster.config.engines import EngineSpec
from cluster.config.settings import GIB, MIB, AdapterSpec, BaseSpec, Fleet

_HEAD = """\
# The reference of a fleet file: every key with its default. Only the keys marked "Required" have to be set.
# Generated from cluster/config/settings.py: `python -m cluster.config.reference > fleet.toml`.
#
# Paths are relative to this file's folder. An unknown key or a value out of bounds is an error that names the key.
# If the cluster has several machines, all of them read these paths: use a shared file system, a PostgreSQL registry and
# a blob store that every machine can reach.
"""
_EXAMPLE = Fleet(
    name="example",
    folder=Path(),
    bases=(BaseSpec(name="v1", path=Path("models/v1")), BaseSpec(name="v2", path=Path("models/v2"))),
    adapters=(AdapterSpec(name="intent", path=Path("adapters/intent"), base="v1", data=Path("tasks/intent")),),
    engines=(EngineSpec(base="v2", url="http://127.0.0.1:8001"),),
)
_READAPT = tuple(f"readapt.{section.name}" for section in fields(config_readapt.ReadaptConfig))
_TABLES = ("bases", "adapters", "engines", "serving", *_READAPT, "rollout")
_OPTIONAL = ("engines",)  # tables whose example is commented out, because most fleets have none


def render() -> str:
    """Return the text of fleet.toml: an example fleet, with the documentation of every key above the key."""
    lines = [_HEAD, *_keys(_EXAMPLE)]
    for path in _TABLES:
        table = attrgetter(path)(_EXAMPLE)
        if isinstance(table, tuple):
            first, *others = table
            example = [f"[[{path}]]", *_keys(first)]
            lines += ["", *_comment(inspect.getdoc(first))]
            lines += [f"# {line}" if path in _OPTIONAL and line[0] != "#" else line for line in example]
            for other in others:
                lines += ["", f"[[{path}]]", *(line for line in _keys(other) if not line.startswith("#"))]
        else:
            lines += ["", *_comment(inspect.getdoc(table)), f"[{path}]", *_keys(table)]
    return "\n".join([*lines, ""])


def _keys(table: Any) -> Iterator[str]:
    types = get_type_hints(type(table))
    for field in fields(table):
        documentation = _docs().get((type(table).__name__, field.name))
        if documentation is None:  # a table of its own, or not a key of the file
            continue
        value = getattr(table, field.name)
        hints = [documentation, _choices(types[field.name]), _size(value)]
        if field.default is MISSING:
            hints.insert(0, "Required.")
        yield from _comment(" ".join(filter(None, hints)))
        yield f"{field.name} = {_toml(value)}"


@cache
def _docs() -> dict[tuple[str, str], str]:
    """Return the string under each field of the config modules, by class and field."""
    found = {}
    sources = "\n".join(map(inspect.getsource, (config, config_engines, config_readapt)))
    classes = [node for node in ast.parse(sources).body if isinstance(node, ast.ClassDef)]
    for section in classes:
        for field, below in pairwise(section.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[section.name, name] = text
    return found


def _choices(type_: Any) -> str:
    return f"One of {', '.join(map(_toml, get_args(type_)))}." if get_origin(type_) is Literal else ""


def _size(value: Any) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if isinstance(value, int) and value >= unit and value % unit == 0:
            return f"({value // unit} {name})"
    return ""


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if value >= MIB else str(value)
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


if __name__ == "__main__":
    print(render(), end="")
