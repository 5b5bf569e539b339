import pytest
import torch

from cluster.adapters.files import Adapter, LoraFactors
from readapt.fusion.fuse import Fusion, align
from readapt.fusion.points import COPY, UNDO, Point
from tests.worlds.precision import assert_near, tolerance
from tests.worlds.readapt import random_factors

F, D = 37, 29
TASK = Adapter({"m": random_factors(F, D, 6, 2.5, seed=1)}, is_rslora=True, base_model="v1")
EVOLUTION = Adapter({"m": random_factors(F, D, 9, 1.0, seed=2), "other": random_factors(5, 7, 2, 1.0, seed=3)})
FUSION = Fusion(TASK, EVOLUTION)


def dense(alpha: float, beta: float) -> torch.Tensor:
    def delta(adapter: Adapter) -> torch.Tensor:
        f = adapter.factors["m"]
        return f.scaling * f.b_FR.double() @ f.a_RD.double()

    return alpha * delta(TASK) + beta * delta(EVOLUTION)


NUM_ROUNDINGS = 4 * F  # QR, SVD and products of matrices of at most F rows in float32


@pytest.mark.parametrize("rank", [1, 4, 6, 11, 15])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, -1.0), (0.7, 0.3), (0.0, 1.0), (1.3, -0.05)])
def test_recompression_is_the_best_approximation_of_its_rank(alpha: float, beta: float, rank: int) -> None:
    wanted = dense(alpha, beta)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    fused = FUSION.at(Point(alpha, beta), rank).factors["m"]
    assert fused.rank == rank
    sensitivity = 1.0 if rank == len(s) else float(s[rank - 1] / (s[rank - 1] - s[rank]))  # see `truncation`
    assert_near(fused.delta(), best, NUM_ROUNDINGS * sensitivity, reference=wanted)
    lost = float((wanted - best).norm() / wanted.norm()) ** 2
    allowed = tolerance(torch.ones(1), NUM_ROUNDINGS)
    assert FUSION.lost_energy(Point(alpha, beta), rank)["m"] == pytest.approx(lost, rel=allowed, abs=allowed**2)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, -1.0), (0.4, 0.9)])
def test_without_a_rank_nothing_is_lost(alpha: float, beta: float) -> None:
    fused = FUSION.at(Point(alpha, beta), None).factors["m"]
    assert fused.rank == 15
    assert_near(fused.delta(), dense(alpha, beta), NUM_ROUNDINGS)
    assert FUSION.lost_energy(Point(alpha, beta), None)["m"] == 0.0


def test_more_terms_than_the_matrix_has_rows() -> None:
    task = Adapter({"m": random_factors(9, 8, 6, 2.0, seed=1)})
    evolution = Adapter({"m": random_factors(9, 8, 8, 1.0, seed=2)})
    wanted = 0.5 * task.factors["m"].delta().double() - evolution.factors["m"].delta().double()
    fused = Fusion(task, evolution).at(Point(0.5, -1.0), None).factors["m"]
    assert fused.rank == 8
    assert_near(fused.delta(), wanted, NUM_ROUNDINGS)


@pytest.mark.parametrize("scaling", [0.0, -2.5])
def test_a_task_with_a_zero_or_negative_scaling(scaling: float) -> None:
    task = Adapter({"m": random_factors(F, D, 6, scaling, seed=1)})
    wanted = task.factors["m"].delta().double() - EVOLUTION.factors["m"].delta().double()
    assert_near(Fusion(task, EVOLUTION).at(UNDO, None).factors["m"].delta(), wanted, NUM_ROUNDINGS)


def test_factors_are_balanced_and_keep_the_tasks_scaling() -> None:
    fused = FUSION.at(UNDO)
    factors = fused.factors["m"]
    assert (fused.is_rslora, fused.base_model, factors.scaling, factors.rank) == (True, "v1", 2.5, 6)
    assert_near(factors.a_RD.norm(dim=1), factors.b_FR.norm(dim=0), NUM_ROUNDINGS)


def test_a_copy_has_the_factors_of_the_task() -> None:
    fused = FUSION.at(COPY).factors["m"]
    assert torch.equal(fused.a_RD, TASK.factors["m"].a_RD)
    assert torch.equal(fused.b_FR, TASK.factors["m"].b_FR)


def test_the_bare_corner_is_zero_but_can_be_trained() -> None:
    fused = FUSION.at(Point(0.0, 0.0)).factors["m"]
    assert not fused.b_FR.any()
    assert torch.equal(fused.a_RD, TASK.factors["m"].a_RD)


def test_copy_can_be_cut_to_a_smaller_rank() -> None:
    wanted = dense(1.0, 0.0)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    fused = FUSION.at(COPY, 3).factors["m"]
    sensitivity = float(s[2] / (s[2] - s[3]))
    assert_near(fused.delta(), (u[:, :3] * s[:3]) @ v[:3], NUM_ROUNDINGS * sensitivity, reference=wanted)


def test_the_modules_of_the_task_are_kept_and_no_others() -> None:
    task = Adapter({**TASK.factors, "unchanged": random_factors(5, 7, 2, 1.0, seed=4)})
    fused = Fusion(task, EVOLUTION).at(UNDO)
    assert list(fused.factors) == ["m", "unchanged"]
    assert torch.equal(fused.factors["unchanged"].b_FR, task.factors["unchanged"].b_FR)


def test_a_finer_point_gives_each_group_its_own_pair() -> None:
    attention, mlp = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    task, evolution = (Adapter(dict.fromkeys((attention, mlp), a.factors["m"])) for a in (TASK, EVOLUTION))
    fused = Fusion(task, evolution).at(Point(0.5, 0.5, (("mlp", 1.0, -1.0),)), None)
    assert_near(fused.factors[attention].delta(), dense(0.5, 0.5), NUM_ROUNDINGS)
    assert_near(fused.factors[mlp].delta(), dense(1.0, -1.0), NUM_ROUNDINGS)


def dora_weight(weight_FD: torch.Tensor, factors: LoraFactors) -> torch.Tensor:
    """Return the effective weight of a DoRA module, as the paper defines it."""
    assert factors.magnitude_F is not None
    direction_FD = weight_FD + factors.delta().double()
    return factors.magnitude_F[:, None] * direction_FD / direction_FD.norm(dim=1, keepdim=True)


def test_undoing_the_update_restores_the_old_dora_specialist() -> None:
    generator = torch.Generator().manual_seed(5)
    old_FD = torch.randn(F, D, generator=generator).double()
    plain = TASK.factors["m"]
    task = LoraFactors(plain.a_RD, plain.b_FR, plain.scaling, magnitude_F=torch.rand(F, generator=generator) + 0.5)
    new_FD = old_FD + EVOLUTION.factors["m"].delta().double()
    undone = Fusion(Adapter({"m": task}), EVOLUTION).at(UNDO, None).factors["m"]
    old_weight_FD = dora_weight(old_FD, task)
    assert_near(dora_weight(new_FD, undone), old_weight_FD, NUM_ROUNDINGS)
    copied = Fusion(Adapter({"m": task}), EVOLUTION).at(COPY).factors["m"]
    assert (dora_weight(new_FD, copied) - old_weight_FD).norm() > 0.1 * old_weight_FD.norm()


def test_align_keeps_the_function_and_undoes_a_rotation() -> None:
    own = TASK.factors["m"]
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    turned = Adapter({"m": type(own)(q.T @ own.a_RD, own.b_FR @ q, own.scaling)})
    aligned = align(turned, TASK).factors["m"]
    assert_near(aligned.a_RD, own.a_RD, NUM_ROUNDINGS)
    assert_near(aligned.delta(), own.delta(), NUM_ROUNDINGS)
