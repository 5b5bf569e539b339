import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.adapters.files import Adapter
from cluster.config.readapt import SearchConfig
from cluster.errors import InvalidAdapterError, InvalidDataError, TrainingError
from cluster.storage.checkpoints import open_checkpoint
from readapt.fusion import objective as objective_module
from readapt.fusion.objective import FusionObjective, Trial, best_of
from readapt.fusion.points import BARE, COPY, CORNERS, UNDO, Point
from readapt.fusion.search import BayesianSearch, find, split_valid, subset
from readapt.lowrank.delta import base_evolution
from readapt.training.data import Row
from readapt.training.evaluate import Evaluator, judge
from readapt.training.lora import blank, linear_shapes, load_base
from tests.worlds.precision import FORWARD, assert_near
from tests.worlds.readapt import TaskWorld, evolve, logits, make_rows, make_world

UNCUT = SearchConfig(rank="uncut")
SERVING = SearchConfig(rank="serving")
FINER = Point(0.9, -0.7, (("mlp", 1.2, -0.2), ("attention.late", 0.3, 0.4)))
POINTS = [COPY, UNDO, BARE, Point(0.7, 0.3), FINER]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def new_base(world: TaskWorld) -> Path:
    return evolve(world.base, world.base.parent / "v2", rank=4, scale=1.2)


@pytest.fixture(scope="module")
def evolution(world: TaskWorld, new_base: Path) -> Adapter:
    return base_evolution(open_checkpoint(world.base), open_checkpoint(new_base), 64, 0.9999)[0]


def objective(
    world: TaskWorld,
    new_base: Path,
    evolution: Adapter,
    task: Adapter | None = None,
    config: SearchConfig = SERVING,
) -> FusionObjective:
    rows = world.task.valid[:40]
    return FusionObjective(load_base(new_base), task or world.specialist, evolution, rows, world.encoder, config)


@pytest.mark.parametrize("config", [UNCUT, SERVING], ids=lambda config: config.rank)
@pytest.mark.parametrize("forward_tokens", [64, 10_000])
def test_candidates_have_the_same_losses_together_and_alone(
    world: TaskWorld, new_base: Path, evolution: Adapter, config: SearchConfig, forward_tokens: int, monkeypatch
) -> None:
    monkeypatch.setitem(objective_module.FORWARD_TOKENS, "cpu", forward_tokens)
    scored = objective(world, new_base, evolution, config=config)
    bare = logits(scored.model)
    found = scored.losses(POINTS)
    assert torch.equal(logits(scored.model), bare), "the model is bare again"
    rank = None if config.rank == "uncut" else "task"
    adapters = [scored.adapter(point, rank) for point in POINTS]
    rows = world.task.valid[:40]
    alone = [judge(load_base(new_base), a, world.encoder, rows, "exact_match").loss for a in adapters]
    assert_near(torch.tensor(found), torch.tensor(alone), FORWARD)
    assert len(set(found)) == len(POINTS)


def test_undoing_the_update_scores_like_the_old_specialist(
    world: TaskWorld, new_base: Path, evolution: Adapter
) -> None:
    old = judge(load_base(world.base), world.specialist, world.encoder, world.task.valid[:40], "exact_match").loss
    whole = objective(world, new_base, evolution, config=UNCUT)
    assert whole.losses([UNDO])[0] == pytest.approx(old, rel=1e-3)  # the evolution holds 99.99 % of the energy
    assert objective(world, new_base, evolution).losses([UNDO])[0] == pytest.approx(old, rel=2e-2)


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Merge a DoRA adapter into the weights, as the paper defines it."""
    for name, factors in adapter.factors.items():
        module = model.get_submodule(name)
        direction = module.weight.double() + factors.delta().double()
        weight = factors.magnitude_F.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
        module.weight = nn.Parameter(weight.float(), requires_grad=False)


@pytest.mark.parametrize("config", [UNCUT, SERVING], ids=lambda config: config.rank)
def test_dora_candidates_score_like_merged_weights(
    world: TaskWorld, new_base: Path, evolution: Adapter, config: SearchConfig
) -> None:
    weights = {name: load_base(world.base).get_submodule(name).weight for name in world.specialist.factors}
    magnitudes = {name: weight.norm(dim=1) * torch.linspace(0.9, 1.1, len(weight)) for name, weight in weights.items()}
    factors = {n: replace(f, magnitude_F=magnitudes[n]) for n, f in world.specialist.factors.items()}
    scored = objective(world, new_base, evolution, Adapter(factors), config)
    for point, loss in zip(POINTS, scored.losses(POINTS), strict=True):
        model = load_base(new_base)
        merge(model, scored.adapter(point, None if config.rank == "uncut" else "task"))
        alone = Evaluator(model, world.encoder, world.task.valid[:40], "exact_match").loss()
        assert_near(loss, alone, FORWARD)


def test_candidates_have_the_serving_ranks(world: TaskWorld, new_base: Path, evolution: Adapter) -> None:
    candidate = objective(world, new_base, evolution).adapter(Point(0.9, -0.7))
    assert {n: f.rank for n, f in candidate.factors.items()} == {n: f.rank for n, f in world.specialist.factors.items()}


def test_a_loss_that_is_not_finite_is_infinite_only_for_its_candidate(
    world: TaskWorld, new_base: Path, evolution: Adapter
) -> None:
    wild, tame = objective(world, new_base, evolution, config=UNCUT).losses([Point(1e30, 0.0), COPY])
    assert wild == math.inf
    assert math.isfinite(tame)


def test_a_task_of_another_shape_is_refused(world: TaskWorld, new_base: Path, evolution: Adapter) -> None:
    other = blank(dict.fromkeys(linear_shapes(load_base(new_base)), (5, 7)), rank=2, alpha=4.0)
    with pytest.raises(InvalidAdapterError, match="shape"):
        objective(world, new_base, evolution, other)


def test_find_undoes_a_change_that_only_hurts(world: TaskWorld, new_base: Path, evolution: Adapter) -> None:
    config = replace(UNCUT, trials=24, batch=6)
    found = find(objective(world, new_base, evolution, config=config))
    assert len(found.trials) == 24
    assert [trial.point for trial in found.trials[:3]] == list(CORNERS)
    assert found.loss == min(trial.loss for trial in found.trials)
    assert found.point.beta < -0.8
    assert found == find(objective(world, new_base, evolution, config=config)), "the same seed, the same search"


def test_find_over_kinds_gives_each_kind_its_own_pair(world: TaskWorld, tmp_path: Path) -> None:
    """Only the MLPs have changed, so the beta of attention has no effect."""
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2, kinds=("gate_proj", "up_proj", "down_proj"))
    change = base_evolution(open_checkpoint(world.base), open_checkpoint(new), 64, 0.9999)[0]
    scored = objective(world, new, change, config=replace(UNCUT, groups="kind", trials=12))
    assert scored.groups == ("attention", "mlp")
    found = find(scored)
    assert {len(trial.point.overrides) for trial in found.trials[3:]} == {2}
    assert found.loss <= min(trial.loss for trial in found.trials[:3])


def bowl(point: Point) -> float:
    return (point.alpha - 0.8) ** 2 + (point.beta + 0.4) ** 2


def run(search: BayesianSearch) -> list[int]:
    rounds = []
    while search.can_ask:
        points = search.ask()
        search.tell(points, [bowl(point) for point in points])
        rounds.append(len(points))
    return rounds


def test_the_search_asks_in_rounds_and_beats_the_corners() -> None:
    search = BayesianSearch(SearchConfig(trials=30, batch=8))
    assert run(search) == [8, 8, 8, 6]
    assert search.is_over
    found = search.result()
    assert found.loss < 0.3 * min(bowl(corner) for corner in CORNERS)
    assert len({trial.point for trial in found.trials}) == 30
    assert all(0 <= t.point.alpha <= 1.5 and -1 <= t.point.beta <= 1 for t in found.trials)


def test_the_model_of_the_losses_beats_chance() -> None:
    config = SearchConfig(trials=48, batch=4)
    informed, blind = BayesianSearch(config), BayesianSearch(config)
    run(informed)
    while blind.can_ask:
        points = blind.ask()
        blind.tell(points, [0.0] * len(points))
    last = [sum(bowl(trial.point) for trial in s.result().trials[-16:]) for s in (informed, blind)]
    assert last[0] < 0.75 * last[1]


def test_the_corners_are_tried_even_with_fewer_trials() -> None:
    search = BayesianSearch(SearchConfig(trials=1))
    assert search.ask() == list(CORNERS)
    assert not search.can_ask


def test_rounds_may_be_told_late_or_never() -> None:
    search = BayesianSearch(SearchConfig(trials=6, batch=3))
    first, second = search.ask(), search.ask()
    search.tell(second, [1.0, math.inf, 0.5])
    assert not search.is_over
    search.tell(first, None)
    assert search.is_over
    assert search.result().point == second[2]


def test_a_search_without_any_loss_says_so() -> None:
    search = BayesianSearch(SearchConfig(trials=3))
    search.tell(search.ask(), None)
    with pytest.raises(TrainingError, match="no result: every round of candidates failed"):
        search.result()


def test_best_of_takes_the_earliest_of_equals() -> None:
    trials = [Trial(BARE, math.inf), Trial(COPY, 0.5), Trial(UNDO, 0.5)]
    assert best_of(trials).point == COPY


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


def test_one_row_cannot_be_divided() -> None:
    with pytest.raises(InvalidDataError, match="two different"):
        split_valid([Row("p", "c"), Row("p", "c")], SearchConfig())
