"""Stages of a fleet's adapter: from a registered parent through training and the gate to an engine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import relora
from cluster.adapters.files import load_adapter, save_adapter
from cluster.config.settings import Fleet, ServingConfig
from cluster.errors import ConflictError, InvalidAdapterError, InvalidDataError, NotFoundError
from cluster.fleet import open_blobs
from cluster.registry.registry import Registry, Status, Version
from cluster.registry.rollout import Rollout
from readapt.continual import stage as stage_module
from readapt.continual.direction_files import load_directions
from readapt.continual.directions import Decoupled, fold, gram
from readapt.continual.learn import Method, Recall, contrast, method_of, recalling
from readapt.continual.stage import NextStage, add_stage, setback
from readapt.training.data import Row, Task, encoder_for, load_rows
from readapt.training.lora import blank, linear_shapes, load_base
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams
from tests.worlds.fleets import make_fleet, registered
from tests.worlds.readapt import write_task
from tests.worlds.two_linears import deltas

OpenedFleet = tuple[Fleet, Registry, Path]
PLAIN = Method(steps=80, ranks=((0, 4),), learning_rate=1e-2)
METHOD = contrast(PLAIN)
RECALL = recalling(PLAIN, Recall(150, rank=4, learning_rate=1e-2))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OpenedFleet:
    """Return a fleet with one specialist of three labels, and rows with two more labels."""
    folder = tmp_path_factory.mktemp("fleet")
    fleet = make_fleet(folder, names=("usual",))
    return fleet, registered(fleet), rows_of(folder / "more", "xy")


def rows_of(folder: Path, letters: str) -> Path:
    """Write the rows of a stage, with one label for each letter."""
    rows = [Row(f"{number} {letter}:", f"n{letter.upper()}") for number in range(100, 160) for letter in letters]
    a, b = 40 * len(letters), 50 * len(letters)
    return write_task(folder, Task(rows[:a], rows[a:b], rows[b:]))


def lenient(fleet: Fleet) -> Fleet:
    """Return the fleet with a gate that allows any drop."""
    return replace(fleet, readapt=replace(fleet.readapt, gate=replace(fleet.readapt.gate, max_drop_points=100.0)))


def state_of(fleet: Fleet, version: Version) -> Decoupled:
    return load_directions(open_blobs(fleet).fetch_folder(version.details["state_key"]))


def letters_of(registry: Registry) -> Version:
    return next(v for v in registry.versions("usual") if v.details.get("stage") == "letters")


def test_a_stage_becomes_a_candidate_with_its_parent_and_state(world: OpenedFleet):
    fleet, registry, more = world
    blobs = open_blobs(fleet)
    version = add_stage(fleet, registry, blobs, NextStage("usual", "letters", more), METHOD)
    assert version.status is Status.CANDIDATE
    assert version.parent_id == registry.find("usual", 1).id
    points, before = version.details["accuracy_by_stage"], version.details["parent_accuracy_by_stage"]
    assert min(points["start"], points["letters"]) >= 90, "it has learned the new labels and not forgotten the old ones"
    assert version.quality == (points["start"] + points["letters"]) / 2
    assert before["start"] >= 90
    assert before["letters"] == 0
    assert version.details["golden"]
    start = registry.adapter("usual").data
    assert version.details["stages"] == [{"name": "start", "data": start}, {"name": "letters", "data": str(more)}]
    state = state_of(fleet, version)
    assert [direction.max_rank for direction in state.directions] == [4, 4]
    folder = blobs.fetch_folder(version.blob_key)
    for name, delta in deltas(fold(state)).items():
        torch.testing.assert_close(delta, deltas(load_adapter(folder))[name], rtol=1e-5, atol=1e-6)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_engine_serves_a_stage_with_the_accuracy_of_its_evaluation(world: OpenedFleet):
    fleet, registry, more = world
    version = letters_of(registry)
    engine = Engine.open(fleet.base("v1").path, ServingConfig(memory_bytes=4 << 20))
    ref = AdapterRef(version.content_hash, "usual", version.number, version.blob_key)
    engine.add_adapter(ref, load_adapter(open_blobs(fleet).fetch_folder(version.blob_key)))
    encoder = encoder_for(fleet.base("v1").path, 32)
    rows = load_rows(more / "valid.jsonl")
    for index, row in enumerate(rows):
        params = SamplingParams(temperature=0.0, max_tokens=8)
        engine.submit(Request(str(index), tuple(encoder.encode_prompt(row.prompt)), params, ref))
    texts = dict.fromkeys(map(str, range(len(rows))), "")
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.text
    right = sum(texts[str(index)] == row.completion for index, row in enumerate(rows))
    assert 100.0 * right / len(rows) == version.details["accuracy_by_stage"]["letters"]


def test_a_rollout_moves_the_stage_to_live(world: OpenedFleet):
    fleet, registry, _ = world
    rollout = Rollout(registry, "v1", lambda version: None, replace(fleet.rollout, canary_s=0.0))
    while rollout.is_busy():
        rollout.tick()
    live = registry.routes()["usual"].live
    assert live.details["stage"] == "letters"
    assert registry.version(live.parent_id).status is Status.RETIRED


def test_the_next_stage_continues_from_the_directions_of_the_last(world: OpenedFleet, tmp_path: Path):
    fleet, registry, _ = world
    blobs = open_blobs(fleet)
    parent = letters_of(registry)
    rows = [Row(f"{number} z:", "zZ") for number in range(100, 130)]
    data = write_task(tmp_path / "z", Task(rows[:20], rows[20:25], rows[25:]))
    wanted = NextStage("usual", "last", data, rank=6)
    version = add_stage(lenient(fleet), registry, blobs, wanted, METHOD)
    before, after = state_of(fleet, parent), state_of(fleet, version)
    assert len(after.directions) == 3
    torch.testing.assert_close(gram(after.directions)[:2, :2], gram(before.directions))
    assert load_adapter(blobs.fetch_folder(version.blob_key)).max_rank == version.details["rank"] == 6
    assert 0.0 <= version.details["lost_energy"] < 1.0
    assert version.parent_id == parent.id


# The gate


def test_the_gate_refuses_forgetting_and_learning_nothing():
    old = {"start": 95.0, "one": 80.0, "new": 0.0}
    assert setback(old, {"start": 90.0, "one": 85.0, "new": 0.1}, "new", 5.0) is None
    assert setback(old, {"start": 89.0, "one": 80.0, "new": 99.0}, "new", 5.0) == (
        "stage 'start' fell from 95.0 to 89.0 points, and may drop 5"
    )
    assert "'one' fell from 80.0 to 0.0" in str(setback(old, {"start": 95.0, "one": 0.0, "new": 9.0}, "new", 5.0))
    assert "'new' gained nothing" in str(setback(old, {"start": 95.0, "one": 80.0, "new": 0.0}, "new", 5.0))


def test_a_stage_that_forgets_earlier_ones_is_rejected_without_files(world: OpenedFleet, tmp_path: Path):
    fleet, registry, _ = world
    version = add_stage(
        fleet, registry, open_blobs(fleet), NextStage("usual", "pq", rows_of(tmp_path, "pq"), parent=1), PLAIN
    )
    assert version.details["accuracy_by_stage"]["start"] < version.details["parent_accuracy_by_stage"]["start"] - 5
    assert version.status is Status.REJECTED
    assert version.setback is not None
    assert "'start' fell" in version.setback
    assert version.blob_key is None
    assert "state_key" not in version.details
    with pytest.raises(NotFoundError, match="has no files, so it cannot be a parent"):
        add_stage(fleet, registry, open_blobs(fleet), NextStage("usual", "x", tmp_path, parent=version.number), PLAIN)


# Changing methods


def test_recall_keeps_statistics_of_all_stages(world: OpenedFleet):
    fleet, registry, more = world
    version = add_stage(lenient(fleet), registry, open_blobs(fleet), NextStage("usual", "r", more, parent=1), RECALL)
    state = state_of(fleet, version)
    assert num_labels(state) == 5
    assert state.has_readout
    assert len(state.directions) == 2, "the old adapter and the readout"
    assert version.details["accuracy_by_stage"]["r"] > 30, (
        "the bound is low, because the last layer of this tiny model gives poor features"
    )


def num_labels(state: Decoupled) -> int:
    return int((state.classes["places"] == 0).sum()) if state.classes else 0


def test_statistics_that_a_method_drops_are_computed_again(world: OpenedFleet, tmp_path: Path):
    """Contrast, recall, contrast, recall: sketches and statistics cover all stages, or are empty."""
    fleet, registry, _ = world
    states, parent = [], 1
    for letters, way in zip(("x", "p", "s", "u"), (METHOD, RECALL, METHOD, RECALL), strict=True):
        data = rows_of(tmp_path / letters, letters)
        version = learned_despite_forgetting(fleet, registry, NextStage("usual", letters, data, parent=parent), way)
        states.append(state_of(fleet, version))
        parent = version.number
    assert [bool(state.inputs) for state in states] == [True, False, True, False]
    assert [num_labels(state) for state in states] == [0, 5, 0, 7]
    assert [state.has_readout for state in states] == [False, True, False, True]
    assert len(states[3].directions) == 5, "the first readout has become part of the features"


def learned_despite_forgetting(fleet: Fleet, registry: Registry, wanted: NextStage, method: Method) -> Version:
    """Return the version of a stage, even if it has forgotten others."""
    version = add_stage(lenient(fleet), registry, open_blobs(fleet), wanted, method)
    assert version.status is Status.CANDIDATE, version.setback
    return version


def test_a_version_carried_over_has_stages_but_no_state(world: OpenedFleet, tmp_path: Path):
    """An upgrade keeps files and stages. Labels and statistics come from the rows."""
    fleet, registry, _ = world
    parent = letters_of(registry)
    carried = registry.add_version(
        "usual",
        "v1",
        Status.RETIRED,
        blob_key=parent.blob_key,
        content_hash=parent.content_hash,
        details={"stages": parent.details["stages"]},
    )
    data = rows_of(tmp_path, "w")
    with pytest.raises(ConflictError, match="stage 'letters'"):
        add_stage(
            fleet, registry, open_blobs(fleet), NextStage("usual", "letters", data, parent=carried.number), RECALL
        )
    version = learned_despite_forgetting(fleet, registry, NextStage("usual", "w", data, parent=carried.number), RECALL)
    assert set(version.details["accuracy_by_stage"]) == {"start", "letters", "w"}
    assert num_labels(state_of(fleet, version)) == 6


# Refused requests


def refused(world: OpenedFleet, error: type[Exception], match: str, wanted: NextStage, method: Method = METHOD) -> None:
    """Check that a stage is refused before the base is loaded."""
    fleet, registry, _ = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "load_base", lambda folder: pytest.fail("the base was loaded"))
        with pytest.raises(error, match=match):
            add_stage(fleet, registry, open_blobs(fleet), wanted, method)


def test_impossible_stages_are_refused(world: OpenedFleet, tmp_path: Path):
    _, registry, more = world
    start = Path(registry.adapter("usual").data)
    refused(world, InvalidDataError, "already knows every label", NextStage("usual", "again", start))
    refused(world, ConflictError, "stage 'start'", NextStage("usual", "start", more, parent=1))
    refused(world, NotFoundError, "no version usual@99", NextStage("usual", "x", more, parent=99))
    refused(world, NotFoundError, "no live version", NextStage("unknown", "x", more))
    refused(world, InvalidDataError, "cannot be read", NextStage("usual", "x", tmp_path))


def test_ranks_that_do_not_fit_are_refused(world: OpenedFleet):
    more = world[2]
    refused(world, InvalidAdapterError, "serving.max_rank", NextStage("usual", "x", more, parent=1, rank=4096))
    wanted = NextStage("usual", "x", more, parent=1)
    for kind in ("contrast", "recall", "paper"):
        method = method_of(kind, steps=2, learning_rate=1e-3, rank=500)
        refused(world, InvalidAdapterError, "rank 500 does not fit", wanted, method)


def test_missing_rows_of_an_earlier_stage_are_refused(world: OpenedFleet, tmp_path: Path):
    fleet, registry, _ = world
    gone = rows_of(tmp_path / "gone", "g")
    version = learned_despite_forgetting(fleet, registry, NextStage("usual", "gone", gone, parent=1), METHOD)
    (gone / "valid.jsonl").unlink()
    data = rows_of(tmp_path / "then", "t")
    refused(world, InvalidDataError, "gone/valid.jsonl", NextStage("usual", "then", data, parent=version.number))


def test_an_adapter_that_adds_nothing_is_refused(world: OpenedFleet, tmp_path: Path):
    fleet, registry, more = world
    save_adapter(blank(linear_shapes(load_base(fleet.base("v1").path)), 4, 4.0), tmp_path / "zero")
    key = open_blobs(fleet).put_folder(tmp_path / "zero")
    zero = registry.add_version("usual", "v1", Status.RETIRED, blob_key=key, content_hash=key)
    refused(world, InvalidAdapterError, "adds nothing", NextStage("usual", "x", more, parent=zero.number))


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Run the command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["relora", "continual", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        relora.main()
    return end.value.code


def test_the_command_reports_candidates_and_rejections(
    world: OpenedFleet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    fleet, registry, _ = world
    command = [fleet.folder / "fleet.toml", "usual", "--parent", 1, "--direction-rank", 4, "--learning-rate", 0.01]
    good, bad = rows_of(tmp_path / "h", "h"), rows_of(tmp_path / "k", "k")
    assert not run(monkeypatch, *command, "--data", good, "--stage", "h", "--method", "contrast", "--steps", 80)
    version = registry.versions("usual")[-1]
    out = capfd.readouterr().out
    assert f"{version.label}: candidate on v1, rank 8: start" in out
    assert "relora rollout" in out
    assert run(monkeypatch, *command, "--data", bad, "--stage", "k", "--method", "paper", "--steps", 1) == 1
    out = capfd.readouterr().out
    assert "rejected on v1" in out
    assert "it does not go live: stage" in out
    assert "relora rollout" not in out


def test_the_command_refuses_a_negative_learning_rate(
    world: OpenedFleet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    fleet, _, more = world
    command = [fleet.folder / "fleet.toml", "usual", "--data", more, "--stage", "s"]
    assert run(monkeypatch, *command, "--learning-rate", -1) == 2
    assert "--learning-rate" in capfd.readouterr().err


def test_every_method_gets_the_numbers_of_the_command():
    method = method_of("recall", steps=7, learning_rate=0.5, rank=3)
    assert method.recall == Recall(7, rank=3, learning_rate=0.5)
    assert method_of("recall", 7, 0.5).recall == Recall(7, learning_rate=0.5)
    assert (method.steps, method.learning_rate, method.rank_of(5)) == (7, 0.5, 3)
    assert method_of("paper", 7, 0.5).rank_of(1) == 10
    assert method_of("contrast", 7, 0.5).contrasts
    assert method_of("distil", 7, 0.5).inherits
    assert method_of("code", 7, 0.5).optimizer == "sgd"
