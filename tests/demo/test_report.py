"""The report shows the records of the run and marks adapters that were not restored."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from demo.load import Answer
from demo.outcome import AdapterOutcome, Outcome, Traffic
from demo.report import rows, summary, table, write_html

RESTORED = AdapterOutcome(
    name="intent",
    metric="exact_match",
    status="live",
    rung="short",
    alpha=0.9,
    beta=-0.5,
    quality_v1=99.0,
    quality_copy=40.0,
    quality_v2=98.5,
    ready_s=31.0,
    readapt_s=9.0,
    scratch_s=22.0,
    quality_scratch=98.2,
    curve=[(1.0, 40.0), (9.0, 98.5)],
    scratch_curve=[(1.0, 0.0), (22.0, 98.2)],
)
MISSED = replace(RESTORED, name="topic", quality_v2=None, status="rejected", rung="", scratch_s=None)
ANSWERS = [
    Answer("intent", "p", t, t + 0.1, t + 0.2 + t / 100, "intent@1", "v1" if t < 15 else "v2", "x") for t in range(30)
]
OUTCOME = Outcome(
    world="test",
    started_at=5.0,
    upgrade_s=40.0,
    total_s=60.0,
    adapters=[RESTORED, MISSED],
    traffic=Traffic(30, 1, 0, ["intent: <b>timeout</b>"], 12.0, 80.0),
    answers=ANSWERS,
    hardware="4 cores",
)


def test_restored_means_within_a_point_of_v1():
    assert RESTORED.is_restored
    assert not replace(RESTORED, quality_v2=97.9).is_restored
    assert not MISSED.is_restored


def test_scratch_lowers_the_bar_only_if_its_whole_budget_missed_the_gate():
    below = replace(RESTORED, quality_v2=95.5, quality_scratch=96.0)
    assert not below.is_restored
    assert replace(below, scratch_s=None).is_restored


def test_html_holds_table_pictures_and_escaped_failures(tmp_path: Path):
    path = tmp_path / "report.html"
    write_html(OUTCOME, path)
    html = path.read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "0.90 / -0.50" in html
    assert "not reached" in html
    assert html.count('class="missed"') == 1
    assert "&lt;b&gt;timeout" in html


def test_table_and_summary_say_what_happened():
    console = Console(width=200, record=True)
    console.print(table(OUTCOME))
    text = console.export_text()
    assert "intent" in text
    assert "98.5" in text
    sentences = " ".join(summary(OUTCOME))
    assert "1 of 2 adapters are back" in sentences
    assert "30 requests were sent during the run: 1 failed, 0 were answered by a wrong version" in sentences


def test_an_empty_run_still_has_a_report(tmp_path: Path):
    write_html(replace(OUTCOME, answers=[]), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_rung_that_did_not_go_live_shows_its_status():
    fallen = replace(RESTORED, status="rolled_back", quality_v2=None)
    assert rows(replace(OUTCOME, adapters=[RESTORED, fallen]))[0][4] == "short"
    assert rows(replace(OUTCOME, adapters=[fallen]))[0][4] == "short rolled_back"
