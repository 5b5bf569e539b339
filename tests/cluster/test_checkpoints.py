import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.config.settings import MIB, ServingConfig
from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import open_checkpoint
from readapt.training.lora import load_base
from serving.engine.engine import Engine
from serving.engine.request import Request, SamplingParams
from tests.worlds.serving import make_checkpoint


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("single"))


@pytest.fixture
def sharded(tmp_path: Path, single: Path) -> Path:
    folder = tmp_path / "sharded"
    make_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def two_sets(tmp_path: Path, single: Path) -> Path:
    """The shards of one checkpoint with their index, beside the single file of another."""
    folder = make_checkpoint(tmp_path / "two", seed=3)
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(folder / "shards", max_shard_size="100KB")
    for file in (folder / "shards").glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "shards")
    return folder


def assert_same_as_transformers(folder: Path) -> None:
    """Assert that the checkpoint, the engine's model and readapt's model all hold what transformers loads."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.load(name).float(), tensor), name
    tokens = torch.tensor([[7, 99, 3, 250, 12]])
    ours = load_base(folder)(input_ids=tokens).logits[0, -1]
    engine = Engine.open(folder, ServingConfig(memory_bytes=4 * MIB, compiled_kernels=False))
    engine.submit(Request("r", tuple(tokens[0].tolist()), SamplingParams(temperature=0.0, max_tokens=1)))
    [event] = [event for event in engine.step() if event.tokens]
    assert event.tokens == (int(ours.argmax()),)


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(InvalidCheckpointError) as raised:
        open_checkpoint(folder)
    for word in (str(folder), *words):
        assert word in str(raised.value)


def test_single_and_sharded_checkpoints_have_the_same_tensors(single: Path, sharded: Path):
    expected = load_file(single / "model.safetensors")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for checkpoint in (open_checkpoint(single), open_checkpoint(sharded)):
        assert checkpoint.names() == sorted(expected)
        assert checkpoint.config["hidden_size"] == 60
        for name, tensor in expected.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.load(name), tensor)
    assert open_checkpoint(single).fingerprint() == open_checkpoint(sharded).fingerprint()


def test_the_linear_modules_are_those_of_the_model(single: Path):
    model = AutoModelForCausalLM.from_pretrained(single)
    expected = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert open_checkpoint(single).linear_shapes() == expected
    assert len(expected) == 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_keep_their_stored_dtype(tmp_path: Path, dtype: torch.dtype):
    folder = make_checkpoint(tmp_path / "base")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    before = open_checkpoint(folder).fingerprint()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert {checkpoint.load(name).dtype for name in checkpoint.names()} == {dtype}
    assert checkpoint.fingerprint() != before


def test_a_fingerprint_changes_with_one_bit_or_one_name(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "base")
    before = open_checkpoint(folder).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    flat = tensors[name].view(torch.int32).flatten()
    flat[17] ^= 1
    save_file(tensors, folder / "model.safetensors")
    changed = open_checkpoint(folder).fingerprint()
    flat[17] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"note": "only the header differs"})
    assert open_checkpoint(folder).fingerprint() == before != changed
    tensors["renamed"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).fingerprint() != before


def test_scalars_and_empty_tensors_have_fingerprints(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape("scalar") == ()
    assert len(checkpoint.fingerprint()) == 64


def test_the_tokenizer_fingerprint_depends_on_what_determines_token_ids(tmp_path: Path, single: Path):
    folder = make_checkpoint(tmp_path / "base", seed=5)
    expected = open_checkpoint(single).tokenizer_fingerprint()
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"max_length": 7, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(content, indent=3))
    assert open_checkpoint(folder).tokenizer_fingerprint() == expected
    content["model"]["vocab"]["new"] = 999
    file.write_text(json.dumps(content))
    assert open_checkpoint(folder).tokenizer_fingerprint() != expected
    file.unlink()
    with pytest.raises(InvalidCheckpointError, match="tokenizer"):
        open_checkpoint(folder).tokenizer_fingerprint()
    (folder / "vocab.json").write_text("{}")
    assert len(open_checkpoint(folder).tokenizer_fingerprint()) == 64


def test_missing_files_are_named(tmp_path: Path):
    assert_refused(tmp_path / "absent", "no such")
    folder = make_checkpoint(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "model.safetensors", "Pickled")
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json is missing")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_bad_configuration_is_named(tmp_path: Path, content: str):
    folder = make_checkpoint(tmp_path / "base")
    (folder / "config.json").write_text(content)
    assert_refused(folder, "config.json")


def test_a_missing_shard_is_named(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, shard.name, "missing")


def test_a_truncated_file_is_named(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    assert_refused(sharded, shard.name, "truncated")


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        (None, "weight_map"),
        ({"lm_head.weight": 3}, "weight_map"),
        ({"lm_head.weight": "../other/model.safetensors"}, "../other/model.safetensors"),
        ({"no.such.tensor": "shard"}, "no.such.tensor"),
    ],
)
def test_a_bad_index_is_refused(sharded: Path, weight_map: object, word: str):
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    if weight_map == {"no.such.tensor": "shard"}:
        weight_map = {"no.such.tensor": shard}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(sharded, word)


def test_an_unknown_tensor_is_named(single: Path):
    with pytest.raises(InvalidCheckpointError, match="nothing"):
        open_checkpoint(single).load("nothing")


@pytest.mark.parametrize("are_shards_left", [True, False])
def test_a_single_file_beside_a_stale_index_counts(two_sets: Path, are_shards_left: bool, caplog):
    if not are_shards_left:
        for shard in two_sets.glob("model-*.safetensors"):
            shard.unlink()
    assert_same_as_transformers(two_sets)
    assert open_checkpoint(two_sets).fingerprint() != open_checkpoint(make_checkpoint(two_sets / "x")).fingerprint()
    assert "ignored: model.safetensors.index.json" in caplog.text


def test_pickled_weights_beside_do_not_count(sharded: Path):
    other = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    torch.save({name: tensor + 1 for name, tensor in other.items()}, sharded / "pytorch_model.bin")
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    assert_same_as_transformers(sharded)


def test_a_variant_beside_does_not_count_and_alone_is_named(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "base")
    shutil.copy(make_checkpoint(tmp_path / "other", seed=4) / "model.safetensors", folder / "model.fp16.safetensors")
    assert_same_as_transformers(folder)
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "model.fp16.safetensors is a variant")


def test_tensors_that_the_index_lacks_are_read(sharded: Path):
    shared = next(list(load_file(shard)) for shard in sharded.glob("*.safetensors") if len(load_file(shard)) > 2)
    edit_index(sharded, lambda index: index["weight_map"].pop(shared[0]))
    assert_same_as_transformers(sharded)


def test_shards_in_a_subfolder_are_read(sharded: Path):
    (sharded / "parts").mkdir()
    for shard in sharded.glob("model-*.safetensors"):
        shard.rename(sharded / "parts" / shard.name)
    edit_index(sharded, lambda i: i.update(weight_map={n: f"parts/{s}" for n, s in i["weight_map"].items()}))
    assert_same_as_transformers(sharded)


def test_a_file_that_the_configuration_names_is_read(two_sets: Path):
    config = json.loads((two_sets / "config.json").read_text())
    for named in ("model.safetensors.index.json", "model.safetensors"):
        (two_sets / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        assert_same_as_transformers(two_sets)
    for named in ("../base/model.safetensors", "absent.safetensors", "pytorch_model.bin", 7):
        (two_sets / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        assert_refused(two_sets, str(named) if isinstance(named, str) and named.endswith(".safetensors") else "weights")


def test_equal_copies_of_a_tensor_are_accepted_and_different_ones_refused(sharded: Path):
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    name = next(iter(load_file(last)))
    copy = load_file(last)[name].clone()
    save_file({**load_file(first), name: copy}, first, metadata={"format": "pt"})
    assert_same_as_transformers(sharded)
    copy.view(-1)[0] += 1
    save_file({**load_file(first), name: copy}, first, metadata={"format": "pt"})
    assert_refused(sharded, first.name, last.name, name, "different")


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "base")
    (folder / "adapter_config.json").write_text("{}")
    assert_refused(folder, "adapter_config.json", "own folder")


def test_weights_that_transformers_would_make_up_are_refused(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)
    for broken, word in ((tensors, "missing"), ({**tensors, name: whole[:-1].clone()}, "shape")):
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InvalidCheckpointError, match=f"{name}.*{word}"):
            load_base(folder)
        with pytest.raises(InvalidCheckpointError, match=name):
            Engine.open(folder, ServingConfig(memory_bytes=4 * MIB, compiled_kernels=False))


def test_an_index_that_transformers_cannot_read_is_refused_by_readapt(sharded: Path):
    edit_index(sharded, lambda index: index.pop("metadata"))
    with pytest.raises(InvalidCheckpointError, match="metadata"):
        load_base(sharded)
