import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.checkpoints import open_checkpoint
from cluster.errors import InvalidCheckpointError
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
