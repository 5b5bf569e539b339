from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapter_files import Adapter, LoraFactors
from cluster.checkpoints import open_checkpoint
from cluster.config import GateConfig, LadderConfig, ReadaptConfig, SearchConfig, TrainConfig
from readapt.delta import base_evolution
from readapt.evaluate import Evaluator, Gate, judge
from readapt.ladder import RUNGS, Ladder, Outcome, finish
from readapt.lora import blank_like, load_base
from readapt.plans import anchor_adapter, train_scratch
from readapt.points import COPY, CORNERS
from readapt.search import FusionObjective, SearchResult, split_valid
from readapt.train import CurvePoint
from tests.readapt_worlds import World, evolve, logits, make_world, ready_when, try_points
from tests.worlds import make_checkpoint

TRAIN = TrainConfig(
    short_steps=40,
    full_steps=80,
    eval_every=20,
    learning_rate=4e-3,
    scratch_learning_rate=1e-2,
    scratch_steps=120,
    max_tokens=64,
)
RELORA = LadderConfig(rungs=("copy", "fused", "train", "scratch"))
CONFIG = ReadaptConfig(
    ladder=RELORA, search=SearchConfig(subset_rows=30), train=TRAIN, gate=GateConfig(tolerance_points=2.0)
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("ladder"))


def corner_search(objective: FusionObjective) -> SearchResult:
    return try_points(objective, CORNERS)


def refuse_search(objective: FusionObjective) -> SearchResult:
    raise AssertionError("a copy that passes needs no search")


def copy_search(objective: FusionObjective) -> SearchResult:
    return try_points(objective, [COPY])


def climb(world: World, new: Path, config: ReadaptConfig = CONFIG, reference: float | None = None, **more) -> Outcome:
    if reference is None:
        gate_rows = split_valid(world.task.valid, config.search)[1]
        reference = judge(load_base(world.base), world.specialist, world.encoder, gate_rows, "exact_match").quality
    old = more.pop("old", world.specialist)
    evolution, _ = base_evolution(open_checkpoint(world.base), open_checkpoint(new), 64, 0.9999)
    model = more.pop("model", None) or load_base(new)
    search = more.pop("search", corner_search)
    gate, metric, old_model = Gate.beside(reference, config.gate), "exact_match", load_base(world.base)
    ladder = Ladder(model, old_model, world.encoder, world.task, old, evolution, config, gate, metric, search, **more)
    return finish(model, ladder.climb())


def gate_quality(world: World, new: Path, adapter: Adapter) -> float:
    gate_rows = split_valid(world.task.valid, CONFIG.search)[1]
    return judge(load_base(new), adapter, world.encoder, gate_rows, "exact_match").quality


def test_unchanged_base_keeps_the_copy(world: World) -> None:
    outcome = climb(world, world.base, search=refuse_search)
    assert (outcome.rung, outcome.accepted, outcome.alpha, outcome.beta) == ("copy", True, 1.0, 0.0)
    assert outcome.quality == outcome.copy_quality > 90
    assert [a.rung for a in outcome.attempts] == ["copy"]
    assert outcome.adapter is world.specialist


def test_low_rank_change_is_undone_by_fusion_without_training(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    outcome = climb(world, new)
    assert (outcome.rung, outcome.accepted, outcome.alpha, outcome.beta) == ("fused", True, 1.0, -1.0)
    assert outcome.copy_quality < 30 < 90 < outcome.quality
    assert [a.rung for a in outcome.attempts] == ["copy", "fused"]
    assert gate_quality(world, new, outcome.adapter) == outcome.quality
    assert outcome.golden[0]["completion"] == world.task.valid[0].completion


def test_change_out_of_fusions_reach_takes_training(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    seen: list[tuple[str, CurvePoint]] = []
    outcome = climb(world, new, report=lambda rung, point: seen.append((rung, point)))
    assert outcome.accepted
    assert outcome.rung in ("short", "full")
    assert outcome.quality >= outcome.reference - 2.0
    assert gate_quality(world, new, outcome.adapter) == outcome.quality
    rungs = [a.rung for a in outcome.attempts]
    assert rungs == [rung for rung in RUNGS if rung != "transplant"][: len(rungs)]
    assert rungs[-1] == outcome.rung
    assert [(a.rung, p) for a in outcome.attempts for p in a.curve] == seen
    assert all(a.quality == max(p.quality for p in a.curve) for a in outcome.attempts)
    assert all(a.seconds > 0 for a in outcome.attempts)


def test_short_ends_where_full_begins(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    never = replace(CONFIG, train=replace(TRAIN, short_steps=20, full_steps=40, scratch_steps=20))
    outcome = climb(world, new, never, reference=200.0)
    steps = {a.rung: [p.step for p in a.curve] for a in outcome.attempts}
    assert steps == {"copy": [0], "fused": [0], "short": [20], "full": [40], "scratch": [0, 20]}


def test_unreachable_gate_falls_to_what_scratch_reaches(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    lenient = GateConfig(tolerance_points=2.0, max_drop_points=200.0)
    few = replace(CONFIG, train=replace(TRAIN, full_steps=20, scratch_steps=20), gate=lenient)
    outcome = climb(world, new, few, reference=200.0)
    assert 0 < outcome.reference < 90
    assert outcome.accepted
    assert outcome.quality == gate_quality(world, new, outcome.adapter)
    assert outcome.rung != "scratch", "the undone adapter is better than 20 steps from scratch"


def test_a_gate_falls_no_further_than_its_floor(world: World, tmp_path: Path) -> None:
    """Scratch training of a few steps reaches next to nothing: that is no reason to ship next to nothing."""
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    few = replace(CONFIG, train=replace(TRAIN, full_steps=1, scratch_steps=1, learning_rate=1e-9))
    outcome = climb(world, new, few)
    assert not outcome.accepted
    assert outcome.ready is None
    assert outcome.reference == 100.0 - CONFIG.gate.max_drop_points


def test_transplant_passes_without_a_step(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    config = replace(CONFIG, ladder=LadderConfig())
    outcome = climb(world, new, config, search=refuse_search)
    assert [a.rung for a in outcome.attempts] == ["copy", "transplant"]
    assert outcome.accepted
    assert outcome.quality == gate_quality(world, new, outcome.adapter) > outcome.copy_quality
    assert outcome.ready is not None
    assert (outcome.ready.rung, outcome.ready.step) == ("transplant", 0)
    assert outcome.ready.seconds >= sum(a.seconds for a in outcome.attempts)


def test_a_budget_is_used_up_and_readiness_noted_on_the_way(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    ladder = LadderConfig(rungs=("copy", "fused", "train", "scratch"), stop="budget")
    outcome = climb(world, new, replace(CONFIG, ladder=ladder))
    assert outcome.ready is not None
    assert outcome.ready.rung == "fused"
    assert [a.rung for a in outcome.attempts] == ["copy", "fused", "short", "full"], "ready, so no scratch"
    assert outcome.attempts[-1].curve[-1].step == TRAIN.full_steps
    assert outcome.quality >= outcome.ready.quality
    alone = climb(world, new, replace(CONFIG, ladder=replace(ladder, rungs=("scratch",))))
    assert alone.copy_quality is None
    assert alone.attempts[0].curve[-1].step == TRAIN.scratch_steps
    assert alone.ready is not None
    assert 0 < alone.ready.step < TRAIN.scratch_steps


def test_unrelated_bases_go_straight_to_scratch(world: World, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", std=0.08, seed=99)
    outcome = climb(world, other, replace(CONFIG, ladder=LadderConfig()), search=refuse_search)
    assert [a.rung for a in outcome.attempts] == ["scratch"]


def test_scratch_ships_where_the_old_adapter_is_worthless(world: World) -> None:
    worthless = blank_like(world.specialist, seed=3)
    start = replace(CONFIG, train=replace(TRAIN, full_steps=20, learning_rate=1e-9))
    outcome = climb(world, world.base, start, old=worthless)
    assert (outcome.rung, outcome.accepted, outcome.alpha, outcome.beta) == ("scratch", True, 0.0, 0.0)
    assert outcome.quality >= outcome.reference - 2.0 > 90


def test_broken_training_is_not_accepted_and_costs_nothing_that_was_reached(world: World, tmp_path: Path) -> None:
    """Training that breaks down on every rung leaves the better of copy and fused start, not to be shipped."""
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    wild = replace(CONFIG, train=replace(TRAIN, learning_rate=1e30, scratch_learning_rate=1e30))
    outcome = climb(world, new, wild)
    assert not outcome.accepted
    assert outcome.reference > 90
    assert [a.rung for a in outcome.attempts] == ["copy", "fused"]
    assert outcome.quality == gate_quality(world, new, outcome.adapter)
    assert all(torch.isfinite(f.a_RD).all() for f in outcome.adapter.factors.values())


def test_a_good_start_survives_a_run_that_breaks_down(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    wild = replace(CONFIG, train=replace(TRAIN, learning_rate=1e30, scratch_learning_rate=1e30))
    outcome = climb(world, new, wild, reference=200.0)
    assert (outcome.rung, outcome.accepted, outcome.beta) == ("fused", False, -1.0)
    assert outcome.quality > 90 > outcome.copy_quality
    assert gate_quality(world, new, outcome.adapter) == outcome.quality


def test_search_and_gate_do_not_share_rows_and_tests_are_not_touched(world: World, tmp_path: Path) -> None:
    """A world whose test rows cannot even be encoded, and a search that sees which rows it got."""
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    poisoned = replace(world, task=replace(world.task, test=[replace(world.task.test[0], completion="x" * 999)]))
    model = load_base(new)
    searched: list[float] = []

    def search(objective: FusionObjective) -> SearchResult:
        searched.extend(objective.losses([COPY]))
        return corner_search(objective)

    assert climb(poisoned, new, model=model, search=search).accepted
    search_rows, gate_rows = split_valid(world.task.valid, CONFIG.search)
    assert not set(search_rows) & set(gate_rows)
    expected = judge(model, world.specialist, world.encoder, search_rows, "exact_match").loss
    assert searched == [pytest.approx(expected, rel=1e-5)]


def test_model_is_bare_after_the_climb(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    model = load_base(new)
    bare = logits(model)
    climb(world, new, model=model)
    assert torch.equal(logits(model), bare)


def test_golden_prompts_are_as_many_as_asked_for(world: World) -> None:
    outcome = climb(world, world.base, num_golden=2)
    assert [set(g) for g in outcome.golden] == [{"prompt", "completion"}] * 2


def test_train_scratch_alone_reaches_the_gate(world: World) -> None:
    model = load_base(world.base)
    bare = logits(model)
    evaluate = Evaluator(model, world.encoder, world.task.valid, "exact_match")
    result = train_scratch(
        model,
        world.encoder,
        world.task.train,
        world.specialist,
        TRAIN,
        evaluate=evaluate,
        watch=ready_when(lambda e: e.quality >= 60),
    )
    assert result.is_ready
    assert 0 < result.steps_done <= TRAIN.scratch_steps
    assert {f.rank for f in result.best.factors.values()} == {8}
    assert torch.equal(logits(model), bare)


def test_anchors(world: World) -> None:
    name, factors = next(iter(world.specialist.factors.items()))
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    old = Adapter({name: LoraFactors(q.T @ factors.a_RD, factors.b_FR @ q, factors.scaling)})
    start = Adapter({name: factors})
    assert anchor_adapter("init", start, old) is None
    zero = anchor_adapter("zero", start, old)
    assert zero is not None
    assert not zero.factors[name].a_RD.any()
    turned = anchor_adapter("old", start, old)
    assert turned is not None
    torch.testing.assert_close(turned.factors[name].b_FR, factors.b_FR, rtol=1e-3, atol=1e-4)


def test_training_with_each_anchor(world: World, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    losses = {}
    for anchor in ("old", "zero"):
        few = replace(CONFIG, train=replace(TRAIN, full_steps=20, scratch_steps=20, anchor=anchor, pull_strong=0.1))
        outcome = climb(world, new, few, reference=200.0, search=copy_search)
        losses[anchor] = next(a for a in outcome.attempts if a.rung == "short").curve[-1].loss
    assert losses["old"] < losses["zero"], "a pull to nothing holds training back"
