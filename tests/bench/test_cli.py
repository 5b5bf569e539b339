"""The small benchmarks from the command line, and the facts in every benchmark's file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import relora
from bench import cli
from bench.facts import facts, write_report
from tests.worlds.serving import make_checkpoint


def bench(*options: object) -> None:
    result = CliRunner().invoke(relora.app, ["bench", *map(str, options)])
    assert result.exit_code == 0, result.output


def test_there_is_one_command_per_benchmark():
    names = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert names == {
        *("readapt", "continual", "extract", "serving", "chaos"),
        *("overhead", "structured", "clients", "kernels", "training_group", "search", "transplant", "tables"),
    }


def test_overhead_reports_each_number_of_sequences(tmp_path: Path):
    base, out = make_checkpoint(tmp_path / "base", std=0.08), tmp_path / "new" / "overhead.json"
    bench("overhead", "--base", base, "--sequences", 2, "--sequences", 3, "--adapters", 2, "--steps", 8, "--out", out)
    report = json.loads(out.read_text())
    assert [figures["num_sequences"] for figures in report["figures"]] == [2, 3]
    assert all(0 < f["engine_overhead_per_step_ms"] <= f["p90_ms"] for f in report["figures"])
    assert report["facts"]["gpu"] is None


def test_training_group_reports_both_times(tmp_path: Path):
    out = tmp_path / "group.json"
    base = make_checkpoint(tmp_path / "base")
    bench("training-group", "--base", base, "--adapters", 2, "--batch-rows", 2, "--out", out)
    report = json.loads(out.read_text())
    assert report["packed_training_speedup"] == pytest.approx(report["one_by_one_s"] / report["group_s"])


def test_facts_describe_this_process_and_fit_json(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/relora", "bench", "kernels", "--out", "a file.json"])
    found = facts(("torch", "peft"))
    assert found["command"] == "relora bench kernels --out 'a file.json'"
    assert set(found["versions"]) == {"torch", "peft"}
    assert json.loads(json.dumps(found)) == found


def test_a_failed_write_keeps_the_old_report(tmp_path: Path):
    out = tmp_path / "report.json"
    write_report(out, {"figure": 1})
    with pytest.raises(TypeError):
        write_report(out, {"figure": object()})
    assert json.loads(out.read_text()) == {"figure": 1}
