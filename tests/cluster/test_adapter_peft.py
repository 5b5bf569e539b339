"""Adapters as people publish them: we load what PEFT loads, with the same logits, or refuse and name the cause."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.adapters.files import check_base, load_adapter
from cluster.errors import InvalidAdapterError
from cluster.storage.checkpoints import open_checkpoint
from tests.cluster.test_adapter_files import TOKENS, logits_of_merged
from tests.worlds.serving import make_checkpoint

pytestmark = [  # PEFT warns about what this file is about
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, whose attention has biases."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, "Qwen2ForCausalLM", tie_word_embeddings=request.param == "tied", num_hidden_layers=3)


def publish(folder: Path, base: Path, *, save: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write an adapter with random factors by means of PEFT itself."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1.2
    model.save_pretrained(folder, **(save or {}))
    edit_config(folder, lambda config: config.update(init_lora_weights=True))  # missing factors then stay at zero
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file)


def peft_logits(base: Path, folder: Path, adapter_name: str = "default") -> torch.Tensor:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def our_logits(base: Path, folder: Path) -> torch.Tensor:
    adapter = load_adapter(folder)
    check_base(adapter, open_checkpoint(base))
    return logits_of_merged(base, adapter)


def assert_alike(base: Path, folder: Path, adapter_name: str = "default") -> None:
    reference = peft_logits(base, folder, adapter_name)
    torch.testing.assert_close(our_logits(base, folder), reference, rtol=1e-4, atol=3e-4)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    assert (plain - reference).abs().max() > 0.05, "the adapter has an effect"


def renamed(name: str, adapter: str) -> str:
    """Return a tensor's name as it is in a model whose adapter has this name."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        name = name.replace(f".{part}", f".{part}.{adapter}")
    return name.replace(".lora_magnitude_vector", f".lora_magnitude_vector.{adapter}.weight")


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r"model\.layers\.[01]\..*(q_proj|up_proj)"},
    "patterns": {"rank_pattern": {r"layers\.1\..*q_proj": 2, "down_proj": 5}, "alpha_pattern": {"^model.*q_proj": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": r".*layers\.0\..*"},
    "excluded ends": {"exclude_modules": ["layers.1.self_attn.q_proj", "nothing"]},
    "biases unchanged": {"bias": "all"},
    "own biases unchanged": {"bias": "lora_only"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "embeddings saved": {"save": {"save_embedding_layers": True}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "embeddings tied": {"target_modules": ["embed_tokens", "k_proj"], "ensure_weight_tying": True},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_peft_saves_has_the_same_logits(tmp_path: Path, base: Path, settings: dict[str, Any]):
    assert_alike(base, publish(tmp_path / "adapter", base, **settings))


@pytest.mark.parametrize("adapter", ["default", "policy", "0"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}], ids=["lora", "dora", "embedding"]
)
def test_keys_may_have_the_adapters_name(tmp_path: Path, base: Path, adapter: str, settings: dict[str, Any]):
    folder = publish(tmp_path / "adapter", base, **settings)
    reference = our_logits(base, folder)
    edit_tensors(folder, lambda tensors: {renamed(name, adapter): t for name, t in tensors.items()})
    assert_alike(base, folder, adapter)
    assert torch.equal(our_logits(base, folder), reference)


def test_keys_may_lack_the_prefix(tmp_path: Path, base: Path):
    folder = publish(tmp_path / "adapter", base, save={"save_embedding_layers": True})
    reference = our_logits(base, folder)
    edit_tensors(folder, lambda tensors: {name.removeprefix("base_model.model."): t for name, t in tensors.items()})
    assert torch.equal(our_logits(base, folder), reference)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path, base: Path):
    folder = publish(tmp_path / "adapter", base)
    edit_tensors(folder, lambda ts: {renamed(name, "a" if "layers.0" in name else "b"): t for name, t in ts.items()})
    with pytest.raises(InvalidAdapterError, match="several adapters: 'a', 'b'"):
        load_adapter(folder)


# What each PEFT release (or another program) writes that others do not, at values without effect.
RELEASES: dict[str, Callable[[dict[str, Any]], object]] = {
    "0.2": lambda c: c.update(enable_lora=None, merge_weights=False),
    "keys of 0.2 only": lambda c: [c.pop(key) for key in list(c) if key not in OLD_KEYS],
    "0.5": lambda c: c.update(revision=None, auto_mapping=None, layers_pattern=None, layers_to_transform=None),
    "empty lists": lambda c: c.update(
        layers_to_transform=[], layers_pattern=[], exclude_modules=[], modules_to_save=[]
    ),
    "0.8": lambda c: c.update(loftq_config={}, megatron_config=None, megatron_core="megatron.core"),
    "0.14": lambda c: c.update(eva_config=None, lora_bias=False, layer_replication=None),
    "0.16": lambda c: c.update(use_qalora=False, qalora_group_size=16, corda_config=None),
    "start": lambda c: c.update(init_lora_weights="gaussian"),
    "a later one": lambda c: c.update(use_better_lora=False, better_config=None, better_modules=[]),
    "Unsloth": lambda c: c.update(auto_mapping={"base_model_class": "X", "unsloth_fixed": True}, unsloth_fixed=True),
    "ms-swift": lambda c: c.update(lora_dtype="bfloat16", lorap_lr_ratio=16.0, lorap_emb_lr=1e-6),
    "no targets": lambda c: c.update(target_modules=None),
}
OLD_KEYS = (
    "base_model_name_or_path bias fan_in_fan_out inference_mode lora_alpha lora_dropout modules_to_save peft_type r "
    "target_modules task_type"
)


@pytest.mark.parametrize("change", RELEASES.values(), ids=RELEASES)
def test_configurations_of_every_release_are_read_as_peft_reads_them(
    tmp_path: Path, base: Path, change: Callable[[dict[str, Any]], object]
):
    folder = publish(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    edit_config(folder, change)
    assert_alike(base, folder)


# Edits after which PEFT loads something else than the factors in the file say.
TRAPS: dict[str, tuple[dict[str, Any], str]] = {
    "targets": ({"target_modules": ["q_proj"]}, "target_modules"),
    "targets of an expression": ({"target_modules": r".*layers\.0\.self_attn\.q_proj"}, "target_modules"),
    "targets by default": ({"target_modules": None}, "target_modules"),
    "excluded": ({"exclude_modules": ["down_proj"]}, "exclude_modules"),
    "layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "no such layers": ({"layers_to_transform": [0, 1, 2], "layers_pattern": "blocks"}, "layers_to_transform"),
    "dora": ({"use_dora": True}, "use_dora"),
    "bias of the factors": ({"lora_bias": True}, "lora_bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    "copied layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "activated": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "a later start": ({"init_lora_weights": "tomorrow"}, "tomorrow"),
    "a later method": ({"use_better_lora": True}, "use_better_lora"),
    "another kind": ({"peft_type": "LOHA"}, "LOHA"),
    "another task": ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
}


@pytest.mark.parametrize(("changes", "word"), TRAPS.values(), ids=TRAPS)
def test_what_peft_would_load_otherwise_is_refused_by_name(
    tmp_path: Path, base: Path, changes: dict[str, Any], word: str
):
    folder = publish(tmp_path / "adapter", base)
    edit_config(folder, lambda config: config.update(changes))
    with pytest.raises(InvalidAdapterError, match=word):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bias": "all"}, "model.layers.1.self_attn.k_proj.bias"),
        ({"save": {"save_embedding_layers": True}}, "model.embed_tokens.weight"),
        ({"save": {"save_embedding_layers": True}}, "lm_head.weight"),
    ],
)
def test_base_tensors_that_were_trained_are_refused_by_name(
    tmp_path: Path, base: Path, settings: dict[str, Any], name: str
):
    folder = publish(tmp_path / "adapter", base, **settings)
    before = peft_logits(base, folder)
    edit_tensors(folder, lambda tensors: {n: t * 1.5 + 0.1 if n.endswith(name) else t for n, t in tensors.items()})
    if base.name.startswith("untied"):  # with tied weights one copy of the two wins in PEFT
        assert (peft_logits(base, folder) - before).abs().max() > 0.01, "PEFT loads the trained tensor"
    with pytest.raises(InvalidAdapterError, match=f"'{name}' was retrained"):
        our_logits(base, folder)


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_settings(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    targets = draw.sample(KINDS, draw.randint(1, 4))
    settings: dict[str, Any] = {
        "target_modules": draw.choice([targets, "all-linear", rf".*\.({'|'.join(targets)})"]),
        "r": draw.randint(1, 6),
        "lora_alpha": draw.choice([1, 4, 16]),
        "use_rslora": draw.random() < 0.3,
        "use_dora": draw.random() < 0.2,
        "rank_pattern": {draw.choice([*KINDS, r"model\.layers\.[02].*"]): draw.randint(1, 6)},
        "alpha_pattern": {rf"layers\.\d\.mlp\.{draw.choice(KINDS)}": draw.randint(1, 9)},
        "bias": draw.choice(["none", "all", "lora_only"]),
    }
    if draw.random() < 0.4:
        settings["exclude_modules"] = draw.choice([[draw.choice(KINDS)], r".*layers\.1.*", ["layers.2.mlp.up_proj"]])
    if isinstance(settings["target_modules"], list) and draw.random() < 0.5:
        settings["layers_to_transform"] = draw.choice([0, [1], [0, 2]])
    return settings


@pytest.mark.parametrize("seed", range(16))
def test_any_mixture_of_settings_has_peft_s_logits_or_is_refused(tmp_path: Path, base: Path, seed: int):
    """Also if the configuration of one adapter lies beside the factors of another."""
    draw, mine, other = random.Random(seed), random_settings(seed), random_settings(seed + 1000)
    try:
        folder = publish(tmp_path / "adapter", base, **mine)
    except ValueError as error:
        assert "target modules" in str(error).lower(), "the settings exclude every module"  # noqa: PT017
        return
    assert_alike(base, folder)
    swapped = draw.choice(sorted(set(other) - {"r", "use_dora", "rank_pattern"}))
    edit_config(folder, lambda config: config.update({swapped: other[swapped]}))
    try:
        ours = our_logits(base, folder)
    except InvalidAdapterError as error:
        assert swapped in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(ours, peft_logits(base, folder), rtol=1e-4, atol=3e-4)
