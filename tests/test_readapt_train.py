import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.adapter_files import Adapter
from readapt.evaluate import Evaluation, Evaluator
from readapt.fuse import fuse
from readapt.lora import LoraWeights, attach, blank_like, load_base
from readapt.schedule import learning_rate, pull
from readapt.train import BrokenRunError, CurvePoint, Plan, TrainResult, fine_tune
from tests.readapt_worlds import World, make_world

PLAN = Plan(steps=30, learning_rate=1e-2, eval_every=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("train"))


@pytest.fixture
def model(world: World) -> Any:
    return load_base(world.base)


def run(
    world: World, lora: LoraWeights, model: Any, plan: Plan, accept: Any = lambda e: False, **more: Any
) -> TrainResult:
    evaluate = more.pop("evaluate", Evaluator(model, world.encoder, world.task.valid[:40], "exact_match"))
    rows = world.encoder.encode_all(world.task.train)
    return fine_tune(model, lora, rows, plan, evaluate=evaluate, accept=accept, **more)


def distance(one: Adapter, other: Adapter) -> float:
    pairs = [(f, other.factors[name]) for name, f in one.factors.items()]
    return max(float((f.a_RD - g.a_RD).abs().max() + (f.b_FR - g.b_FR).abs().max()) for f, g in pairs)


def test_training_from_nothing_lowers_the_loss(world: World, model: Any) -> None:
    seen: list[CurvePoint] = []
    result = run(world, attach(model, blank_like(world.specialist, 0)), model, PLAN, report=seen.append)
    assert [p.step for p in result.curve] == [0, 10, 20, 30]
    assert result.curve == seen
    assert result.curve[-1].loss < 0.5 * result.curve[0].loss
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)
    assert (result.steps_done, result.accepted) == (30, False)


def test_same_seed_same_result_other_seed_another(world: World) -> None:
    def trained(seed: int) -> Adapter:
        model = load_base(world.base)
        lora = attach(model, blank_like(world.specialist, 0))
        run(world, lora, model, replace(PLAN, steps=5, seed=seed))
        return lora.export()

    assert distance(trained(0), trained(0)) == 0.0
    assert distance(trained(0), trained(1)) > 0.0


def test_stops_at_the_first_accepted_evaluation(world: World, model: Any) -> None:
    lora = attach(model, blank_like(world.specialist, 0))
    start_loss = Evaluator(model, world.encoder, world.task.valid[:40], "exact_match").loss()
    result = run(world, lora, model, PLAN, accept=lambda e: e.loss < start_loss)
    assert (result.steps_done, result.accepted, len(result.curve)) == (10, True, 2)


def test_good_start_is_accepted_without_a_step(world: World, model: Any) -> None:
    lora = attach(model, world.specialist)
    result = run(world, lora, model, PLAN, accept=lambda e: e.quality >= 95)
    assert (result.steps_done, result.accepted) == (0, True)
    assert distance(result.best, world.specialist) == 0.0


def test_never_returns_worse_than_its_start(world: World, model: Any) -> None:
    lora = attach(model, world.specialist)
    result = run(world, lora, model, replace(PLAN, learning_rate=0.3))
    assert result.curve[-1].quality < result.curve[0].quality, "the run was meant to go wrong"
    assert result.best_quality == result.curve[0].quality
    assert distance(result.best, world.specialist) == 0.0


def test_among_equal_qualities_the_lowest_loss_is_kept(world: World, model: Any) -> None:
    losses = iter([3.0, 1.0, 2.0, float("nan")])
    lora = attach(model, blank_like(world.specialist, 0))
    checkpoints: list[Adapter] = []

    def evaluate() -> Evaluation:
        checkpoints.append(lora.export())
        return Evaluation(next(losses), 50.0)

    result = run(world, lora, model, PLAN, evaluate=evaluate)
    assert result.best_step == 10
    assert distance(result.best, checkpoints[1]) == 0.0


def test_full_pull_at_the_peak_rate_stays_at_the_start(world: World, model: Any) -> None:
    lora = attach(model, world.specialist)
    run(world, lora, model, replace(PLAN, steps=1, pull_strong=1.0, strong_fraction=1.0))
    assert distance(lora.export(), world.specialist) == 0.0


def test_pull_goes_to_the_given_anchor(world: World, model: Any) -> None:
    lora = attach(model, world.specialist)
    zero = fuse(world.specialist, Adapter({}), 0.0, 0.0)
    run(world, lora, model, replace(PLAN, steps=1, pull_strong=1.0, strong_fraction=1.0, anchor=zero))
    assert distance(lora.export(), zero) == 0.0


def test_the_pull_fades_with_the_learning_rate(world: World, model: Any) -> None:
    """With gradients that hardly move anything: what is left after all pulls is the product of what each leaves."""
    lora = attach(model, world.specialist)
    nothing = Adapter(
        {n: replace(f, a_RD=f.a_RD * 0, b_FR=f.b_FR * 0) for n, f in world.specialist.factors.items()},
    )
    plan = replace(PLAN, learning_rate=1e-12, anchor=nothing, pull_strong=0.2, pull_weak=0.1, strong_fraction=0.5)
    run(world, lora, model, plan)
    strengths = [0.2 if step < plan.steps / 2 else 0.1 for step in range(plan.steps)]
    left = math.prod(1 - s * learning_rate(step, plan.steps, 1.0) for step, s in enumerate(strengths))
    for name, factors in lora.export().factors.items():
        torch.testing.assert_close(factors.b_FR, left * world.specialist.factors[name].b_FR, rtol=1e-4, atol=1e-7)


def test_stronger_pull_stays_nearer(world: World) -> None:
    def moved(strength: float) -> float:
        model = load_base(world.base)
        lora = attach(model, world.specialist)
        run(world, lora, model, replace(PLAN, pull_strong=strength, pull_weak=strength))
        return distance(lora.export(), world.specialist)

    assert moved(0.2) < 0.7 * moved(0.0)


def test_loss_that_is_not_finite_ends_the_run_with_what_it_had_reached(world: World, model: Any) -> None:
    lora = attach(model, world.specialist)
    with torch.no_grad():
        lora.parameters()[0].fill_(torch.inf)
    with pytest.raises(BrokenRunError, match="step 0") as broken:
        run(world, lora, model, PLAN)
    again = pickle.loads(pickle.dumps(broken.value))
    assert (str(again), [point.step for point in again.kept.curve]) == (str(broken.value), [0])


def test_cosine_has_no_warmup_for_warm_starts() -> None:
    assert learning_rate(0, 100, 2.0) == 2.0
    assert learning_rate(50, 100, 2.0) == pytest.approx(1.0)
    assert 0.0 < learning_rate(99, 100, 2.0) < 0.001


def test_warmup_climbs_to_the_peak() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup_steps=4) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_pull_is_strong_first_and_weak_later() -> None:
    strengths = [pull(step, 10, 0.5, 0.1, 0.3) for step in range(10)]
    assert strengths == [0.5] * 3 + [0.1] * 7
