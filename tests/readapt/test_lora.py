import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import Adapter, load_adapter, save_adapter
from cluster.errors import InvalidAdapterError, InvalidCheckpointError
from cluster.storage.checkpoints import open_checkpoint
from readapt.training.lora import attach, blank, blank_like, linear_shapes, load_base, row_norms
from readapt.training.lora_stack import ALL_ROWS, LoraHooks, LoraStack, Segment, values_of
from tests.worlds.precision import FORWARD, assert_near
from tests.worlds.readapt import logits, random_factors
from tests.worlds.serving import make_adapter, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lora") / "v1")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Adapter:
    return load_adapter(
        make_adapter(checkpoint.parent / "a", checkpoint, rank=6, rslora=True, rank_pattern={"k_proj": 3})
    )


def assert_same_factors(one: Adapter, other: Adapter) -> None:
    assert list(one.factors) == list(other.factors)
    for name, factors in one.factors.items():
        assert torch.equal(factors.a_RD, other.factors[name].a_RD)
        assert torch.equal(factors.b_FR, other.factors[name].b_FR)
        assert factors.scaling == other.factors[name].scaling


def test_logits_equal_merged_weights(checkpoint: Path, adapter: Adapter) -> None:
    model, merged = load_base(checkpoint), load_base(checkpoint)
    bare = logits(model)
    attach(model, adapter)
    with torch.no_grad():
        for name, factors in adapter.factors.items():
            merged.get_submodule(name).weight += factors.delta()
    assert (logits(model) - bare).abs().max() > 0.5
    assert_near(logits(model), logits(merged), FORWARD)


@pytest.fixture(scope="module", params=["lora", "rslora", "dora"])
def saved(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    kind = {"rslora": request.param == "rslora", "dora": request.param == "dora"}
    return make_adapter(checkpoint.parent / request.param, checkpoint, rank=5, **kind)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logits_equal_those_of_peft(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load_base(checkpoint)
    save_adapter(attach(model, load_adapter(saved)).export(), tmp_path / "again")
    theirs = PeftModel.from_pretrained(load_base(checkpoint), tmp_path / "again")
    assert_near(logits(model), logits(theirs), FORWARD)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_equal_those_of_peft(checkpoint: Path, saved: Path) -> None:
    from peft import PeftModel

    tokens = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))
    mine, theirs = load_base(checkpoint), PeftModel.from_pretrained(load_base(checkpoint), saved, is_trainable=True)
    lora = attach(mine, load_adapter(saved))
    for model in (mine, theirs):
        model(input_ids=tokens, labels=tokens).loss.backward()
    by_name = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    expected = [by_name[f"{n}.lora_A.default.weight"] for n in lora.modules]
    expected += [by_name[f"{n}.lora_B.default.weight"].T for n in lora.modules]
    expected += [
        grad for n in lora.modules if (grad := by_name.get(f"{n}.lora_magnitude_vector.default.weight")) is not None
    ]
    for parameter, gradient in zip(lora.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert_near(parameter.grad[0], gradient, FORWARD)


def test_dora_scales_all_but_the_bias() -> None:
    torch.manual_seed(0)
    factors = replace(random_factors(7, 5, 2, 0.5, seed=0), magnitude_F=torch.rand(7) + 0.5)
    model, x_BTD = torch.nn.ModuleDict({"up": torch.nn.Linear(5, 7)}), torch.randn(2, 3, 5)
    expected = x_BTD @ factors.adapted(model["up"].weight).T + model["up"].bias
    adapter, hooks = Adapter({"up": factors}), LoraHooks(model)
    hooks.set_modules(["up"])
    with hooks.running(Segment(LoraStack([adapter], values_of(adapter)[None]), ALL_ROWS)):
        assert_near(model["up"](x_BTD), expected, multiple=16)


def test_export_and_import_round_trip(checkpoint: Path, adapter: Adapter, tmp_path: Path) -> None:
    exported = attach(load_base(checkpoint), adapter).export()
    assert exported.is_rslora
    assert_same_factors(exported, adapter)
    save_adapter(exported, tmp_path / "saved")
    loaded = load_adapter(tmp_path / "saved")
    for name, factors in adapter.factors.items():
        assert_near(loaded.factors[name].delta(), factors.delta(), multiple=4)


def test_export_is_a_copy(checkpoint: Path, adapter: Adapter) -> None:
    lora = attach(load_base(checkpoint), adapter)
    before = lora.export()
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 1.0
    assert_same_factors(before, adapter)
    first = lora.modules[0]
    assert torch.equal(lora.export().factors[first].a_RD, adapter.factors[first].a_RD + 1.0)


def test_load_swaps_in_other_modules_and_ranks(checkpoint: Path, adapter: Adapter, tmp_path: Path) -> None:
    other = load_adapter(make_adapter(tmp_path / "b", checkpoint, rank=2, modules=("q_proj", "up_proj"), seed=3))
    swapped, fresh = load_base(checkpoint), load_base(checkpoint)
    lora = attach(swapped, adapter)
    lora.load(other)
    attach(fresh, other)
    assert torch.equal(logits(swapped), logits(fresh))
    assert lora.modules == list(other.factors)


def test_detach_leaves_the_bare_base(checkpoint: Path, adapter: Adapter) -> None:
    model = load_base(checkpoint)
    bare = logits(model)
    attach(model, adapter).detach()
    assert torch.equal(logits(model), bare)


def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(checkpoint: Path, adapter: Adapter) -> None:
    model = load_base(checkpoint)
    lora = attach(model, adapter)
    before = logits(model)
    name = lora.modules[0]
    for wrong in ({name: random_factors(5, 7, 2, 1.0, seed=0)}, {"model.layers.9.mlp.up_proj": adapter.factors[name]}):
        with pytest.raises(InvalidAdapterError):
            lora.load(Adapter(wrong))
    assert torch.equal(logits(model), before)


def test_only_the_factors_get_gradients(checkpoint: Path, adapter: Adapter) -> None:
    model = load_base(checkpoint)
    lora = attach(model, adapter)
    model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_linear_shapes_equal_those_of_the_checkpoint(checkpoint: Path) -> None:
    assert linear_shapes(load_base(checkpoint)) == open_checkpoint(checkpoint).linear_shapes()


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 16 / 5), (True, 16 / math.sqrt(5))])
def test_blank_adds_nothing_and_starts_like_peft(checkpoint: Path, rslora: bool, scaling: float) -> None:
    model = load_base(checkpoint)
    bare = logits(model)
    adapter = blank(linear_shapes(model), 5, 16.0, rslora, ("q_proj", "down_proj"), seed=1)
    attach(model, adapter)
    assert torch.equal(logits(model), bare)
    assert len(adapter.factors) == 4
    for factors in adapter.factors.values():
        bound = 1 / math.sqrt(factors.shape[1])
        assert 0.9 * bound < factors.a_RD.abs().max() <= bound
        assert (factors.rank, factors.scaling) == (5, scaling)


def test_a_blank_dora_adds_nothing_and_has_the_norms_of_its_base(checkpoint: Path) -> None:
    model = load_base(checkpoint)
    bare = logits(model)
    shapes = linear_shapes(model)
    first = blank(shapes, 4, 8.0, norms=row_norms(model, shapes))
    again = blank_like(first, seed=3, norms={name: 2 * norms for name, norms in row_norms(model, shapes).items()})
    attach(model, first)
    assert_near(logits(model), bare, FORWARD)
    assert all(torch.equal(f.magnitude_F, 2 * first.factors[name].magnitude_F) for name, f in again.factors.items())


def test_blank_depends_only_on_the_seed(adapter: Adapter) -> None:
    torch.manual_seed(0)
    first = blank_like(adapter, seed=4)
    torch.manual_seed(1)
    assert_same_factors(first, blank_like(adapter, seed=4))
    name = next(iter(adapter.factors))
    assert not torch.equal(first.factors[name].a_RD, blank_like(adapter, seed=5).factors[name].a_RD)
    assert {n: f.rank for n, f in first.factors.items()} == {n: f.rank for n, f in adapter.factors.items()}


def test_incomplete_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "v1")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpointError):
        load_base(folder)
