"""Directions compared with the full matrices that they stand for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError
from readapt.continual.direction_files import load_directions, save_directions
from readapt.continual.directions import (
    Decoupled,
    DirectionSettings,
    DirectionWeights,
    decouple,
    distil,
    fold,
    gram,
    inner,
    norm_of,
)
from readapt.training.lora import blank
from tests.worlds.readapt import random_factors
from tests.worlds.two_linears import SHAPES, Two, a_state, an_adapter, deltas


@pytest.fixture
def model() -> Two:
    torch.manual_seed(0)
    return Two()


def test_norms_and_inner_products_equal_those_of_the_full_matrices():
    left, right = random_factors(7, 5, 3, 0.7, seed=1), random_factors(7, 5, 2, -1.3, seed=2)
    expected = (left.delta().double() * right.delta().double()).sum()
    torch.testing.assert_close(inner(left, right).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm_of(left, "product"), left.delta().norm())
    torch.testing.assert_close(norm_of(left, "factors"), 0.7 * left.a_RD.norm() * left.b_FR.norm())


def test_an_ordinary_adapter_is_decoupled_and_folded_back():
    adapter = an_adapter(seed=3, scaling=-0.4)
    state = decouple(adapter)
    assert sum(float(inner(f, f)) for f in state.directions[0].factors.values()) == pytest.approx(2.0)
    for name, delta in deltas(fold(state)).items():
        torch.testing.assert_close(delta, deltas(adapter)[name], rtol=1e-5, atol=1e-5)


def test_an_adapter_that_adds_nothing_has_no_direction():
    assert decouple(Adapter({"one": LoraFactors(torch.ones(2, 5), torch.zeros(7, 2), 1.0)})).directions == ()


def test_dora_is_refused():
    factors = random_factors(7, 5, 2, 1.0, seed=0)
    with pytest.raises(InvalidAdapterError, match="DoRA"):
        decouple(Adapter({"one": LoraFactors(factors.a_RD, factors.b_FR, 1.0, torch.ones(7))}))


def test_folding_is_the_weighted_sum_and_truncation_the_best_approximation():
    state = a_state()
    expected = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in SHAPES}
    for direction, magnitude in zip(state.directions, state.magnitudes, strict=True):
        for name, delta in deltas(direction).items():
            expected[name] += magnitude * delta
    for name, delta in deltas(fold(state)).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)
    truncated = fold(state, rank=2)
    assert truncated.max_rank == 2
    for name, delta in deltas(truncated).items():
        u, s, v = torch.linalg.svd(expected[name])
        torch.testing.assert_close(delta, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [DirectionSettings(), DirectionSettings("factors"), DirectionSettings("factors", is_fresh_unit=False)]
)
def test_the_exported_state_and_its_fold_compute_the_same(model: Two, settings: DirectionSettings):
    fresh = an_adapter(21, rank=2)
    weights = DirectionWeights(model, a_state(), fresh, 0.8, settings)
    x = torch.randn(4, 5)
    expected = model(x)
    state = weights.export()
    weights.detach()
    assert len(state.directions) == 4
    assert not torch.allclose(model(x), expected)
    again = DirectionWeights(model, state)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    again.detach()
    folded = DirectionWeights(model, Decoupled((fold(state),), (1.0,)))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    folded.detach()


def test_only_the_fresh_direction_and_all_magnitudes_are_trained(model: Two):
    state = a_state()
    before = [deltas(direction) for direction in state.directions]
    weights = DirectionWeights(model, state, blank(SHAPES, 2, 2.0, seed=0))
    optimizer = torch.optim.SGD([*weights.factors(), weights.magnitudes_A], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
    after = weights.export()
    weights.detach()
    for old, new in zip(before, after.directions[:3], strict=True):
        assert all(torch.equal(old[name], delta) for name, delta in deltas(new).items())
    assert all(a != b for a, b in zip(after.magnitudes[:3], state.magnitudes, strict=True))
    squares = [float(inner(f, f)) for f in after.directions[3].factors.values()]
    assert sum(squares) / len(squares) == pytest.approx(1.0, rel=1e-4)


def test_the_gradient_matches_the_formula_of_the_paper(model: Two):
    """Compares with a float64 reference that forms the matrices and takes the norm of their product."""
    fresh = an_adapter(21, rank=2, modules=("one",), scaling=1.0)
    weights = DirectionWeights(model, Decoupled(), fresh, 0.8, DirectionSettings(floor=1e-6))
    x = torch.randn(4, 5)
    weights_loss = model(x).square().sum()
    weights_loss.backward()
    a, b = (t.double().requires_grad_() for t in (fresh.factors["one"].a_RD, fresh.factors["one"].b_FR))
    reference = Two().double()
    reference.load_state_dict(model.state_dict())
    w = reference.one.weight + 0.8 * (b @ a) / torch.linalg.matrix_norm(b @ a)
    y = reference.two(torch.tanh(x.double() @ w.T + reference.one.bias))
    y.square().sum().backward()
    for parameter, expected in zip(weights.factors(), (a, b), strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


def test_distillation_drops_a_combination_and_keeps_a_new_direction():
    first, second, third = an_adapter(1), an_adapter(5), an_adapter(9)
    parts = [decouple(adapter) for adapter in (first, second)]
    old = Decoupled(tuple(p.directions[0] for p in parts), (2.0, 3.0))
    mixture = decouple(fold(Decoupled(old.directions, (0.5, -0.25))))
    state = Decoupled((*old.directions, *mixture.directions), (*old.magnitudes, 1.5))
    dropped = distil(state, max_residual=9e-4)
    assert len(dropped.directions) == 2
    for name, delta in deltas(fold(dropped)).items():
        torch.testing.assert_close(delta, deltas(fold(state))[name], rtol=1e-4, atol=1e-5)
    new = Decoupled((*old.directions, *decouple(third).directions), (*old.magnitudes, 1.5))
    assert distil(new, max_residual=9e-4) is new
    assert len(distil(new, max_residual=1.0).directions) == 2


def test_distillation_can_keep_the_residual_at_a_lower_rank():
    parts = [decouple(an_adapter(seed)) for seed in (1, 5)]
    state = Decoupled(tuple(part.directions[0] for part in parts), (2.0, 3.0))
    whole = distil(state, max_residual=0.1, rest_rank=6)
    for name, delta in deltas(fold(whole)).items():
        torch.testing.assert_close(delta, deltas(fold(state))[name], rtol=1e-4, atol=1e-5)
    assert abs(float(gram(whole.directions)[0, 1])) < 1e-4, "the second direction is orthogonal to the first"
    cut = distil(state, max_residual=0.1, rest_rank=1)
    assert [direction.max_rank for direction in cut.directions] == [state.directions[0].max_rank, 1]
    assert cut.num_parameters < state.num_parameters


def test_the_gram_matrix_is_symmetric_and_has_squared_norms_on_its_diagonal():
    gram_AA = gram(a_state().directions)
    torch.testing.assert_close(gram_AA, gram_AA.T)
    assert gram_AA[0, 0] == pytest.approx(2.0, rel=1e-5)


def test_directions_are_saved_and_loaded(tmp_path: Path):
    state = replace(a_state(), inputs={"one": torch.randn(3, 5)})
    save_directions(state, tmp_path)
    loaded = load_directions(tmp_path)
    assert loaded.magnitudes == state.magnitudes
    assert torch.equal(loaded.inputs["one"], state.inputs["one"])
    assert torch.equal(gram(loaded.directions), gram(state.directions))
    (tmp_path / "directions.safetensors").write_bytes(b"cut")
    with pytest.raises(InvalidAdapterError, match="cannot be read"):
        load_directions(tmp_path)
