from pathlib import Path

import pytest
import torch

from cluster.config.readapt import SearchConfig
from cluster.storage.checkpoints import open_checkpoint
from readapt.fusion import refine as refine_module
from readapt.fusion.objective import FusionObjective
from readapt.fusion.points import COPY, UNDO, Point
from readapt.fusion.refine import refine
from readapt.lowrank.delta import base_evolution
from readapt.training.lora import load_base
from tests.worlds.precision import FORWARD, assert_near
from tests.worlds.readapt import TaskWorld, evolve, logits, make_world, try_points


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("refine"))


@pytest.fixture(scope="module")
def new_base(world: TaskWorld) -> Path:
    return evolve(world.base, world.base.parent / "v2", rank=4, scale=1.2)


def objective(world: TaskWorld, new_base: Path, **config) -> FusionObjective:
    evolution, _ = base_evolution(open_checkpoint(world.base), open_checkpoint(new_base), 64, 0.9999)
    rows = world.task.valid[:40]
    return FusionObjective(
        load_base(new_base), world.specialist, evolution, rows, world.encoder, SearchConfig(**config)
    )


@pytest.mark.parametrize("rank", ["uncut", "serving"])
def test_the_gradient_is_that_of_the_loss(world: TaskWorld, new_base: Path, rank) -> None:
    scored = objective(world, new_base, rank=rank)
    start = Point(0.9, -0.6)
    pairs_M2 = torch.cat([terms.pairs([start]) for terms in scored.terms.values()]).requires_grad_()
    refine_module._loss(scored, pairs_M2, scored.rows).backward()
    assert pairs_M2.grad is not None
    step = 1e-2
    for side in (0, 1):
        moved = [Point(0.9 + sign * step * (1 - side), -0.6 + sign * step * side) for sign in (1, -1)]
        above, below = scored.losses(moved)
        # Finite differences: the curvature within a step outweighs rounding errors.
        assert float(pairs_M2.grad[:, side].sum()) == pytest.approx((above - below) / (2 * step), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("rank", ["uncut", "serving"])
def test_refinement_improves_a_search_and_leaves_the_model_bare(world: TaskWorld, new_base: Path, rank) -> None:
    scored = objective(world, new_base, rank=rank, refine_steps=20)
    bare = logits(scored.model)
    found = try_points(scored, [COPY])
    refined = refine(scored, found)
    assert refined.loss < 0.7 * found.loss
    assert_near(refined.loss, scored.losses([refined.point])[0], FORWARD)
    assert [trial.point for trial in refined.trials] == [COPY, refined.point]
    assert {group for group, _, _ in refined.point.overrides} == set(world.specialist.factors)
    assert all(0 <= alpha <= 1.5 and -1 <= beta <= 1 for _, alpha, beta in refined.point.overrides)
    assert torch.equal(logits(scored.model), bare)


def test_without_steps_the_search_result_is_unchanged(world: TaskWorld, new_base: Path) -> None:
    scored = objective(world, new_base)
    found = try_points(scored, [COPY, UNDO])
    assert refine(scored, found) is found


def test_a_point_that_is_not_better_on_unseen_rows_is_rejected(world: TaskWorld, new_base: Path, monkeypatch) -> None:
    """The steps are so large that the loss can only rise."""
    monkeypatch.setattr(refine_module, "LEARNING_RATE", 5.0)
    scored = objective(world, new_base, rank="uncut", refine_steps=6)
    found = try_points(scored, [UNDO])
    refined = refine(scored, found)
    assert refined.point == UNDO
    assert refined.loss == found.loss


def test_one_search_row_is_too_few_to_refine(world: TaskWorld, new_base: Path) -> None:
    scored = objective(world, new_base, refine_steps=5)
    scored.rows = scored.rows[:1]
    found = try_points(scored, [COPY])
    assert refine(scored, found) is found
