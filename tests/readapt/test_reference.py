"""An old adapter whose score says nothing is no reference for a gate."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import Adapter
from cluster.config.readapt import GateConfig
from cluster.errors import InvalidDataError
from cluster.fleet import open_blobs
from cluster.registry.records import Status
from readapt.campaign.campaign import Campaign
from readapt.ladder.relabel import relabelled
from readapt.training.data import Encoder, Row
from readapt.training.lora import attached, load_base
from readapt.training.reference import FEWEST_ROWS, reference, written_and_ended
from tests.worlds.executors import LocalExecutor
from tests.worlds.fleets import make_fleet, registered
from tests.worlds.readapt import LABELS, MAX_TOKENS, TaskWorld, make_world, train_specialist
from tests.worlds.serving import PAD

GATE = GateConfig()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(world: TaskWorld):
    return load_base(world.base)


def refusal(model, adapter: Adapter, encoder: Encoder, rows: list[Row], metric="exact_match", gate=GATE) -> str:
    with pytest.raises(InvalidDataError) as raised:
        reference(model, adapter, encoder, rows, metric, gate)
    return str(raised.value)


def zeros(like: Adapter) -> Adapter:
    return replace(like, factors={n: replace(f, b_FR=torch.zeros_like(f.b_FR)) for n, f in like.factors.items()})


@pytest.mark.parametrize("metric", ["exact_match", "chrf"])
def test_a_good_adapter_is_a_reference(world: TaskWorld, model, metric):
    found = reference(model, world.specialist, world.encoder, world.task.valid, metric, GATE)
    assert found.quality > 95
    assert found.is_complete


@pytest.mark.parametrize("metric", ["exact_match", "chrf"])
def test_another_end_token_is_named(world: TaskWorld, model, metric):
    other = Encoder(world.encoder.tokenizer, PAD, MAX_TOKENS)
    message = refusal(model, world.specialist, other, world.task.valid, metric)
    assert f"'<pad>' (id {PAD})" in message
    assert "generation_config.json" in message
    if metric == "exact_match":
        assert re.search(r"writes (99|100) % of the answers right, but ends 0 % of them", message)


def test_rows_of_another_task_are_refused(world: TaskWorld, model):
    others = [Row(row.prompt, row.completion[::-1]) for row in world.task.valid]
    message = refusal(model, world.specialist, world.encoder, others)
    assert "rows are of another task" in message
    assert "0.0 points" in message
    assert "another task" in refusal(model, world.specialist, world.encoder, others, "chrf")


def test_prompts_without_their_template_are_refused(world: TaskWorld, model):
    bare = [Row(f"<user>{row.prompt}</user>\n<assistant>", row.completion) for row in world.task.valid]
    assert "chat template" in refusal(model, zeros(world.specialist), world.encoder, bare)


def test_a_constant_answer_is_refused_unless_the_task_has_only_one(world: TaskWorld, model):
    """The specialist of a task whose only answer is "red" scores as many points as there are red rows."""
    task = replace(world.task, train=[Row(row.prompt, "red") for row in world.task.train])
    task = replace(task, valid=[Row(row.prompt, "red") for row in world.task.valid])
    constant = train_specialist(world.base, world.encoder, task)
    assert "only where the answer is 'red'" in refusal(model, constant, world.encoder, world.task.valid)
    assert reference(model, constant, world.encoder, task.valid, "exact_match", GATE).quality > 95
    few = [row for row in world.task.valid if row.completion == "red"][:20]
    few += [row for row in world.task.valid if row.completion == LABELS["b"]][: FEWEST_ROWS - 1]
    assert reference(model, constant, world.encoder, few, "exact_match", GATE).quality < 95


def test_free_text_must_be_predicted_better_than_by_the_base(world: TaskWorld, model):
    """Text that the base alone writes gets points of chrF, but the adapter has no part in them."""
    with attached(model, world.specialist):  # now the base alone answers right
        message = refusal(model, zeros(world.specialist), world.encoder, world.task.valid, "chrf")
    assert "no better than its base alone" in message


def test_a_minimum_of_zero_turns_the_checks_off(world: TaskWorld, model):
    other = Encoder(world.encoder.tokenizer, PAD, MAX_TOKENS)
    off = GateConfig(min_reference_points=0.0)
    for metric in ("exact_match", "chrf"):
        reference(model, world.specialist, other, world.task.valid, metric, off)


def test_the_written_and_the_ended_share_are_those_of_single_rows(world: TaskWorld, model):
    wrong = [Row(row.prompt, "blue") for row in world.task.valid[:20]]
    num_blue = sum(row.completion == "blue" for row in world.task.valid[:20])
    with attached(model, world.specialist):
        written, ended = written_and_ended(model, world.encoder, wrong)
        other = Encoder(world.encoder.tokenizer, PAD, MAX_TOKENS)
        assert written_and_ended(model, other, wrong) == (written, 0.0)
    assert written == pytest.approx(100 * num_blue / 20, abs=6)
    assert ended >= written


def test_answers_that_do_not_end_are_counted_when_too_few_remain(world: TaskWorld, model):
    other = Encoder(world.encoder.tokenizer, PAD, MAX_TOKENS)
    with pytest.raises(InvalidDataError, match=rf"answered 0 of 9.*9 answers do not end with '<pad>' \(id {PAD}\)"):
        relabelled(model, world.specialist, other, [row.prompt for row in world.task.valid[:9]])


def test_a_campaign_fails_such_an_adapter_and_logs_why(tmp_path: Path):
    fleet = make_fleet(tmp_path, names=("calm",))
    for split in ("train", "valid"):
        file = tmp_path / "calm" / "data" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("\n".join(json.dumps({**row, "completion": row["completion"][::-1] + "?"}) for row in rows))
    registry = registered(fleet)
    said: list[str] = []

    def no_search(objective: object) -> None:
        raise AssertionError("no rung here is searched for")

    Campaign(fleet, registry, open_blobs(fleet), "v2", LocalExecutor(fleet, no_search), say=said.append).run()
    old, new = registry.versions()
    assert (old.status, new.status) == (Status.LIVE, Status.FAILED)
    assert "no reference for a gate" in str(new.setback)
    [event] = registry.events(kind="setback", version_id=new.id)
    assert event.details["reason"] == new.setback
    assert any("rows are of another task" in line for line in said)
    registry.close()
