import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.adapters.files import Adapter
from cluster.config.readapt import TrainConfig
from readapt.ladder.runs import warm_settings
from readapt.training.evaluate import Evaluation, Evaluator, Verdict
from readapt.training.lora import blank, blank_like, linear_shapes, load_base, row_norms
from readapt.training.optimiser import learning_rate
from readapt.training.training_group import fine_tune
from readapt.training.training_run import BrokenRunError, CurvePoint, RunSettings, TrainingResult, TrainingRun
from tests.worlds.precision import assert_near
from tests.worlds.readapt import TaskWorld, make_world, ready_when

SETTINGS = RunSettings(steps=30, learning_rate=1e-2, eval_every=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("train"))


@pytest.fixture
def model(world: TaskWorld) -> Any:
    return load_base(world.base)


def run(world: TaskWorld, start: Adapter, model: Any, settings: RunSettings, **more: Any) -> TrainingResult:
    evaluate = more.pop("evaluate", Evaluator(model, world.encoder, world.task.valid[:40], "exact_match"))
    return fine_tune(model, TrainingRun(start, world.encoder.encode_all(world.task.train), settings, evaluate, **more))


def drop_at(evaluation_number: int) -> Callable[[Evaluation], Verdict]:
    verdicts = iter([Verdict.GO_ON] * (evaluation_number - 1) + [Verdict.DROP])
    return lambda evaluation: next(verdicts)


def distance(one: Adapter, other: Adapter) -> float:
    pairs = [(f, other.factors[name]) for name, f in one.factors.items()]
    return max(float((f.a_RD - g.a_RD).abs().max() + (f.b_FR - g.b_FR).abs().max()) for f, g in pairs)


def test_training_from_scratch_lowers_the_loss(world: TaskWorld, model: Any) -> None:
    seen: list[CurvePoint] = []
    result = run(world, blank_like(world.specialist, 0), model, SETTINGS, report=seen.append)
    assert [p.step for p in result.curve] == [0, 10, 20, 30]
    assert result.curve == seen
    assert result.curve[-1].loss < 0.5 * result.curve[0].loss
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)
    assert (result.steps_done, result.is_ready) == (30, False)


def test_only_the_seed_changes_the_result(world: TaskWorld) -> None:
    def trained(seed: int) -> Adapter:
        settings = replace(SETTINGS, steps=5, seed=seed)
        return run(world, blank_like(world.specialist, 0), load_base(world.base), settings).last

    assert distance(trained(0), trained(0)) == 0.0
    assert distance(trained(0), trained(1)) > 0.0


def test_stops_at_the_first_accepted_evaluation(world: TaskWorld, model: Any) -> None:
    start_loss = Evaluator(model, world.encoder, world.task.valid[:40], "exact_match").loss()
    result = run(
        world, blank_like(world.specialist, 0), model, SETTINGS, watch=ready_when(lambda e: e.loss < start_loss)
    )
    assert (result.steps_done, result.is_ready, len(result.curve)) == (10, True, 2)


def test_good_start_is_accepted_without_a_step(world: TaskWorld, model: Any) -> None:
    result = run(world, world.specialist, model, SETTINGS, watch=ready_when(lambda e: e.quality >= 95))
    assert (result.steps_done, result.is_ready) == (0, True)
    assert distance(result.best, world.specialist) == 0.0


def test_never_returns_worse_than_its_start(world: TaskWorld, model: Any) -> None:
    result = run(world, world.specialist, model, replace(SETTINGS, learning_rate=0.3))
    assert result.curve[-1].quality < result.curve[0].quality, "the run is meant to get worse"
    assert result.best_quality == result.curve[0].quality
    assert distance(result.best, world.specialist) == 0.0


def test_among_equal_qualities_the_lowest_loss_is_kept(world: TaskWorld, model: Any) -> None:
    losses = iter([3.0, 1.0, 2.0, float("nan")])
    start, rows = blank_like(world.specialist, 0), world.encoder.encode_all(world.task.train)
    kept = fine_tune(model, TrainingRun(start, rows, SETTINGS, lambda: Evaluation(next(losses), 50.0)))
    short = fine_tune(model, TrainingRun(start, rows, SETTINGS, lambda: Evaluation(1.0, 50.0), drop_at(2)))
    assert kept.best_step == 10
    assert distance(kept.best, short.last) == 0.0


def test_the_default_warm_settings_do_not_lose_a_good_start(world: TaskWorld, model: Any) -> None:
    """Neither the best nor the last checkpoint is worse than the start."""
    result = run(world, world.specialist, model, warm_settings(TrainConfig(), anchor=None))
    start, last = result.curve[0], result.curve[-1]
    assert start.quality >= 95, "the start is meant to be good"
    assert (result.best_quality, result.steps_done) == (max(p.quality for p in result.curve), TrainConfig().full_steps)
    assert min(point.quality for point in result.curve) >= start.quality - 2.5, "one of 40 rows"
    assert max(point.loss for point in result.curve) <= start.loss + 0.02
    assert last.loss <= start.loss


def test_dora_magnitudes_are_trained_and_pulled(world: TaskWorld, model: Any) -> None:
    shapes = linear_shapes(model)
    start = blank(shapes, 4, 8.0, norms=row_norms(model, shapes))
    free = run(world, start, model, SETTINGS)
    held = run(world, start, model, replace(SETTINGS, steps=1, pull_strong=1.0, strong_fraction=1.0))
    assert free.curve[-1].loss < 0.5 * free.curve[0].loss
    name = next(iter(start.factors))
    assert not torch.equal(magnitude(free.last, name), magnitude(start, name))
    assert torch.equal(magnitude(held.last, name), magnitude(start, name))


def magnitude(adapter: Adapter, module: str) -> torch.Tensor:
    magnitude_F = adapter.factors[module].magnitude_F
    assert magnitude_F is not None
    return magnitude_F


def test_averaging_evaluates_and_keeps_the_moving_average(world: TaskWorld, model: Any) -> None:
    """The average equals that of runs of one to five steps without averaging."""
    start, settings = blank_like(world.specialist, 0), replace(SETTINGS, eval_every=1, learning_rate=1e-3)
    rows = world.encoder.encode_all(world.task.train)

    def until(steps: int, averaging: float) -> TrainingResult:
        watch = drop_at(steps + 1)
        return fine_tune(
            model, TrainingRun(start, rows, replace(settings, averaging=averaging), lambda: Evaluation(1.0, 1.0), watch)
        )

    weights = [until(steps, 0.0).last for steps in range(6)]
    name = next(iter(start.factors))
    average_FR = weights[0].factors[name].b_FR
    for adapter in weights[1:]:
        average_FR = 0.7 * average_FR + 0.3 * adapter.factors[name].b_FR
    assert_near(until(5, 0.7).last.factors[name].b_FR, average_FR, multiple=16)


def test_full_pull_at_the_peak_rate_stays_at_the_start(world: TaskWorld, model: Any) -> None:
    result = run(world, world.specialist, model, replace(SETTINGS, steps=1, pull_strong=1.0, strong_fraction=1.0))
    assert distance(result.last, world.specialist) == 0.0


def test_pull_goes_to_the_given_anchor(world: TaskWorld, model: Any) -> None:
    anchor = blank_like(world.specialist, seed=5)
    settings = replace(SETTINGS, steps=1, pull_strong=1.0, strong_fraction=1.0, anchor=anchor)
    assert distance(run(world, world.specialist, model, settings).last, anchor) == 0.0


def test_the_pull_fades_with_the_learning_rate(world: TaskWorld, model: Any) -> None:
    """The learning rate is tiny, so only the pulls move the weights. Each leaves a known share of them."""
    nothing = Adapter(
        {n: replace(f, a_RD=f.a_RD * 0, b_FR=f.b_FR * 0) for n, f in world.specialist.factors.items()},
    )
    settings = replace(
        SETTINGS, learning_rate=1e-12, anchor=nothing, pull_strong=0.2, pull_weak=0.1, strong_fraction=0.5
    )
    last = run(world, world.specialist, model, settings).last
    strengths = [0.2 if step < settings.steps / 2 else 0.1 for step in range(settings.steps)]
    left = math.prod(1 - s * learning_rate(step, settings.steps, 1.0) for step, s in enumerate(strengths))
    for name, factors in last.factors.items():
        specialist_FR = world.specialist.factors[name].b_FR
        assert_near(factors.b_FR, left * specialist_FR, multiple=64, reference=specialist_FR)


def test_stronger_pull_stays_nearer(world: TaskWorld) -> None:
    def moved(strength: float) -> float:
        settings = replace(SETTINGS, pull_strong=strength, pull_weak=strength)
        return distance(run(world, world.specialist, load_base(world.base), settings).last, world.specialist)

    assert moved(0.2) < 0.7 * moved(0.0)


def poisoned(adapter: Adapter) -> Adapter:
    first = next(iter(adapter.factors))
    return Adapter(
        {**adapter.factors, first: replace(adapter.factors[first], a_RD=adapter.factors[first].a_RD * torch.inf)}
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_best(world: TaskWorld, model: Any) -> None:
    with pytest.raises(BrokenRunError, match="step 0") as broken:
        run(world, poisoned(world.specialist), model, SETTINGS)
    again = pickle.loads(pickle.dumps(broken.value))
    assert (str(again), [point.step for point in again.kept.curve]) == (str(broken.value), [0])


def test_evaluations_become_rarer_in_long_runs() -> None:
    due = [step for step in range(801) if RunSettings(steps=800, learning_rate=1.0, eval_every=10).is_due(step)]
    assert due == [*range(0, 160, 10), *range(160, 320, 20), *range(320, 640, 40), 640, 720, 800]
    assert RunSettings(steps=7, learning_rate=1.0, eval_every=10).is_due(7), "the last step always"
