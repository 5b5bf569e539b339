"""JSON Lines as people have them: the one reader for rows, prompts and logs.

A file may start with a byte order mark and end its lines with CR LF. Blank lines are skipped. Only a line feed ends a
line, because the other separators of Unicode (U+2028, U+0085) may stand in a JSON string.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InvalidDataError


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a file of JSON objects, one per line. Return each with its "file:line".

    InvalidDataError, with file and line, if the file is missing or has no lines, or if a line is not a JSON object.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDataError(f"{path}: cannot be read: {error}") from error
    places = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not places:
        raise InvalidDataError(f"{path}: has no rows")
    return [(at, _parse(line, at)) for at, line in places]


def write_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON objects, one per line, as `read_lines` reads them. Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(fields) + "\n" for fields in objects), encoding="utf-8")


def text_field(fields: Mapping[str, Any], name: str, at: str, *, may_be_empty: bool = False) -> str:
    """Return a field that must be a string. InvalidDataError otherwise; `at` is its "file:line"."""
    if name not in fields:
        raise InvalidDataError(f"{at}: field '{name}' is missing; the row has: {', '.join(map(str, fields))}")
    if not isinstance(fields[name], str) or not (fields[name] or may_be_empty):
        raise InvalidDataError(f"{at}: field '{name}' must be a {'' if may_be_empty else 'non-empty '}string")
    return str(fields[name])


def _parse(line: str, at: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        is_list = line.rstrip().endswith(",") or line.strip() in ("[", "]")
        hint = ". Write one object per line, without commas between them" if is_list else ""
        raise InvalidDataError(f"{at}: is not valid JSON: {error}{hint}") from error
    if not isinstance(fields, dict):
        hint = ". Write one object per line" if isinstance(fields, list) else ""
        raise InvalidDataError(f"{at}: must be a JSON object, not {type(fields).__name__}{hint}")
    return fields
