"""Bad input in a campaign: the error is clear, the registry consistent, and the old version stays live."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cluster.adapters.dialect import base_dialect
from cluster.adapters.files import load_adapter, save_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.readapt import LadderConfig
from cluster.config.settings import Fleet
from cluster.errors import InvalidCheckpointError
from cluster.fleet import open_blobs
from cluster.registry.registry import Registry, Status, Version
from readapt.campaign.base_pair import EVOLUTION
from readapt.campaign.campaign import Campaign
from readapt.campaign.jobs import AdapterJob, JobUpdate
from readapt.fusion.points import COPY, CORNERS
from readapt.training.data import encoder_for
from tests.worlds.executors import LocalExecutor, Scripted, result_for
from tests.worlds.fleets import make_fleet, registered
from tests.worlds.readapt import MAX_TOKENS, evolve, make_task, train_specialist, try_points, write_task
from tests.worlds.serving import make_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fleet(tmp_path_factory.mktemp("world")).folder


def run(fleet: Fleet, registry: Registry, executor: Any = None, say: Any = None) -> list[Version]:
    executor = executor or Scripted(lambda job: result_for(fleet, job))
    say = say or (lambda line: None)
    return Campaign(fleet, registry, open_blobs(fleet), "v2", executor, lease_s=2.0, say=say).run()


def local(fleet: Fleet) -> LocalExecutor:
    return LocalExecutor(fleet, lambda objective: try_points(objective, CORNERS))


def check_all_failed(settled: list[Version], registry: Registry, *words: str) -> None:
    """Check that each adapter failed with these words and that its old version is still live."""
    assert [version.status for version in settled] == [Status.FAILED] * 3
    for version in settled:
        for word in words:
            assert word in version.details["error"]
        assert (version.blob_key, version.quality) == (None, None)
        assert registry.routes()[version.adapter].live.number == 1


def shard(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return sorted(folder.glob("model-*.safetensors"))


# The bases


def test_a_target_with_a_missing_shard_stops_the_campaign_at_once(fleet: Fleet, registry: Registry):
    missing = shard(fleet.base("v2").path)[1]
    missing.unlink()
    with pytest.raises(InvalidCheckpointError, match=f"shard '{missing.name}' is missing"):
        run(fleet, registry)
    assert registry.versions(base="v2") == []
    assert set(registry.routes()) == {"busy", "usual", "calm"}


def test_an_old_base_with_a_missing_shard_fails_its_adapters(fleet: Fleet, registry: Registry):
    missing = shard(fleet.base("v1").path)[1]
    missing.unlink()
    check_all_failed(run(fleet, registry), registry, "InvalidCheckpointError", f"shard '{missing.name}' is missing")


def test_an_old_base_with_replaced_weights_fails_its_adapters(fleet: Fleet, registry: Registry):
    """The adapters were registered for weights with another fingerprint."""
    make_checkpoint(fleet.base("v1").path, seed=9)
    check_all_failed(run(fleet, registry), registry, "ConflictError", "'v1' is registered with other weights")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named(fleet: Fleet, registry: Registry, name: str):
    file = fleet.base("v2").path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[7] = float("inf") if "norm" in name else float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    check_all_failed(run(fleet, registry), registry, "InvalidCheckpointError", name, "not finite")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, ("num_hidden_layers 3", "num_hidden_layers 2")),
        ({"hidden_size": 72, "head_dim": 12}, ("hidden_size 72", "hidden_size 60")),
        ({"num_attention_heads": 3, "head_dim": 20, "num_key_value_heads": 1}, ("heads 3", "heads 6")),
    ],
)
def test_another_shape_is_an_error_before_any_work(
    fleet: Fleet, registry: Registry, change: dict[str, int], words: Any
):
    """Even if only the heads changed and every matrix kept its size."""
    make_checkpoint(fleet.base("v2").path, **change)
    executor = Scripted(lambda job: result_for(fleet, job))
    check_all_failed(run(fleet, registry, executor), registry, *words, "from scratch", "distil")
    assert executor.jobs == []
    assert registry.events(kind=EVOLUTION) == []


def test_tokenizers_are_compared_once_per_pair_of_bases(
    fleet: Fleet, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    file = fleet.base("v2").path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
    file.write_text(json.dumps(content))
    opened: list[Any] = []
    monkeypatch.setattr(
        "readapt.campaign.base_pair.base_dialect", lambda *args: opened.append(args) or base_dialect(*args)
    )
    executor = Scripted(lambda job: result_for(fleet, job))
    settled = run(fleet, registry, executor)
    check_all_failed(settled, registry, "256 of 256 tokens", "from scratch", "distil")
    assert executor.jobs == []
    assert len(opened) == 2, "two tokenizers, for three adapters"


def test_for_scratch_alone_ids_may_mean_other_tokens(fleet: Fleet, registry: Registry):
    """The error advises training from scratch, so it must be possible."""
    file = fleet.base("v2").path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
    file.write_text(json.dumps(content))
    scratch = replace(fleet.readapt, ladder=LadderConfig(rungs=("scratch",)))
    only_scratch = replace(fleet, readapt=scratch)
    settled = run(only_scratch, registry, local(only_scratch))
    assert {version.details["rung"] for version in settled} == {"scratch"}
    assert Status.FAILED not in {version.status for version in settled}


def test_special_tokens_may_get_new_names(fleet: Fleet, registry: Registry):
    """Reserved tokens get names once a later version uses them."""
    file = fleet.base("v2").path / "tokenizer.json"
    file.write_text(file.read_text().replace("<pad>", "<tool>"))
    config = fleet.base("v2").path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<pad>", "<tool>"))
    assert {version.status for version in run(fleet, registry)} == {Status.CANDIDATE}


# A vocabulary that grows


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_adapters_are_carried_over_to_a_base_with_more_tokens(tmp_path: Path, is_tied: bool):
    old = make_checkpoint(tmp_path / "v1", std=0.08, tie_word_embeddings=is_tied)
    encoder, task = encoder_for(old, MAX_TOKENS), make_task()
    save_adapter(train_specialist(old, encoder, task), tmp_path / "adapter")
    write_task(tmp_path / "task", task)
    grow(evolve(old, tmp_path / "v2", rank=4, scale=0.8), ["<think>", "=red", "12"])
    (tmp_path / "fleet.toml").write_text(
        'name = "grown"\n[[bases]]\nname = "v1"\npath = "v1"\n[[bases]]\nname = "v2"\npath = "v2"\n'
        '[[adapters]]\nname = "a"\npath = "adapter"\nbase = "v1"\ndata = "task"\n'
        f"[readapt.train]\nmax_tokens = {MAX_TOKENS}\n[readapt.gate]\ntolerance_points = 5.0\n"
        "[readapt.ladder]\ncopy_cosine = -1.0\n"
    )
    fleet = load_fleet(tmp_path / "fleet.toml")
    registry, lines = registered(fleet), []
    (version,) = run(fleet, registry, local(fleet), lines.append)
    assert version.status is Status.CANDIDATE, version.details
    assert version.details["copy_quality"] < 90 < version.quality
    shipped = load_adapter(open_blobs(fleet).fetch_folder(version.blob_key))
    assert {module.rsplit(".", 1)[-1] for module in shipped.factors} >= {"q_proj", "down_proj"}
    assert any("another tokenizer: 3 tokens were added, the old ids are unchanged" in line for line in lines)


def grow(folder: Path, tokens: list[str]) -> None:
    """Add tokens to a checkpoint's tokenizer, and rows at the end of its embeddings."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    model.save_pretrained(folder)


# The rows, the training, the disk


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "train.jsonl:2: field 'completion' is missing"),
        ('{"prompt": "a", "completion": "b"}\n\n[1]\n', "train.jsonl:3: must be a JSON object"),
    ],
)
def test_bad_rows_fail_only_their_adapter(fleet: Fleet, registry: Registry, content: str, words: str):
    (fleet.folder / "busy" / "data" / "train.jsonl").write_text(content)
    by_name = {version.adapter: version for version in run(fleet, registry, local(fleet))}
    assert by_name["busy"].status is Status.FAILED
    assert words in by_name["busy"].details["error"]
    assert by_name["usual"].status is by_name["calm"].status is Status.CANDIDATE
    assert registry.routes()["busy"].live.number == 1


def test_diverged_runs_do_not_end_the_campaign(fleet: Fleet, registry: Registry):
    """All training diverges, so only the starts are left. Every adapter is still worked on."""
    train = replace(fleet.readapt.train, learning_rate=1e30, scratch_learning_rate=1e30)
    broken = replace(fleet, readapt=replace(fleet.readapt, train=train))
    settled = run(broken, registry, LocalExecutor(broken, lambda objective: try_points(objective, [COPY])))
    assert [version.adapter for version in settled] == ["busy", "usual", "calm"]
    for version in settled:
        json.dumps(version.details, allow_nan=False)
        is_good = version.quality >= version.details["reference_quality"] - fleet.readapt.gate.tolerance_points
        assert version.status is (Status.CANDIDATE if is_good else Status.REJECTED)
        assert version.details["reference_quality"] > 85, "a diverged run does not lower the gate"
        assert registry.routes()[version.adapter].live.number == 1


def test_a_full_disk_fails_the_adapter_and_leaves_nothing_behind(
    fleet: Fleet, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    full: set[str] = set()
    write = LocalFileOpener.write

    def write_while_there_is_room(self: LocalFileOpener, *args: Any, **more: Any) -> int:
        if full and self.tell() + len(args[0]) > 5_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **more)

    def answer(job: AdapterJob) -> JobUpdate:
        full.clear()
        if job.adapter == "usual":
            full.add("the disk")
        result = result_for(fleet, job)
        adapter = result.outcome.adapter
        changed = replace(adapter, is_rslora=not adapter.is_rslora)  # other content than the old adapter's files
        return replace(result, outcome=replace(result.outcome, adapter=changed))

    monkeypatch.setattr(LocalFileOpener, "write", write_while_there_is_room)
    by_name = {version.adapter: version for version in run(fleet, registry, Scripted(answer))}
    assert {name: version.status for name, version in by_name.items()} == {
        "busy": Status.CANDIDATE,
        "usual": Status.FAILED,
        "calm": Status.CANDIDATE,
    }
    assert "No space left on device" in by_name["usual"].details["error"]
    assert by_name["usual"].blob_key is None
    assert registry.routes()["usual"].live.number == 1
    assert not list(Path(fleet.blobs).glob(".*")), "no partial file is left"
    full.clear()
    (again,) = run(fleet, registry)
    assert (again.label, again.status) == ("usual@2", Status.CANDIDATE), "it is tried again"
