import json
import math
import re
import resource
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.adapters.files import (
    Adapter,
    LoraFactors,
    check_base,
    check_base_copies,
    check_fits,
    load_adapter,
    save_adapter,
)
from cluster.errors import InvalidAdapterError, StorageError
from cluster.storage.checkpoints import open_checkpoint
from tests.worlds.serving import KINDS, make_adapter, make_checkpoint

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 250
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    return make_adapter(tmp_path / "adapter", checkpoint, modules=("q_proj", "down_proj"))


def logits_of_peft(checkpoint: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(folder)).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def logits_of_merged(checkpoint: Path, adapter: Adapter) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    if "lm_head" in adapter.factors or "model.embed_tokens" in adapter.factors:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untie it from the embedding
    with torch.no_grad():
        for module, factors in adapter.factors.items():
            weight = model.get_submodule(module).weight
            weight.copy_(factors.adapted(weight.T).T if factors.is_embedding else factors.adapted(weight))
        return model(TOKENS).logits


def assert_same_logits(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=2e-4)


def random_adapter(checkpoint: Path, *, is_rslora: bool, keep: str = "") -> Adapter:
    """Return an adapter with different ranks and scalings in every module."""
    generator = torch.Generator().manual_seed(3)
    shapes = open_checkpoint(checkpoint).linear_shapes()
    factors = {}
    for i, (module, (num_out, num_in)) in enumerate(sorted(shapes.items())):
        if keep in module:
            a_RD = torch.randn(1 + i % 5, num_in, generator=generator) * 0.2
            b_FR = torch.randn(num_out, 1 + i % 5, generator=generator) * 0.2
            factors[module] = LoraFactors(a_RD, b_FR, 0.3 + math.pi * (i % 4))
    return Adapter(factors, is_rslora, "the-base")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True},
        {"rank_pattern": {"q_proj": 3, "mlp.up_proj": 5}},
        {"alpha_pattern": {"o_proj": 3.5, r"layers\.1\..*v_proj": 2}},
        {"rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 7, "down_proj": 1}},
        {"modules": ("v_proj",), "rank": 1, "alpha": 3},
        {"dora": True, "rslora": True, "rank_pattern": {"q_proj": 3}},
        {"modules": ("embed_tokens",)},
        {"modules": ("lm_head", "embed_tokens", "q_proj"), "rank_pattern": {"lm_head": 3}},
        {"modules": ("lm_head", "embed_tokens", "q_proj"), "dora": True},
    ],
    ids=lambda s: "+".join(s) or "plain",
)
def test_reads_an_adapter_as_peft_does(tmp_path: Path, checkpoint: Path, settings: dict[str, Any]):
    ranks = settings.pop("rank_pattern", {})
    by_kind = {kind: rank for key, rank in ranks.items() for kind in (*KINDS, "lm_head") if key.endswith(kind)}
    folder = make_adapter(tmp_path / "adapter", checkpoint, rank_pattern=by_kind, **settings)
    rewrite_config(folder, rank_pattern=ranks)
    adapter = load_adapter(folder)
    kinds = settings.get("modules", KINDS)
    assert len(adapter.factors) == sum(1 if kind in ("embed_tokens", "lm_head") else 2 for kind in kinds)
    assert adapter.is_dora == settings.get("dora", False)
    reference = logits_of_peft(checkpoint, folder)
    assert_same_logits(logits_of_merged(checkpoint, adapter), reference)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)(TOKENS).logits
    assert (plain - reference).abs().max() > 0.1


def test_reads_what_peft_itself_writes(tmp_path: Path, checkpoint: Path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"layers.0.self_attn.o_proj": 9},
        layers_to_transform=None,
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        reference = model(TOKENS).logits
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.is_rslora
    assert adapter.base_model == str(checkpoint)
    assert adapter.max_rank == 7
    assert_same_logits(logits_of_merged(checkpoint, adapter), reference)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}]
    + [
        {"target_modules": [*names, "q_proj"]} for names in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])
    ],
    ids=["embedding-tying", "embedding", "head", "both"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns about tied weights and saved embeddings
def test_embeddings_and_heads_survive_a_round_trip_through_peft(
    tmp_path: Path, checkpoint: Path, tied: Path, is_tied: bool, targets: dict[str, Any], use_dora: bool
):
    """We read what PEFT writes with the same meaning, and PEFT then reads what we write."""
    from peft import LoraConfig, get_peft_model

    base = tied if is_tied else checkpoint
    config = LoraConfig(r=4, init_lora_weights=False, use_dora=use_dora, **targets)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 1.3 if "magnitude" in name else 0.2 if "embedding" in name else 1.0
        reference = model(TOKENS).logits
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert ("model.embed_tokens.weight" in adapter.base_copies) == ("embed_tokens" in targets["target_modules"])
    check_base(adapter, open_checkpoint(base))
    assert_same_logits(logits_of_merged(base, adapter), reference)
    save_adapter(adapter, tmp_path / "ours")
    assert not load_adapter(tmp_path / "ours").base_copies
    assert_same_logits(logits_of_peft(base, tmp_path / "ours"), reference)


def test_a_convolution_is_flattened_and_written_back(tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 5, (2, 4)), torch.nn.ReLU(), torch.nn.Conv2d(5, 7, 1))

    images = torch.randn(2, 3, 6, 6)
    model = get_peft_model(network(), LoraConfig(r=2, init_lora_weights=False, target_modules=["0", "2"])).eval()
    with torch.no_grad():
        reference = model(images)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    assert {name: (f.shape, f.kernel) for name, f in adapter.factors.items()} == {
        "0": ((5, 24), (2, 4)),
        "2": ((7, 5), (1, 1)),
    }
    save_adapter(adapter, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(network(), tmp_path / "ours").eval()(images), reference)


def test_a_stored_copy_of_a_base_weight_must_equal_the_base(tmp_path: Path, checkpoint: Path):
    folder = make_adapter(tmp_path / "adapter", checkpoint, modules=("embed_tokens", "lm_head"))
    stored = open_checkpoint(checkpoint)
    table, head = (stored.load(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    weights = {"model.embed_tokens.weight": table, "lm_head.weight": head}
    table_name, head_name = (f"base_model.model.{name}.base_layer.weight" for name in ("model.embed_tokens", "lm_head"))
    rewrite_tensors(folder, {table_name: table, head_name: head.bfloat16()})
    check_base_copies(load_adapter(folder), weights.get)
    check_base_copies(load_adapter(folder), {name: weight.half() for name, weight in weights.items()}.get)
    for name, changed in ((table_name, table[:-1]), (table_name, table + 0.1), (head_name, head * 1.1)):
        rewrite_tensors(folder, {table_name: table, head_name: head, name: changed})
        with pytest.raises(InvalidAdapterError, match="retrained or resized"):
            check_base_copies(load_adapter(folder), weights.get)
    with pytest.raises(InvalidAdapterError, match=r"'model\.embed_tokens\.weight', which the base model does not have"):
        check_base_copies(load_adapter(folder), {"lm_head.weight": head * 1.1}.get)


@pytest.mark.parametrize("is_rslora", [False, True])
@pytest.mark.parametrize("keep", ["", "layers.1.", "layers.0.self_attn.k_proj"])
def test_peft_reads_what_we_write(tmp_path: Path, checkpoint: Path, is_rslora: bool, keep: str):
    adapter = random_adapter(checkpoint, is_rslora=is_rslora, keep=keep)
    save_adapter(adapter, tmp_path / "adapter")
    assert_same_logits(logits_of_merged(checkpoint, adapter), logits_of_peft(checkpoint, tmp_path / "adapter"))


@settings(deadline=None, max_examples=40)
@given(
    modules=st.dictionaries(
        st.sampled_from([f"model.layers.{i}.self_attn.{kind}" for i in (0, 1, 10, 11) for kind in KINDS[:4]]),
        st.tuples(st.integers(1, 9), st.floats(-100, 100)),
        min_size=1,
    ),
    is_rslora=st.booleans(),
)
def test_writing_and_reading_gives_the_same_adapter(
    tmp_path_factory: pytest.TempPathFactory, modules: dict[str, tuple[int, float]], is_rslora: bool
):
    factors = {m: LoraFactors(torch.randn(r, 6), torch.randn(5, r), s) for m, (r, s) in modules.items()}
    folder = tmp_path_factory.mktemp("roundtrip") / "adapter"
    save_adapter(Adapter(factors, is_rslora, "base"), folder)
    back = load_adapter(folder)
    assert list(back.factors) == sorted(factors)
    assert (back.is_rslora, back.base_model) == (is_rslora, "base")
    for module, ours in factors.items():
        theirs = back.factors[module]
        assert torch.equal(theirs.a_RD, ours.a_RD)
        assert torch.equal(theirs.b_FR, ours.b_FR)
        assert theirs.scaling == pytest.approx(ours.scaling, rel=1e-14, abs=1e-300)


def test_whole_alphas_are_written_as_whole_numbers(tmp_path: Path):
    factors = LoraFactors(torch.ones(8, 4), torch.ones(3, 8), 16 / math.sqrt(8))
    save_adapter(Adapter({"model.layers.0.mlp.up_proj": factors}, is_rslora=True), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_leftovers_of_a_killed_save_do_not_block_the_next_one(tmp_path: Path, checkpoint: Path):
    adapter = random_adapter(checkpoint, is_rslora=False)
    save_adapter(adapter, tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / ".adapter.old")
    save_adapter(adapter, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").factors.keys() == adapter.factors.keys()


def test_a_save_that_fails_at_the_last_step_restores_the_older_adapter(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "adapter"
    save_adapter(random_adapter(checkpoint, is_rslora=False), folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    rename = Path.rename

    def renamed(source: Path, target: Path) -> Path:
        if target == folder and not source.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(StorageError, match="No space"):
        save_adapter(random_adapter(checkpoint, is_rslora=True), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_saving_replaces_an_older_adapter_completely(tmp_path: Path, checkpoint: Path):
    save_adapter(random_adapter(checkpoint, is_rslora=False), tmp_path / "adapter")
    (tmp_path / "adapter/stale.txt").write_text("from before")
    newer = random_adapter(checkpoint, is_rslora=True, keep="q_proj")
    save_adapter(newer, tmp_path / "adapter")
    assert list(load_adapter(tmp_path / "adapter").factors) == list(newer.factors)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert len(list((tmp_path / "adapter").iterdir())) == 2


def test_half_precision_files_become_float32(tmp_path: Path, folder: Path):
    original = load_file(folder / "adapter_model.safetensors")
    save_file({name: t.to(torch.bfloat16) for name, t in original.items()}, folder / "adapter_model.safetensors")
    for module, factors in load_adapter(folder).factors.items():
        assert factors.a_RD.dtype == torch.float32
        expected = original[f"base_model.model.{module}.lora_A.weight"].to(torch.bfloat16).float()
        assert torch.equal(factors.a_RD, expected)


def test_sizes_are_as_stored(folder: Path, checkpoint: Path):
    adapter = load_adapter(folder)
    assert adapter.max_rank == 8
    stored = sum(factors.a_RD.numel() + factors.b_FR.numel() for factors in adapter.factors.values())
    assert stored == sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())
    shapes = open_checkpoint(checkpoint).linear_shapes()
    assert all(
        factors.shape == shapes[module] == tuple(factors.delta().shape) for module, factors in adapter.factors.items()
    )


# Errors, each with its cause


def rewrite_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def assert_refused(folder: Path, *words: str, max_rank: int | None = None) -> None:
    with pytest.raises(InvalidAdapterError) as raised:
        load_adapter(folder, max_rank=max_rank)
    for word in (str(folder), *words):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "without a DoRA magnitude"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "some"}, "bias='some'"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"a_new_method": {"strength": 2}}, "a_new_method={'strength': 2}"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"target_modules": ["down_proj"]}, "does not select module 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": "(q_proj"}, "cannot be read"),
        ({"target_modules": 7}, "cannot be read"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": None}, "None"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "rank"),
        ({"r": "8"}, "'8'"),
        ({"r": 4}, "says 4"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"rank_pattern": {"(q_proj": 8}}, "bad pattern"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_served_is_refused_by_name(folder: Path, changes: dict[str, Any], word: str):
    rewrite_config(folder, **changes)
    assert_refused(folder, word)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (f"{Q0}.lora_B.weight", torch.full((60, 8), math.nan), ["NaN", "q_proj.lora_B"]),
        (f"{Q0}.lora_A.weight", torch.full((8, 60), math.inf), ["infinite"]),
        (f"{Q0}.lora_A.weight", torch.full((8, 60), 1e300, dtype=torch.float64), ["infinite"]),
        (f"{Q0}.lora_A.weight", torch.ones(8, 60, dtype=torch.int8), ["int8"]),
        (f"{Q0}.lora_A.weight", torch.ones(5, 60), ["(5, 60)", "(60, 8)"]),
        (f"{Q0}.lora_A.weight", torch.ones(8, 60, 1), ["(8, 60, 1)"]),
        (f"{Q0}.lora_A.weight", torch.ones(8, 0), ["(8, 0)"]),
        (f"{Q0}.lora_A.weight", None, ["lora_B without its counterpart"]),
        (f"{Q0}.lora_magnitude_vector", torch.ones(60), ["use_dora", "with a DoRA magnitude"]),
        (f"{Q0}.lora_B.bias", torch.ones(60), ["lora_bias"]),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(8, 260), ["lora_A without"]),
        (f"{Q0}.lora_B.default.bias", torch.ones(60), ["lora_bias"]),
        (f"{Q0}.lora_A.other.weight", torch.ones(8, 60), ["same part", "lora_A.other.weight"]),
        (f"{Q0}.lora_diag", torch.ones(8), ["KaSA"]),
        ("base_model.model.lm_head.modules_to_save.default.weight", torch.ones(260, 60), ["modules_to_save"]),
        ("base_model.model.model.embed_tokens.trainable_tokens_delta", torch.ones(1, 60), ["trainable tokens"]),
        ("base_model.model.model.mlp.experts.base_layer.lora_A.weight", torch.ones(8, 60), ["target_parameters"]),
        ("base_model.model.model.embed_tokens.weight", torch.ones(260, 60, dtype=torch.int8), ["int8"]),
        ("something.else", torch.ones(3), ["unknown", "something.else"]),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[-30:],
)
def test_weights_that_cannot_be_served_are_refused_by_name(
    folder: Path, name: str, tensor: torch.Tensor | None, words: list[str]
):
    rewrite_tensors(folder, {name: tensor})
    assert_refused(folder, *words)


def test_the_rank_limit_holds_before_data_is_read(folder: Path):
    assert load_adapter(folder, max_rank=8).max_rank == 8
    assert_refused(folder, "rank 8", "limit of 7", max_rank=7)


def test_missing_files_are_named_and_pickles_refused(folder: Path, tmp_path: Path):
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    assert_refused(folder, "adapter_model.bin", "pickled")
    (folder / "adapter_model.bin").unlink()
    assert_refused(folder, "adapter_model.safetensors is missing")
    (folder / "adapter_config.json").unlink()
    assert_refused(folder, "adapter_config.json is missing")
    assert_refused(tmp_path / "absent", "adapter_config.json is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_configuration_that_is_not_a_json_object_is_refused(folder: Path, content: bytes):
    (folder / "adapter_config.json").write_bytes(content)
    assert_refused(folder, "adapter_config.json")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(folder, "truncated")


def test_a_header_with_an_absurd_size_is_refused(folder: Path):
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert_refused(folder, "truncated")


def test_an_adapter_without_weights_is_refused(folder: Path):
    save_file({}, folder / "adapter_model.safetensors")
    assert_refused(folder, "no LoRA weights")


def test_fit_is_checked_module_by_module(folder: Path, checkpoint: Path):
    adapter = load_adapter(folder)
    shapes = open_checkpoint(checkpoint).linear_shapes()
    check_fits(adapter, shapes)
    module = "model.layers.1.mlp.down_proj"
    with pytest.raises(InvalidAdapterError, match=rf"{re.escape(module)}.*\(60, 92\).*\(60, 93\)"):
        check_fits(adapter, shapes | {module: (60, 93)})
    del shapes[module]
    with pytest.raises(InvalidAdapterError, match=re.escape(module)):
        check_fits(adapter, shapes)


@pytest.mark.parametrize("limit_bytes", [100, 5_000])
def test_a_full_disk_is_reported_and_the_old_files_stay(folder: Path, limit_bytes: int):
    before = load_adapter(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            save_adapter(Adapter({name: replace(f, scaling=9.0) for name, f in before.factors.items()}), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert load_adapter(folder).factors[Q0.removeprefix("base_model.model.")].scaling != 9.0
