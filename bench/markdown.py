"""Markdown tables that are formatted from JSON records, and pages that contain them.

In a page, a table stands between `<!-- table: NAME -->` and `<!-- end -->`. Text outside of these marks stays as it is.
"""

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Cell = str | Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Table:
    """A table of one record. Each row has one cell per column; see `_Template` for cells that are templates.

    With `each`, the rows are repeated for each item under that key of the record. An item of a dict gets its key as
    `name`.
    """

    record: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    each: str | None = None

    def render(self, folder: Path) -> str:
        """Return the table as Markdown, from the records in a folder."""
        record = json.loads((folder / f"{self.record}.json").read_text())
        items = [record] if self.each is None else _items(record[self.each])
        lines = [self.columns, *([_text(cell, item) for cell in row] for item in items for row in self.rows)]
        head, *body = (f"| {' | '.join(line)} |" for line in lines)
        return "\n".join([head, "|" + "---|" * len(self.columns), *body])


def with_tables(page: str, tables: Mapping[str, Table], folder: Path) -> str:
    """Return the page with each marked table replaced by its current rendering.

    Raises ConfigError if a mark names an unknown table.
    """

    def replacement(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in tables:
            raise ConfigError(f"unknown table {name!r}; the tables are {', '.join(tables)}")
        return f"{start}{tables[name].render(folder)}\n{end}"

    return _MARKED.sub(replacement, page)


class _Template(string.Formatter):
    """Formats a cell, such as `{chaos>tokens_checked:,}` of {"chaos": {"tokens_checked": 486673}} as "486,673".

    `>` in a field's name steps into a dict. A missing or null value is "not measured". `!m` multiplies a value by 1,000
    and `!k` divides it by 1,000. A target at the end of the format, as in `{speedup:.1f>=4}`, makes a value bold that
    misses it.
    """

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        value: Any = kwargs
        for key in field_name.split(">"):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value, field_name

    def convert_field(self, value: Any, conversion: Any) -> Any:
        factors = {"m": 1e3, "k": 1e-3}
        return value * factors[conversion] if conversion and value is not None else value

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "not measured"
        spec, relation, target = re.fullmatch(r"(.*?)(?:(<=|>=)(.+))?", format_spec).groups()  # type: ignore[union-attr]
        text = format(value, spec).replace("%", " %")
        is_missed = relation and (value < float(target) if relation == ">=" else value > float(target))
        return f"**{text}**" if is_missed else text


def _text(cell: Cell, item: Mapping[str, Any]) -> str:
    return cell(item) if callable(cell) else _Template().vformat(cell, (), item)


def _items(found: Any) -> list[Mapping[str, Any]]:
    return [{"name": name, **item} for name, item in found.items()] if isinstance(found, Mapping) else found
