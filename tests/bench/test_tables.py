"""The tables of docs/results.md are made from the committed records."""

import json
from pathlib import Path

import pytest

from bench.markdown import Table, with_tables
from bench.tables import PAGE, RECORDS, TABLES, render
from cluster.errors import ConfigError


def test_the_page_has_every_table_as_its_record_gives_it():
    page = PAGE.read_text()
    assert render(page) == page, "run `relora bench tables` and commit the result"
    assert all(page.count(f"<!-- table: {name} -->") == 1 for name in TABLES)


def test_every_record_says_how_it_was_made():
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    assert records.keys() == {table.record for table in TABLES.values()}
    for record in records.values():
        facts = record.get("facts") or record["how"]["facts"]
        assert {"command", "date", "processor", "cores", "memory_gib", "gpu", "threads"} <= facts.keys()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = {"speed": {"ours": 1234.5, "theirs": None}, "share": 0.25, "seconds": 0.5, "arms": {"a": {"points": 1}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("{speed>ours:,.0f} tokens/s", "1,234 tokens/s"),
        (
            "{speed>theirs:.1f}, {speed>nobody}, {nothing>here>at all:.2f>=3}",
            "not measured, not measured, not measured",
        ),
        ("{share:.0%}, {seconds!m:.0f} ms, {speed>ours!k:.1f} k", "25 %, 500 ms, 1.2 k"),
        ("{share:.2f>=0.2}, {share:.2f>=0.3}, {share:.2f<=0.2}", "0.25, **0.25**, **0.25**"),
        (lambda record: str(sorted(record)[0]), "arms"),
    ],
)
def test_a_cell_is_formatted_from_the_record(folder: Path, cell: str, text: str):
    assert Table("run", ("a",), [(cell,)]).render(folder) == f"| a |\n|---|\n| {text} |"


def test_rows_repeat_for_each_item_and_text_outside_of_the_marks_stays(folder: Path):
    table = Table("run", ("arm", "points"), [("{name}", "{points}")], each="arms")
    page = "before\n<!-- table: it -->\nold\n<!-- end -->\nafter"
    expected = "before\n<!-- table: it -->\n| arm | points |\n|---|---|\n| a | 1 |\n<!-- end -->\nafter"
    assert with_tables(page, {"it": table}, folder) == expected
    with pytest.raises(ConfigError, match="unknown table 'it'; the tables are other"):
        with_tables(page, {"other": table}, folder)
