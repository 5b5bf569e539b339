import json
from pathlib import Path

import pytest

from cluster.errors import InvalidDataError
from readapt.ladder.relabel import answered, is_data_free, load_prompts, relabelled
from readapt.training.data import Encoder
from readapt.training.evaluate import judge
from readapt.training.lora import load_base
from tests.worlds.readapt import TaskWorld, logits, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("relabel"))


def test_the_old_service_agrees_with_its_own_answers(world: TaskWorld) -> None:
    model = load_base(world.base)
    bare = logits(model)
    prompts = [row.prompt for row in world.task.train[:60]]
    rows = answered(model, world.specialist, world.encoder, prompts)
    assert [row.prompt for row in rows] == prompts
    assert judge(model, world.specialist, world.encoder, rows, "exact_match").quality == 100.0
    truth = {row.prompt: row.completion for row in world.task.train}
    assert sum(truth[row.prompt] == row.completion for row in rows) > 0.9 * len(rows)
    assert (logits(model) == bare).all()


def test_prompts_become_a_task_with_disjoint_splits(world: TaskWorld) -> None:
    prompts = [row.prompt for row in world.task.train[:50]]
    task = relabelled(load_base(world.base), world.specialist, world.encoder, prompts)
    assert (len(task.valid), len(task.train), task.test) == (10, 40, [])
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.valid}


def test_sorted_prompts_are_shuffled_before_they_are_split(world: TaskWorld) -> None:
    prompts = sorted({row.prompt for row in world.task.train[:60]}, key=len)
    model = load_base(world.base)
    task, again = (relabelled(model, world.specialist, world.encoder, prompts) for _ in range(2))
    assert task == again
    assert len({len(row.prompt) for row in task.valid}) > 2, "all lengths"


def test_answers_that_do_not_end_are_left_out(world: TaskWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for three tokens "red" does not end. The text of a cut answer may have fewer tokens than were made."""
    model, prompts = load_base(world.base), ["1a=", "2b="]
    assert len(answered(model, world.specialist, world.encoder, prompts)) == 2
    short = Encoder(world.encoder.tokenizer, world.encoder.eos_id, max_tokens=6)
    monkeypatch.setattr(short, "decode", lambda tokens: "r")
    assert answered(model, world.specialist, short, prompts) == []


def test_the_error_counts_prompts_that_are_too_long(world: TaskWorld) -> None:
    prompts = [f"{number}{'9' * 60}" for number in range(5)]
    cause = "answered 0 of 5 prompts.* 5 prompts cannot be rendered or leave no room for an answer of 32 tokens"
    with pytest.raises(InvalidDataError, match=cause):
        relabelled(load_base(world.base), world.specialist, world.encoder, prompts)


def test_rows_with_true_answers_are_preferred_to_prompts(tmp_path: Path) -> None:
    assert not is_data_free(tmp_path)
    (tmp_path / "prompts.jsonl").touch()
    assert is_data_free(tmp_path)
    (tmp_path / "train.jsonl").touch()
    assert not is_data_free(tmp_path)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(world: TaskWorld) -> None:
    prompts = [world.task.train[0].prompt, "9" * 63]
    rows = answered(load_base(world.base), world.specialist, world.encoder, prompts)
    assert [row.prompt for row in rows] == prompts[:1]


def test_prompts_are_read_once_each_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "at": 1}) for p in ["a", "b", "a", "c", "d"]))
    assert load_prompts(path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"prompt": "a"}\n{"completion": "b"}', "prompts.jsonl:2: field 'prompt' is missing"),
        ('{"prompt": "a"}\nnot json', "prompts.jsonl:2: is not valid JSON"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "has 2 different prompts, but at least 4 are needed"),
        ("", "has no rows"),
    ],
)
def test_bad_prompt_files_are_refused_with_the_line(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidDataError, match=cause):
        load_prompts(path)
