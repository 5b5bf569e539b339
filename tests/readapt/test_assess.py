"""Assessments of real adapters on bases that changed a little, a lot, and completely."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster.adapters.files import save_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs, open_registry, register_adapters
from cluster.registry.registry import Registry, Status
from cluster.storage.checkpoints import open_checkpoint
from readapt.campaign.assess import Assessment, Assessor, as_json, as_table
from readapt.campaign.base_pair import EVOLUTION
from readapt.campaign.order import ASSESSED, expected_seconds
from readapt.campaign.prediction import Corners, Rung, climb_seconds, configured, predict, with_transplant
from readapt.training.evaluate import Evaluation
from relora import app
from tests.worlds.readapt import TaskWorld, evolve, make_world, write_task
from tests.worlds.serving import make_checkpoint

TARGETS = ("same", "mild", "low", "strong", "stranger")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("assess"))


@pytest.fixture(scope="module")
def fleet(world: TaskWorld) -> Fleet:
    """One specialist, twice, and v1 unchanged, changed a little, at low rank, at full rank, and another model."""
    folder = world.base.parent
    evolve(world.base, folder / "same", rank=1, scale=0.0)
    evolve(world.base, folder / "mild", rank=None, scale=0.01)
    evolve(world.base, folder / "low", rank=4, scale=0.8)
    evolve(world.base, folder / "strong", rank=None, scale=0.8)
    make_checkpoint(folder / "stranger", std=0.08, seed=1)
    write_task(folder / "task", world.task)
    save_adapter(world.specialist, folder / "adapter")
    lines = ['name = "tiny"']
    lines += [f'[[bases]]\nname = "{name}"\npath = "{name}"' for name in ("v1", *TARGETS)]
    for name, traffic in (("calm", 1.0), ("busy", 4.0)):
        files = 'path = "adapter"\ndata = "task"\nbase = "v1"'
        lines.append(f'[[adapters]]\nname = "{name}"\ntraffic = {traffic}\n{files}')
    lines.append("[readapt.search]\nevolution_rank = 64\nevolution_energy = 0.999\n[readapt.train]\nmax_tokens = 128")
    (folder / "fleet.toml").write_text("\n".join(lines))
    return load_fleet(folder / "fleet.toml")


@pytest.fixture(scope="module")
def registry(fleet: Fleet) -> Registry:
    registry = open_registry(fleet)
    register_adapters(fleet, registry, open_blobs(fleet))
    return registry


def assess_all(fleet: Fleet, registry: Registry, target: str) -> list[Assessment]:
    return Assessor(fleet, registry, open_blobs(fleet), target, lambda line: None).assess_all()


@pytest.mark.parametrize(
    ("target", "rung"),
    [("same", "copy"), ("mild", "copy"), ("low", "transplant"), ("strong", "transplant"), ("stranger", "scratch")],
)
def test_the_predicted_rung_for_each_update(fleet: Fleet, registry: Registry, target: str, rung: str):
    busy, calm = assess_all(fleet, registry, target)
    assert (busy.version, calm.version) == ("busy@1", "calm@1"), "busiest first"
    assert busy.error is None
    assert busy.rung == calm.rung == rung, busy.reason
    assert busy.corners is not None
    assert busy.corners.old.quality > 90
    assert busy.tokenizer == "same"
    assert (
        len([e for e in registry.events(kind=EVOLUTION) if e.details["new"] == registry.base(target).fingerprint]) == 1
    )


def test_more_work_is_expected_on_higher_rungs(fleet: Fleet, registry: Registry):
    found = assess_all(fleet, registry, "strong")[0].expected_s
    assert found is not None
    assert found > 0
    copy, transplant, train, scratch = (
        climb_seconds(rung, 0.01, 100, 20, fleet.readapt) for rung in ("copy", "transplant", "train", "scratch")
    )
    assert scratch > 2 * train > 4 * copy
    assert train > transplant > copy


def test_energies_match_the_full_spectrum(fleet: Fleet, registry: Registry, world: TaskWorld):
    energy = assess_all(fleet, registry, "strong")[0].energy
    assert energy is not None
    old, new = (open_checkpoint(fleet.base(name).path) for name in ("v1", "strong"))
    total, at_8, at_4, norms = 0.0, 0.0, 0.0, []
    for module, factors in world.specialist.factors.items():
        before, after = (c.load(f"{module}.weight").double() for c in (old, new))
        squares = torch.linalg.svdvals(after - before).square()
        total, at_8, at_4 = total + squares.sum(), at_8 + squares[: factors.rank].sum(), at_4 + squares[:4].sum()
        norms.append(float((after - before).norm() / before.norm()))
    assert energy.at_rank == pytest.approx(float(at_8 / total), rel=1e-3)
    assert energy.spectrum[4] == pytest.approx(float(at_4 / total), rel=1e-3)
    assert energy.relative_norm == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    assert list(energy.spectrum.values()) == sorted(energy.spectrum.values())
    assert energy.at_rank < 0.7 < energy.at_evolution_rank
    low = assess_all(fleet, registry, "low")[0].energy
    assert low is not None
    assert low.at_rank == pytest.approx(1.0, abs=2e-3), "a change of rank 4 fits an adapter of rank 8"


def test_an_unchanged_base_has_no_energy(fleet: Fleet, registry: Registry):
    energy = assess_all(fleet, registry, "same")[0].energy
    assert energy is not None
    assert (energy.relative_norm, energy.at_rank, energy.spectrum) == (0.0, 1.0, {})


def test_a_campaign_uses_the_assessed_seconds(fleet: Fleet, registry: Registry):
    assess_all(fleet, registry, "strong")
    event = registry.events(kind=ASSESSED)[-1]
    planned = replace(registry.routes()[event.adapter].live, id=99, parent_id=event.version_id, base="strong")
    assert expected_seconds(registry, [planned]) == {event.adapter: event.details["expected_s"]}


def test_an_adapter_that_cannot_be_assessed_gets_an_error_and_stops_no_other(fleet: Fleet, registry: Registry):
    key = registry.routes()["busy"].live.blob_key
    registry.add_adapter("brought", traffic=9.0)
    version = registry.add_version("brought", "v1", Status.LIVE, blob_key=key)
    brought, busy, _ = found = assess_all(fleet, registry, "mild")
    registry.move(version.id, Status.LIVE, Status.RETIRED)
    assert "no rows" in str(brought.error)
    assert brought.rung == "none"
    assert brought.corners is None
    assert busy.error is None
    assert json.loads(as_json(found, "mild"))["adapters"][0]["error"] == brought.error
    assert as_table(found, "mild").row_count == 3


def test_an_error_of_torch_stops_no_other_adapter(fleet: Fleet, registry: Registry, monkeypatch: pytest.MonkeyPatch):
    def out_of_memory(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Assessor, "_measure", out_of_memory)
    assert [found.error for found in assess_all(fleet, registry, "mild")] == ["out of memory"] * 2


def test_the_error_for_another_vocabulary_says_what_to_do(fleet: Fleet, registry: Registry, tmp_path: Path):
    other = evolve(fleet.base("v1").path, tmp_path / "other", rank=1, scale=0.1)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
    file.write_text(json.dumps(tokenizer))
    spec = replace(fleet.bases[0], name="other", path=other)
    changed = replace(fleet, bases=(*fleet.bases, spec))
    for found in assess_all(changed, registry, "other"):
        assert "of 256 tokens" in str(found.error)
        assert "train them from scratch on the new base, or distil" in str(found.error)
        assert found.rung == "none"


def test_an_adapter_is_assessed_on_the_rows_of_all_its_stages(
    fleet: Fleet, registry: Registry, world: TaskWorld, tmp_path: Path
):
    """It answers the second stage's rows wrongly, which are half of all rows."""
    wrong = [replace(row, completion="mauve") for row in world.task.valid]
    more = write_task(tmp_path / "more", replace(world.task, valid=wrong))
    stages = [{"name": "start", "data": str(fleet.folder / "task")}, {"name": "more", "data": str(more)}]
    files = {"blob_key": registry.routes()["busy"].live.blob_key}
    registry.add_adapter("staged", data=str(fleet.folder / "task"), traffic=9.0)
    version = registry.add_version("staged", "v1", Status.LIVE, **files, details={"stages": stages})
    found = assess_all(fleet, registry, "mild")[0]
    shutil.rmtree(more)
    without = assess_all(fleet, registry, "mild")[0]
    registry.move(version.id, Status.LIVE, Status.RETIRED)
    assert found.corners is not None
    assert 40 < found.corners.old.quality < 85
    assert without.error == f"{more}: no such folder; staged@1 was trained on its rows."


def test_the_command_prints_every_error_in_full_and_fails(fleet: Fleet, tmp_path: Path):
    copy = shutil.copytree(fleet.folder, tmp_path / "a-folder-whose-name-leaves-no-room-in-a-table" / "fleet")
    bad = copy / "task" / "valid.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    result = CliRunner().invoke(app, ["assess", str(copy / "fleet.toml"), "--to", "same"], catch_exceptions=False)
    assert result.exit_code == 1
    for name in ("busy", "calm"):
        assert any(line.startswith(f"{name}@1: {bad}:2: ") for line in result.output.splitlines())
    assert "scratch" not in result.output


def test_the_command_prints_and_writes_json(fleet: Fleet, tmp_path: Path):
    out = tmp_path / "report.json"
    command = ["assess", str(fleet.folder / "fleet.toml"), "--to", "low", "--out", str(out)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "busy@1" in result.output
    report = json.loads(out.read_text())
    assert report["to"] == "low"
    assert {a["rung"] for a in report["adapters"]} == {"transplant"}
    assert set(report["adapters"][0]["corners"]) == {"old", "copy", "undo", "bare"}


@pytest.mark.parametrize(
    ("rung", "rungs", "found"),
    [
        ("fused", ("copy", "fused", "train"), "fused"),
        ("fused", ("copy", "transplant", "fused", "train"), "transplant"),
        ("fused", ("copy", "train"), "train"),
        ("copy", ("fused", "train"), "fused"),
        ("scratch", ("copy", "train"), "train"),
    ],
)
def test_a_rung_that_is_not_configured_is_not_predicted(rung: Rung, rungs: tuple[Rung, ...], found: str):
    assert configured(rung, rungs) == found


@pytest.mark.parametrize(
    ("old_loss", "rung", "found"),
    [
        (0.1, "copy", "copy"),
        (0.1, "train", "transplant"),
        (0.1, "scratch", "transplant"),
        (math.nan, "scratch", "scratch"),
    ],
)
def test_a_transplant_is_expected_if_copies_fail(old_loss: float, rung: Rung, found: str):
    corners = Corners(*(Evaluation(loss, 90.0, 48) for loss in (old_loss, 4.0, 4.0, 5.0)))
    assert with_transplant(rung, "why", corners)[0] == found


def test_without_rows_the_old_adapters_answers_are_the_reference(
    fleet: Fleet, registry: Registry, world: TaskWorld, tmp_path: Path
):
    key = registry.routes()["busy"].live.blob_key
    prompts = [json.dumps({"prompt": row.prompt}) for row in world.task.valid]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    registry.add_adapter("logged", data=str(tmp_path), traffic=9.0)
    version = registry.add_version("logged", "v1", Status.LIVE, blob_key=key)
    found = assess_all(fleet, registry, "mild")[0]
    registry.move(version.id, Status.LIVE, Status.RETIRED)
    assert found.error is None
    assert found.corners is not None
    assert found.corners.old.quality == 100.0
    assert found.rung == "copy"


@pytest.mark.parametrize(
    ("losses", "qualities", "rung"),
    [
        ((0.1, 0.12, 0.5, 5.0), (90, 90, 50, 0), "copy"),
        ((0.1, 0.12, 0.13, 5.0), (90, 60, 90, 0), "fused"),  # a low loss is not enough: answers must be right
        ((0.1, 2.7, 1.9, 8.4), (97, 0, 0, 0), "train"),
        ((0.1, 4.2, 5.6, 4.4), (97, 0, 0, 0), "scratch"),
        ((0.1, float("nan"), float("nan"), 4.4), (97, 0, 0, 0), "scratch"),
        ((float("nan"), 0.1, 0.1, 4.4), (97, 97, 97, 0), "scratch"),
        ((0.1, float("nan"), 1.9, 8.4), (97, 0, 0, 0), "train"),
    ],
)
def test_predictions(losses: tuple[float, ...], qualities: tuple[float, ...], rung: str):
    corners = Corners(*(Evaluation(loss, float(q), 48) for loss, q in zip(losses, qualities, strict=True)))
    assert predict(corners, 1.0)[0] == rung
