"""A small version of the demo's world: its parts, that it is reproducible, and that it is cached."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cluster.adapters.files import check_fits, load_adapter
from cluster.config.fleet_file import load_fleet
from cluster.errors import ConfigError
from cluster.storage.blobs import content_hash
from cluster.storage.checkpoints import open_checkpoint
from demo import corpus
from demo.lexicon import fill
from demo.pretrain import END, END_ID, BaseShape, Pretraining, Texts, train_base
from demo.specialists import Specialist, single_threaded, train_specialist
from demo.tasks import CUE, SPLITS, TASKS, make_rows
from demo.world import FULL, NEW, OLD, QUICK, Recipe, WorldInfo, build, kit_world
from readapt.training.data import encoder_for, load_task
from readapt.training.lora import load_base
from tests.worlds.serving import make_checkpoint

MICRO = Recipe(
    title="micro",
    shape=BaseShape(32, 48, num_layers=1, num_heads=4, num_kv_heads=2, vocab_size=400, context_tokens=128),
    v1=Pretraining(12, 4e-3, rows=(6, 2, 0), window_tokens=32),
    v2=Pretraining(8, 2e-3, rows=(2, 0, 6), window_tokens=32),
    tasks=("sentiment", "describe"),
    num_chars=20_000,
    specialist_steps=4,
    rows={"train": 40, "valid": 12, "test": 12},
)


@pytest.fixture(scope="module")
def progress() -> list[tuple[str, float]]:
    return []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, progress: list[tuple[str, float]]) -> WorldInfo:
    return build(tmp_path_factory.mktemp("worlds") / "micro", MICRO, lambda what, share: progress.append((what, share)))


def _no_progress(what: str, share: float) -> None:
    raise AssertionError(f"{what} was made again")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompts_are_unique_and_in_one_split_only(task):
    rows = make_rows(task, QUICK.rows, seed=0)
    prompts = [row["prompt"] for split in SPLITS for row in rows[split]]
    assert [len(rows[split]) for split in SPLITS] == [QUICK.rows[split] for split in SPLITS]
    assert len(set(prompts)) == len(prompts)
    assert all(prompt.endswith(CUE) and "{" not in prompt for prompt in prompts)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_one_prompt_has_one_answer_and_no_answer_dominates(task):
    rng = random.Random(0)
    answers: dict[str, set[str]] = {}
    for _ in range(4000):
        text, answer = task.draw(rng)
        answers.setdefault(text, set()).add(answer)
    assert all(len(found) == 1 for found in answers.values()), [t for t, found in answers.items() if len(found) > 1]
    valid = [row["completion"] for row in make_rows(task, QUICK.rows, seed=0)["valid"]]
    assert max(valid.count(answer) for answer in set(valid)) < 0.5 * len(valid)


def test_rows_depend_on_the_seed_alone():
    task = TASKS[0]
    assert make_rows(task, MICRO.rows, seed=3) == make_rows(task, MICRO.rows, seed=3)
    assert make_rows(task, MICRO.rows, seed=3) != make_rows(task, MICRO.rows, seed=4)


def test_the_tasks_of_the_recipes_differ_as_the_demo_promises():
    chosen = [task for task in TASKS if task.name in FULL.tasks]
    assert len(chosen) == len(FULL.tasks) >= 6
    assert len({task.rank for task in chosen}) >= 3
    assert sum(task.is_rslora for task in chosen) == 1
    assert len({task.modules for task in chosen}) >= 2
    for recipe in (FULL, QUICK):
        assert any(task.metric == "chrf" for task in TASKS if task.name in recipe.tasks)


def test_slots_of_one_kind_get_different_words():
    for seed in range(50):
        text, words = fill("{price} {price2} {price3}", random.Random(seed))
        assert len(set(words.values())) == 3
        assert text == " ".join(words.values())


@pytest.mark.parametrize("make", [corpus.stories, corpus.prose, corpus.programs])
def test_texts_are_as_long_as_asked_and_the_same_each_time(make):
    texts = make(30_000, seed=1)
    assert 30_000 <= sum(map(len, texts)) < 34_000
    assert texts == make(30_000, seed=1) != make(30_000, seed=2)
    assert not any(END in text for text in texts)


def test_no_slot_is_left_open_in_a_story():
    assert not any("{" in text for text in corpus.stories(100_000, seed=0))


def test_the_fleet_file_loads_and_ties_the_world_together(world):
    fleet = load_fleet(world.fleet)
    assert [base.name for base in fleet.bases] == [OLD, NEW]
    assert {spec.name: spec.metric for spec in fleet.adapters} == {"sentiment": "exact_match", "describe": "chrf"}
    assert fleet.readapt.train.max_tokens == MICRO.readapt["max_tokens"]
    for spec in fleet.adapters:
        task, shapes = load_task(spec.data), open_checkpoint(fleet.base(spec.base).path).linear_shapes()
        assert (len(task.train), len(task.valid), len(task.test)) == (40, 12, 12)
        adapter = load_adapter(spec.path)
        check_fits(adapter, shapes)
        assert any(bool(factors.b_FR.any()) for factors in adapter.factors.values()), "untrained"
    assert load_adapter(world.folder / "adapters" / "describe").is_rslora
    assert set(world.quality_v1) == {"sentiment", "describe"}


def test_v2_is_v1_trained_further(world):
    old, new = (open_checkpoint(world.bases[name]) for name in (OLD, NEW))
    assert old.tokenizer_fingerprint() == new.tokenizer_fingerprint()
    name = "model.layers.0.self_attn.q_proj.weight"
    distance = (new.load(name) - old.load(name)).norm() / old.load(name).norm()
    assert 0.01 < distance < 1.0


def test_documents_and_answers_end_with_the_same_token(world):
    encoder = encoder_for(world.bases[NEW], max_tokens=128)
    row = load_task(world.data / "describe").test[0]
    encoded = encoder.encode(row)
    assert encoder.eos_id == encoded.input_ids[-1] == END_ID
    assert encoded.input_ids.count(END_ID) == 1, "eos occurs only at the end"
    assert encoder.decode(encoded.input_ids) == row.prompt + row.completion
    assert load_base(world.bases[OLD]).generation_config.eos_token_id == END_ID
    tokenizer = AutoTokenizer.from_pretrained(world.bases[OLD])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


def test_progress_reports_each_stage_to_its_end(world, progress):
    last = dict(progress)
    assert last == {"base v1": 1.0, "base v2": 1.0, "adapters": 1.0}
    for stage in last:
        shares = [share for what, share in progress if what == stage]
        assert shares == sorted(shares)


def test_a_finished_world_is_reused_only_for_the_same_recipe(world, tmp_path):
    again = build(world.folder, MICRO, _no_progress)
    assert again == replace(world, is_reused=True)
    record = tmp_path / "world.json"
    record.write_text((world.folder / "world.json").read_text())
    with pytest.raises(AssertionError, match="base v1 was made again"):
        build(tmp_path, replace(MICRO, seed=1), _no_progress)
    assert not record.exists(), "a half-made world does not count as finished"


def test_bases_and_specialists_are_the_same_each_time(world, tmp_path):
    """Bit for bit, in separate processes and in one."""
    with single_threaded():
        texts = Texts.make(MICRO.shape.vocab_size, MICRO.seed, MICRO.num_chars)
        train_base(None, tmp_path / OLD, texts, MICRO.shape, MICRO.v1, lambda share: None)
        train_base(tmp_path / OLD, tmp_path / NEW, texts, MICRO.shape, MICRO.v2, lambda share: None)
        for spec in world.specs:
            train_specialist(spec, tmp_path / OLD, world.data / spec.name, tmp_path / spec.name)
    for name in (OLD, NEW):
        assert content_hash(tmp_path / name) == content_hash(world.bases[name])
    for spec in world.specs:
        made, again = (
            folder / spec.name / "adapter_model.safetensors" for folder in (world.folder / "adapters", tmp_path)
        )
        for name, tensor in load_file(made).items():
            assert torch.equal(tensor, load_file(again)[name]), (spec.name, name)


def test_a_run_gets_a_fresh_folder_with_the_same_fleet(world, tmp_path):
    path = world.new_run(tmp_path / "run")
    (tmp_path / "run" / "registry.db").touch()
    assert world.new_run(tmp_path / "run") == path
    assert not (tmp_path / "run" / "registry.db").exists()
    fleet = load_fleet(path)
    assert fleet.adapters == load_fleet(world.fleet).adapters
    assert fleet.serving.port >= 1024
    assert fleet.registry.endswith("run/registry.db")


def test_a_folder_that_is_not_a_run_is_kept(world, tmp_path):
    (tmp_path / "fleet.toml").write_text('name = "mine"')
    with pytest.raises(ConfigError, match="not an earlier run"):
        world.new_run(tmp_path)
    assert (tmp_path / "fleet.toml").exists()


def test_missing_parts_of_a_kit_are_named(tmp_path):
    make_checkpoint(tmp_path / "models" / "stories3m-v1")
    with pytest.raises(ConfigError, match=r"stories3m-v2-strong.*tasks/snips"):
        kit_world(tmp_path / "out", tmp_path, ["snips"], _no_progress)


def test_a_task_of_a_kit_gets_a_specialist_and_nothing_is_copied(tmp_path):
    kit = tmp_path / "kit"
    make_checkpoint(kit / "models" / "stories3m-v1")
    make_checkpoint(kit / "models" / "stories3m-v2-strong", seed=1)
    _write_kit_task(kit / "tasks" / "snips")
    info = kit_world(tmp_path / "out", kit, ["snips"], lambda what, share: None)
    fleet = load_fleet(info.fleet)
    assert [base.path for base in fleet.bases] == [kit / "models" / f"stories3m-{name}" for name in ("v1", "v2-strong")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapters", "fleet.toml", "world.json"]
    assert info.quality_v1["snips"] > 50, "one letter decides between two answers"
    assert kit_world(tmp_path / "out", kit, ["snips"], _no_progress).is_reused


def _write_kit_task(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": folder.name, "kind": "classification"}))
    for index, split in enumerate(SPLITS):
        rows = [{"prompt": f"{'ab'[n % 2]} {index}{n}", "completion": "yn"[n % 2]} for n in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_specialist_is_never_worse_than_its_start(world, tmp_path):
    spec = Specialist("sentiment", "exact_match", rank=2, steps=2, learning_rate=1.0)
    assert train_specialist(spec, world.bases[OLD], world.data / "sentiment", tmp_path / "adapter") >= 0.0
    assert load_adapter(tmp_path / "adapter").max_rank == 2
