"""An upgrade reads an adapter's rows as the adapter does, and the new version keeps its tokenizer and end token."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.adapters.dialect import DIALECT, base_dialect
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs
from cluster.registry.records import Status, Version
from cluster.storage.jsonl import write_lines
from readapt.campaign.assess import Assessor
from readapt.campaign.campaign import Campaign
from readapt.training.data import Row
from tests.worlds.dialects import CHATML, chat_tokenizer, chat_world, teach
from tests.worlds.executors import LocalExecutor
from tests.worlds.fleets import evolve, registered
from tests.worlds.readapt import make_rows

END = "<|im_end|>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases that end with <|endoftext|>, and an adapter of the first that was taught to end with <|im_end|>."""
    folder = tmp_path_factory.mktemp("world")
    v1 = chat_world(folder / "v1", initializer_range=0.08)
    evolve(v1, chat_world(folder / "v2", initializer_range=0.08), strength=0.3)
    rows = list(dict.fromkeys(make_rows(260, seed=0)))
    write_lines(folder / "data" / "train.jsonl", map(asdict, rows[:120]))
    write_lines(folder / "data" / "valid.jsonl", map(asdict, rows[120:180]))
    teach(v1, folder / "bot", rows[:120], END, AutoTokenizer.from_pretrained(v1))
    chat_tokenizer(folder / "bot", template=CHATML, eos=END)
    (folder / "fleet.toml").write_text(
        'name = "tiny"\n[[bases]]\nname = "v1"\npath = "v1"\n[[bases]]\nname = "v2"\npath = "v2"\n'
        '[[adapters]]\nname = "bot"\npath = "bot"\nbase = "v1"\ndata = "data"\n'
        "[readapt.train]\nfull_steps = 60\nshort_steps = 20\nscratch_steps = 120\neval_every = 20\nmax_tokens = 64\n"
    )
    return folder


@pytest.fixture
def fleet(world: Path, tmp_path: Path) -> Fleet:
    shutil.copytree(world, tmp_path / "fleet")
    return load_fleet(tmp_path / "fleet" / "fleet.toml")


def upgraded(fleet: Fleet) -> Version:
    registry = registered(fleet)

    def no_search(objective: object) -> None:
        raise AssertionError("no rung here is searched for")

    [settled] = Campaign(fleet, registry, open_blobs(fleet), "v2", LocalExecutor(fleet, no_search)).run()
    registry.close()
    return settled


def share_right(base: Path, adapter: Path, rows: list[Row]) -> float:
    """Return the share of rows that transformers and PEFT answer right, up to the adapter's own end token."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    num_right = 0
    for row in rows:
        inputs = tokenizer(row.prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        num_right += tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]) == row.completion + END
    return num_right / len(rows)


def test_rows_are_judged_up_to_the_adapters_own_end_token_and_the_new_version_keeps_it(fleet: Fleet):
    candidate = upgraded(fleet)
    assert candidate.status is Status.CANDIDATE, candidate.details
    assert candidate.details["reference_quality"] > 95
    assert candidate.blob_key is not None
    blobs = open_blobs(fleet)
    folder = blobs.fetch_folder(candidate.blob_key)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (fleet.folder / "bot" / name).read_bytes()
    dialect = blobs.fetch_folder(candidate.details[DIALECT])
    assert (dialect / "chat_template.jinja").read_text() == CHATML
    rows = [Row(**json.loads(line)) for line in (fleet.folder / "data" / "valid.jsonl").read_text().splitlines()]
    assert share_right(fleet.base("v2").path, folder, rows[:20]) > 0.9
    answers = {row.prompt: row.completion for row in rows}
    golden = candidate.details["golden"]
    assert golden
    assert all(answers[each["prompt"]] == each["completion"] for each in golden)


def test_prompts_alone_are_answered_up_to_the_adapters_own_end_token(fleet: Fleet):
    prompts = [{"prompt": row.prompt} for row in dict.fromkeys(make_rows(60, seed=4))]
    shutil.rmtree(fleet.folder / "data")
    write_lines(fleet.folder / "data" / "prompts.jsonl", prompts)
    candidate = upgraded(fleet)
    assert candidate.status is Status.CANDIDATE, candidate.details
    assert candidate.details["reference_quality"] == 100


def test_without_its_tokenizer_the_adapter_fails_and_the_reason_names_the_end_token(fleet: Fleet):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (fleet.folder / "bot" / name).unlink()
    failed = upgraded(fleet)
    assert failed.status is Status.FAILED
    assert "ends 0 % of them" in str(failed.setback)
    assert "'<|endoftext|>' (id 256)" in str(failed.setback)


def test_a_target_whose_ids_differ_from_the_adapters_tokenizer_fails_it_by_name(fleet: Fleet):
    """The target's own tokenizer knows all tokens of the old base, but the adapter's has one more than its rows."""
    chat_tokenizer(fleet.folder / "bot", template=CHATML, eos=END, extra=[f"<|x{number}|>" for number in range(5)])
    rows = base_dialect(fleet.base("v1").path).tokenizer
    assert len(rows) == 259
    smaller = chat_world(fleet.folder / "smaller", initializer_range=0.08, vocab_size=len(rows))
    shutil.rmtree(fleet.folder / "v2")
    smaller.rename(fleet.folder / "v2")
    failed = upgraded(fleet)
    assert failed.status is Status.FAILED
    assert "beyond the base's 259 embeddings" in str(failed.setback)


def test_an_assessment_reads_the_rows_as_the_adapter_does(fleet: Fleet):
    registry = registered(fleet)
    [found] = Assessor(fleet, registry, open_blobs(fleet), "v2", lambda line: None).assess_all()
    registry.close()
    assert found.error is None
    assert found.corners is not None
    assert found.corners.old.quality > 95
