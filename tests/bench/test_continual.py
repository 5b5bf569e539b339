"""The continual benchmark: scores, resumption, arms, and with a kit its streams."""

import json
from pathlib import Path

import pytest
from rich.console import Console

import bench.continual.run as continual
from bench.continual.arms import Course, run_arm
from bench.continual.settings import settings_for
from bench.continual.subjects import TaskRows, WriterSubject, find_encoder, load_stream
from cluster.errors import NotFoundError
from readapt.training.data import Row
from tests.worlds.serving import make_checkpoint


def test_scores_of_a_course():
    """Two stages have 1 and 3 rows. The first loses 40 points in the second."""
    course = Course(matrix=[[{"accuracy": 90.0}], [{"accuracy": 50.0}, {"accuracy": 70.0}]])
    assert course.scores([1, 3]) == {"accuracy_final": 65.0, "accuracy_average": 77.5, "forgetting": 40.0}


def a_stream() -> list[TaskRows]:
    """Return two stages of two labels each. The letter decides the label."""
    stages = []
    for letters in ("ab", "cd"):
        rows = [Row(f"{number} {letter}:", letter.upper() * 2) for number in range(100, 112) for letter in letters]
        stages.append(TaskRows(rows[:16], rows[16:]))
    return stages


@pytest.mark.parametrize("arm", sorted({*continual.ARMS["clinc150", "writer"], *continual.QUICK_ARMS, "contrast"}))
def test_every_arm_learns_a_stream(tmp_path: Path, arm: str):
    subject = WriterSubject(make_checkpoint(tmp_path / "base", std=0.08), a_stream())
    course = run_arm(arm, subject, 2, settings_for("writer", steps=3), seed=0)
    scores = course.scores([8, 8])
    assert set(scores) == {
        f"{key}{ending}" for key in ("accuracy_final", "accuracy_average", "forgetting") for ending in ("", "_choices")
    }
    assert all(-100.0 <= value <= 100.0 for value in scores.values())
    assert course.parameters > 0
    assert course.seconds > 0
    assert course.directions == (2 if arm in ("method", "rank_reduction", "recall") else course.directions)
    assert not any(module._forward_hooks for module in subject.model.modules()), "the model is bare again"


def test_a_resumed_run_measures_only_missing_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []

    def fake(cells, *rest):
        for cell in cells:
            measured.append(cell.name)
            scores = {"accuracy_final": 80.0, "accuracy_average": 85.0, "forgetting": 5.0}
            yield cell, {**scores, "parameters": 100, "seconds": 1.0, "directions": 3, "matrix": []}

    monkeypatch.setattr(continual, "_measured", fake)
    out, console = tmp_path / "out.json", Console(quiet=True)
    report = continual.run(Path("kit"), out, is_quick=True, streams=["mixed"], subjects=["writer"], console=console)
    assert len(measured) == len(continual.QUICK_ARMS)
    assert json.loads(out.read_text()) == report
    stored = json.loads(out.read_text())
    del stored["cells"]["mixed/writer/method/0"]
    out.write_text(json.dumps(stored))
    measured.clear()
    report = continual.run(Path("kit"), out, is_quick=True, streams=["mixed"], subjects=["writer"], console=console)
    assert measured == ["mixed/writer/method/0"]
    assert report["targets"]["mixed/writer"]["below_joint"] == 0.0
    assert report["targets"]["mixed/writer"]["rank_reduction_share_of_parameters"] == 1.0
    measured.clear()
    continual.run(Path("kit"), out, streams=["mixed"], subjects=["writer"], console=console)
    arms = continual.ARMS["mixed", "writer"]
    expected = [f"mixed/writer/{arm}/{seed}" for arm in arms for seed in range(1 if arm == "oracle" else 3)]
    assert sorted(measured) == sorted(expected), "another size is measured again; the oracle, a control, has one seed"


def test_arms_are_compared_on_the_seeds_that_both_have():
    finals = {"x/y/method/0": 80.0, "x/y/method/1": 90.0, "x/y/joint/0": 82.0, "x/y/joint/1": 94.0, "x/y/means/1": 60.0}
    found = continual.targets({name: {"accuracy_final": value, "parameters": 5} for name, value in finals.items()})
    assert found == {"x/y": {"above_means": 30.0, "below_joint": 3.0}}


def test_a_missing_encoder_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.continual.subjects.ENCODER_PACKAGE", "no_such_package")
    with pytest.raises(NotFoundError, match="--encoder"):
        find_encoder(None)


def test_the_streams_of_the_kit(kit: Path):
    intents = load_stream(kit, "clinc150", train_rows=3, test_rows=2)
    assert [len({row.completion for row in stage.train}) for stage in intents] == [15] * 10
    assert len({row.completion for stage in intents for row in stage.train}) == 150
    assert all(len(stage.train) == 45 and len(stage.test) == 30 for stage in intents)
    mixed = load_stream(kit, "mixed", train_rows=3, test_rows=2)
    assert [len({row.completion for row in stage.train}) for stage in mixed] == [7, 6, 4, 2]
