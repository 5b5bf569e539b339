"""Extraction from checkpoints of many architectures. PEFT itself loads the adapters."""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError, ConflictError, InvalidCheckpointError, StorageError
from cluster.storage.checkpoints import open_checkpoint
from readapt.extraction.extract import Settings, extract
from readapt.extraction.files import Extraction, Status, apply_remainder
from readapt.extraction.report import warnings_of
from readapt.lowrank.spectra import Budget, EnergyShare, FixedRank, Knee

TEXT = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 44}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"input_ids": torch.arange(24).view(2, 12)}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
LLAMA = ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": False})


@dataclass(frozen=True)
class Case:
    architecture: str
    settings: dict[str, Any]
    inputs: dict[str, torch.Tensor]


CASES = [
    Case(*LLAMA, TOKENS),
    Case("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}, TOKENS),
    Case("BertForMaskedLM", TEXT, TOKENS),
    Case("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}, TOKENS),
    Case("ViTForImageClassification", {**IMAGE, **LAYERS}, PIXELS),
    Case("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2]}, PIXELS),
    Case("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "num_labels": 5, "tf_padding": False}, PIXELS),
]


def make_model(architecture: str, settings: dict[str, Any], seed: int = 0) -> Any:
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**settings)
    config.pad_token_id = None  # the default is outside this small vocabulary
    torch.manual_seed(seed)
    return model_class(config).eval()


@torch.no_grad()
def change(model: Any, rank: int, scale: float = 0.3) -> Any:
    """Change every matrix by a low-rank term and every vector a little, as fine-tuning does."""
    generator = torch.Generator().manual_seed(9)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            continue
        flat = parameter.flatten(1)
        left, right = (torch.randn(n, rank, generator=generator) for n in flat.shape)
        size = scale * float(flat.std()) / rank**0.5
        parameter += size * (left @ right.T).view(parameter.shape)
    return model


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that saves a base and its tuned version."""

    def make(architecture: str, settings: dict[str, Any], rank: int = 3, **save: Any) -> tuple[Path, Path]:
        model = make_model(architecture, settings)
        model.save_pretrained(tmp_path / "base", **save)
        change(model, rank).save_pretrained(tmp_path / "tuned", **save)
        return tmp_path / "base", tmp_path / "tuned"

    return make


def run(base: Path, tuned: Path, *rules: Any, **settings: Any) -> Extraction:
    chosen = Settings(rules or (FixedRank(64),), **settings)
    return extract(open_checkpoint(base), open_checkpoint(tuned), base.parent / "out", chosen)


def load(folder: Path) -> Any:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


def load_peft(base: Any, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings and the transposed Conv1D
        return PeftModel.from_pretrained(base, str(adapter))


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.architecture + str(case.settings.get("tie_word_embeddings", ""))
)
def test_adapter_in_peft_with_remainder_is_the_tuned_model(case: Case, pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(case.architecture, case.settings)
    done = run(base, tuned)
    model, expected = load(base), logits(load(tuned), case.inputs)
    before = logits(model, case.inputs)
    apply_remainder(model, done.folder / "remainder.safetensors")
    adapted = logits(load_peft(model, done.folder), case.inputs)
    torch.testing.assert_close(adapted, expected, rtol=2e-3, atol=2e-4)
    assert (before - expected).abs().max() > 20 * (adapted - expected).abs().max()
    assert not any(part.status is Status.LEFT_OUT for part in done.parts)


def test_convolutions_are_carried_and_grouped_ones_go_to_the_remainder(pair: Callable[..., tuple[Path, Path]]) -> None:
    done = run(*pair("MobileNetV2ForImageClassification", CASES[6].settings))
    kernels = [t for name, t in load_file(done.folder / "adapter_model.safetensors").items() if "lora_A" in name]
    assert {tuple(kernel.shape[2:]) for kernel in kernels} >= {(1, 1), (3, 3)}
    grouped = {part.path: part.status for part in done.parts if "grouped" in part.reason}
    assert set(grouped.values()) == {Status.REMAINDER}
    assert all("conv_3x3" in path for path in grouped)


def test_merging_gives_the_truncated_delta_to_rounding(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA, rank=12)
    done = run(base, tuned, FixedRank(5))
    merged = load_peft(load(base), done.folder).merge_and_unload().state_dict()
    old, new = load(base).state_dict(), load(tuned).state_dict()
    for part in done.parts:
        if part.status is Status.CARRIED:
            u, s, v = torch.linalg.svd(new[part.path].double() - old[part.path].double(), full_matrices=False)
            expected = old[part.path] + ((u[:, :5] * s[:5]) @ v[:5]).float()
            torch.testing.assert_close(merged[part.path], expected, rtol=1e-4, atol=1e-5)


def test_one_run_writes_an_adapter_for_each_rule(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA, rank=12)
    rules = FixedRank(2), FixedRank(4), EnergyShare(0.9), Knee(), Budget(3000)
    done = run(base, tuned, *rules)
    report = json.loads((done.folder / "extraction.json").read_text())
    sizes = {adapter["rule"]: adapter for adapter in report["adapters"]}
    assert set(sizes) == set(done.adapters) == {"rank-2", "rank-4", "energy-0.9", "knee", "budget-3000"}
    for label, folder in done.adapters.items():
        stored = load_file(folder / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == sizes[label]["parameters"]
        load_peft(load(base), folder)
    small, large = (load_file(done.adapters[f"rank-{r}"] / "adapter_model.safetensors") for r in (2, 4))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(large[name][:2], small[name])
    assert sizes["budget-3000"]["parameters"] <= 3000
    assert sizes["energy-0.9"]["energy"] >= 0.9 > sizes["rank-2"]["energy"]
    assert all(0.9 <= module["energy"]["energy-0.9"] <= 1 for module in report["modules"])
    assert all(0.05 < module["relative_norm"] < 1 for module in report["modules"])
    assert (done.folder / "spectrum.png").stat().st_size > 1000


def test_shards_and_dtypes_do_not_matter(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair(*LLAMA)
    load(tuned).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole = load_file(run(base, tuned).folder / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out")
    again = load_file(run(base, tmp_path / "sharded").folder / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    shutil.rmtree(tmp_path / "out")
    half = load_file(run(base, tuned, dtype="bfloat16").folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_equal_tensors_are_skipped_and_excluded_ones_are_listed(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA)
    tensors, old = load_file(tuned / "model.safetensors"), load_file(base / "model.safetensors")
    kept = {name: old[name] if "k_proj" in name else tensor for name, tensor in tensors.items()}
    save_file(kept, tuned / "model.safetensors", metadata={"format": "pt"})
    done = run(base, tuned, include="proj|norm", exclude="down_proj")
    report = json.loads((done.folder / "extraction.json").read_text())
    assert report["num_equal"] == 2
    kinds = {name.rsplit(".", 1)[-1] for module in report["modules"] for name in module["modules"]}
    assert kinds == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    left = set(report["not_carried"])
    assert left == {"lm_head.weight", "model.embed_tokens.weight"} | {
        f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)
    }
    assert "model.norm.weight" in report["remainder"]["tensors"]


def test_grown_vocabulary_keeps_shared_rows_low_rank_and_new_rows_whole(tmp_path: Path) -> None:
    model = make_model(*LLAMA)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(64, mean_resizing=False)
    change(model, 3).save_pretrained(tmp_path / "tuned")
    done = run(tmp_path / "base", tmp_path / "tuned")
    report = json.loads((done.folder / "extraction.json").read_text())
    assert report["remainder"]["new_rows"] == {"lm_head.weight": 3, "model.embed_tokens.weight": 3}
    merged = load_peft(load(tmp_path / "base"), done.folder).merge_and_unload()
    apply_remainder(merged, done.folder / "remainder.safetensors")
    inputs = {"input_ids": torch.tensor([[60, 61, 62, 63, 5]])}
    torch.testing.assert_close(logits(merged, inputs), logits(load(tmp_path / "tuned"), inputs), rtol=2e-3, atol=2e-4)


def test_untied_head_is_compared_with_the_embedding_it_was_tied_to(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "base")
    other = make_model(*LLAMA)
    other.load_state_dict(model.state_dict())
    change(other, 3).save_pretrained(tmp_path / "tuned")
    done = run(tmp_path / "base", tmp_path / "tuned")
    model = load(tmp_path / "base")
    apply_remainder(model, done.folder / "remainder.safetensors")
    adapted = logits(load_peft(model, done.folder), TOKENS)
    torch.testing.assert_close(adapted, logits(load(tmp_path / "tuned"), TOKENS), rtol=2e-3, atol=2e-4)


def test_checkpoint_of_no_known_class_is_read_by_names_and_shapes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blocks.0.to_q.weight": (8, 6),
        "conv_in.weight": (8, 3, 2, 3, 3),
        "text_embedding.weight": (9, 6),
        "proj.bias": (5,),
    }
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"_class_name": "VideoTransformer"}')
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    stored = load_file(run(tmp_path / "base", tmp_path / "tuned", FixedRank(2)).folder / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in stored.items()} == {
        "blocks.0.to_q.lora_A.weight": (2, 6),
        "blocks.0.to_q.lora_B.weight": (8, 2),
        "conv_in.lora_A.weight": (2, 3, 2, 3, 3),
        "conv_in.lora_B.weight": (8, 2, 1, 1, 1),
        "text_embedding.lora_embedding_A": (2, 9),
        "text_embedding.lora_embedding_B": (6, 2),
    }


class Killed(BaseException):
    """Stands for a killed process."""


def test_killed_run_resumes_from_its_parts(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = (open_checkpoint(folder) for folder in pair(*LLAMA))

    def kill_at_five(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        extract(base, tuned, tmp_path / "out", Settings(), report=kill_at_five)
    assert not (tmp_path / "out").exists()
    reported: list[int] = []
    done = extract(base, tuned, tmp_path / "out", Settings(), report=lambda done, total: reported.append(done))
    assert reported[0] == 5
    assert reported[-1] == len(done.parts)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(Killed):
        extract(base, tuned, tmp_path / "other", Settings(), report=kill_at_five)
    extract(
        base, tuned, tmp_path / "other", Settings((FixedRank(2),)), report=lambda done, total: reported.append(done)
    )
    assert reported[len(done.parts) - 4] == 0, "other settings start from the beginning"


def test_bad_pairs_are_refused_and_nothing_is_left(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair(*LLAMA)
    with pytest.raises(InvalidCheckpointError, match=r"identical.*empty"):
        run(base, base)
    make_model("LlamaForCausalLM", {**LLAMA[1], "intermediate_size": 40}).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InvalidCheckpointError, match=r"mlp\.down_proj\.weight has shape \(24, 40\), but \(24, 44\)"):
        run(base, tmp_path / "narrow")
    make_model("LlamaForCausalLM", {**LLAMA[1], "num_hidden_layers": 1}).save_pretrained(tmp_path / "shallow")
    with pytest.raises(InvalidCheckpointError, match=r"lacks tensor 'model\.layers\.1"):
        run(base, tmp_path / "shallow")
    make_model("BertForMaskedLM", TEXT).save_pretrained(tmp_path / "bert")
    with pytest.raises(InvalidCheckpointError, match=r"model type 'bert'.*'llama'"):
        run(base, tmp_path / "bert")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConflictError, match="exists"):
        run(base, tuned)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "narrow", "shallow", "bert", "out"}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, name: str, value: float
) -> None:
    base, tuned = pair(*LLAMA)
    tensors = load_file(tuned / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidCheckpointError, match=rf"tuned: {name} has values that are not finite"):
        run(base, tuned)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_missing_and_truncated_shards_are_reported(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA, max_shard_size="20KB")
    shard = sorted(tuned.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(InvalidCheckpointError, match="truncated"):
        run(base, tuned)
    shard.unlink()
    with pytest.raises(InvalidCheckpointError, match="missing"):
        run(base, tuned)


def test_bad_settings_are_refused(pair: Callable[..., tuple[Path, Path]]) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Settings(include="(")
    with pytest.raises(ConfigError, match="twice"):
        Settings((FixedRank(2), FixedRank(2)))
    with pytest.raises(ConfigError, match="too small for a rank of 1"):
        run(*pair(*LLAMA), Budget(3))


@pytest.mark.parametrize("limit_bytes", [0, 2000, 9000])
def test_full_disk_is_reported_and_leaves_no_output(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, limit_bytes: int
) -> None:
    import resource
    import signal

    base, tuned = pair(*LLAMA)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            run(base, tuned)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    assert run(base, tuned).folder.exists()


def test_quantised_weights_are_listed_and_not_misread(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA)
    tensors = load_file(tuned / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    report = json.loads((run(base, tuned).folder / "extraction.json").read_text())
    assert "quantised" in report["not_carried"][name]


def test_new_head_goes_whole_to_the_remainder(tmp_path: Path) -> None:
    base = make_model("BertModel", TEXT)
    base.save_pretrained(tmp_path / "base")
    tuned = make_model("BertForSequenceClassification", {**TEXT, "num_labels": 3})
    tuned.bert.load_state_dict(base.state_dict(), strict=False)
    change(tuned, 3).save_pretrained(tmp_path / "tuned")
    report = json.loads((run(tmp_path / "base", tmp_path / "tuned").folder / "extraction.json").read_text())
    assert {"classifier.weight", "classifier.bias"} <= set(report["remainder"]["tensors"])
    modules = {name for module in report["modules"] for name in module["modules"]}
    assert "encoder.layer.0.attention.self.query" in modules


def resized_pair(folder: Path, num_rows: int, *, is_tied: bool) -> tuple[Path, Path]:
    """Save a base with a vocabulary of 61 and its tuned version with `num_rows`."""
    model = make_model("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": is_tied})
    model.save_pretrained(folder / "base")
    change(model, 3)
    with torch.no_grad():
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_a_cut_vocabulary_is_compared_in_the_shared_rows(tmp_path: Path, is_tied: bool) -> None:
    base, tuned = resized_pair(tmp_path, 40, is_tied=is_tied)
    done = run(base, tuned)
    model, expected = load(base), logits(load(tuned), TOKENS)
    apply_remainder(model, done.folder / "remainder.safetensors")
    torch.testing.assert_close(logits(load_peft(model, done.folder), TOKENS)[..., :40], expected, rtol=2e-3, atol=2e-4)
    factors = load_file(done.folder / "adapter_model.safetensors")
    assert factors["base_model.model.lm_head.lora_B.weight"].shape[0] == 61, "the adapter fits the base"
    assert factors["base_model.model.lm_head.lora_B.weight"][40:].abs().max() < 1e-5
    report = json.loads((done.folder / "extraction.json").read_text())
    assert report["remainder"]["cut_rows"]["model.embed_tokens.weight"] == 21
    assert not report["not_carried"]


def test_excluded_tensors_may_have_any_shape_or_be_missing(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pair(*LLAMA)
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(7, 5)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpointError, match=r"lm_head\.weight has shape \(7, 5\).*--exclude"):
        run(base, tuned)
    with pytest.raises(InvalidCheckpointError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj"):
        run(base, tuned, exclude="lm_head")
    done = run(base, tuned, exclude=r"lm_head|up_proj")
    carried = {part.path for part in done.parts if part.status is Status.CARRIED}
    assert "model.layers.0.self_attn.q_proj.weight" in carried
    assert not any("lm_head" in path or "up_proj" in path for path in carried)


def test_a_cap_cuts_every_rule_and_is_reported(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA, rank=6)
    rules = (EnergyShare(0.999), FixedRank(5), FixedRank(2), Knee(), Budget(3000))
    done = run(base, tuned, *rules, max_rank=4)
    assert max(rank for ranks in done.ranks.values() for rank in ranks.values()) == 4
    report = json.loads((done.folder / "extraction.json").read_text())
    capped = {adapter["rule"]: adapter["num_capped"] for adapter in report["adapters"]}
    assert capped["energy-0.999"] == capped["rank-5"] == len(done.ranks["rank-5"])
    assert capped["rank-2"] == 0
    assert report["max_rank"] == 4
    warnings = warnings_of(report)
    assert any(line.startswith("rank-5: 16 modules are cut to rank 4.") for line in warnings)
    assert not any(line.startswith("rank-2") for line in warnings)


def test_a_module_of_full_rank_is_not_called_capped(pair: Callable[..., tuple[Path, Path]]) -> None:
    """The cap is the smaller side of the key and value projections, so no rule could give them more."""
    base, tuned = pair(*LLAMA)
    smallest = min(min(t.shape) for n, t in load_file(tuned / "model.safetensors").items() if "self_attn.k_proj" in n)
    done = run(base, tuned, FixedRank(1000), max_rank=smallest)
    narrow = {path for path, rank in done.ranks["rank-1000"].items() if rank == smallest and "k_proj" in path}
    assert narrow
    shapes = {part.path: part.shape for part in done.parts}
    wide = [path for path in done.ranks["rank-1000"] if min(shapes[path]) > smallest]
    assert done.num_capped["rank-1000"] == len(wide)


def test_a_knee_does_not_depend_on_a_cap_above_it(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair(*LLAMA, rank=3)
    free = run(base, tuned, Knee()).ranks["knee"]
    shutil.rmtree(tmp_path / "out")
    assert run(base, tuned, Knee(), max_rank=max(free.values()) + 1).ranks["knee"] == free


def test_an_adapter_larger_than_what_it_changes_is_warned_of(pair: Callable[..., tuple[Path, Path]]) -> None:
    base, tuned = pair(*LLAMA, rank=20)
    done = run(base, tuned, FixedRank(24), FixedRank(2))
    report = json.loads((done.folder / "extraction.json").read_text())
    sizes = {adapter["rule"]: (adapter["parameters"], adapter["replaced_parameters"]) for adapter in report["adapters"]}
    stored = sum(t.numel() for t in load_file(done.adapters["rank-24"] / "adapter_model.safetensors").values())
    changed = sum(t.numel() for t in load_file(base / "model.safetensors").values() if t.ndim == 2)
    assert sizes["rank-24"] == (stored, changed)
    [warning] = warnings_of(report)
    assert warning.startswith(
        f"rank-24: the adapter has {stored:,} parameters, more than the {changed:,} of the tensors"
    )
