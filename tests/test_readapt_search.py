import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from cluster.adapter_files import Adapter, LoraFactors
from cluster.checkpoints import open_checkpoint
from cluster.config import SearchConfig
from cluster.errors import InvalidDataError
from readapt.data import Row
from readapt.delta import base_evolution
from readapt.evaluate import Evaluator
from readapt.lora import attach, load_base
from readapt.search import (
    BARE,
    COPY,
    CORNERS,
    UNDO,
    FusionObjective,
    Trial,
    best_of,
    space,
    split_valid,
    subset,
    try_points,
)
from tests.readapt_worlds import World, evolve, make_rows, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def new_base(world: World) -> Path:
    return evolve(world.base, world.base.parent / "v2", rank=4, scale=1.2)


def objective(world: World, new_base: Path, task: Adapter | None = None) -> FusionObjective:
    evolution, _ = base_evolution(open_checkpoint(world.base), open_checkpoint(new_base), 64, 0.9999)
    model = load_base(new_base)
    task = task or world.specialist
    return FusionObjective(model, attach(model, task), task, evolution, world.task.valid[:40], world.encoder)


def test_corners_are_copy_undo_and_bare(world: World, new_base: Path) -> None:
    def loss_on(base: Path, adapter: Adapter | None) -> float:
        model = load_base(base)
        if adapter is not None:
            attach(model, adapter)
        return Evaluator(model, world.encoder, world.task.valid[:40], "exact_match").loss()

    found = objective(world, new_base)
    assert CORNERS == (COPY, UNDO, BARE)
    assert found.loss(*COPY) == pytest.approx(loss_on(new_base, world.specialist), rel=1e-5)
    assert found.loss(*BARE) == pytest.approx(loss_on(new_base, None), rel=1e-5)
    assert found.loss(*UNDO) == pytest.approx(loss_on(world.base, world.specialist), rel=2e-2)


def test_search_finds_what_undoes_the_change(world: World, new_base: Path) -> None:
    result = try_points(objective(world, new_base), [*CORNERS, (1.0, -0.5), (0.5, 0.5)])
    assert (result.alpha, result.beta) == UNDO
    assert len(result.trials) == 5
    assert result.loss == min(trial.loss for trial in result.trials)


def test_candidates_have_the_serving_ranks(world: World, new_base: Path) -> None:
    candidate = objective(world, new_base).adapter(0.9, -0.7)
    assert {n: f.rank for n, f in candidate.factors.items()} == {n: f.rank for n, f in world.specialist.factors.items()}


def test_loss_that_is_not_a_number_is_infinite(world: World, new_base: Path) -> None:
    factors = dict(world.specialist.factors)
    name = next(iter(factors))
    broken = factors[name].a_RD.clone()
    broken[0, 0] = torch.inf
    factors[name] = LoraFactors(broken, factors[name].b_FR, factors[name].scaling)
    assert objective(world, new_base, Adapter(factors)).loss(*COPY) == math.inf


def test_best_of_takes_the_earliest_of_equals() -> None:
    trials = [Trial(0.0, 0.0, math.inf), Trial(1.0, 0.0, 0.5), Trial(1.0, 0.1, 0.5)]
    assert best_of(trials).beta == 0.0


def test_space_has_the_configured_bounds() -> None:
    config = SearchConfig(alpha_max=1.2, beta_min=-0.8, beta_max=0.4)
    assert space(config) == {"alpha": (0.0, 1.2), "beta": (-0.8, 0.4)}


def test_subset_is_stratified_and_repeatable() -> None:
    rows = [Row(f"p{i}", "often") for i in range(90)] + [Row(f"q{i}", f"rare{i % 3}") for i in range(9)]
    chosen = subset(rows, 12, seed=1)
    assert Counter(row.completion for row in chosen) == {"often": 3, "rare0": 3, "rare1": 3, "rare2": 3}
    assert chosen == subset(rows, 12, seed=1)
    assert chosen != subset(rows, 12, seed=2)
    assert sorted(subset(rows, 999, seed=1), key=str) == sorted(rows, key=str)


def test_gate_rows_are_disjoint_from_search_rows() -> None:
    rows = make_rows(80, seed=0) + make_rows(80, seed=0)
    search, gate = split_valid(rows, SearchConfig(subset_rows=20))
    assert len(search) == 20
    assert not set(search) & set(gate)
    assert set(search) | set(gate) == set(rows)


def test_gate_gets_at_least_half_of_few_rows() -> None:
    rows = list(dict.fromkeys(make_rows(9, seed=0)))
    search, gate = split_valid(rows, SearchConfig(subset_rows=128))
    assert len(gate) >= len(search) >= 4


def test_one_row_cannot_be_shared_out() -> None:
    with pytest.raises(InvalidDataError, match="two different"):
        split_valid([Row("p", "c"), Row("p", "c")], SearchConfig())
