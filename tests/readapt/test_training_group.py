"""Runs side by side: each trains as it would alone, and none affects the others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.adapters.files import Adapter
from cluster.errors import InvalidAdapterError, InvalidDataError
from readapt.training.data import EncodedRows, Row
from readapt.training.evaluate import Evaluation, Evaluator, Verdict, judge
from readapt.training.lora import blank, linear_shapes, load_base, row_norms
from readapt.training.lora_stack import layout_of
from readapt.training.training_group import TrainingGroup, fine_tune
from readapt.training.training_run import BrokenRunError, RunSettings, TrainingResult, TrainingRun
from tests.worlds.precision import FORWARD, TRAINED, assert_near
from tests.worlds.readapt import TaskWorld, logits, make_world, random_factors, ready_when


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("group"))


@pytest.fixture
def model(world: TaskWorld) -> Any:
    return load_base(world.base)


def runs_of_many_kinds(world: TaskWorld, model: Any) -> list[TrainingRun]:
    """Runs with different layouts, kinds, rates, batch sizes, pulls and lengths. The first two share a cohort."""
    shapes = linear_shapes(model)
    starts = [
        world.specialist,
        blank(shapes, 8, 16.0, seed=1),
        blank(shapes, 3, 6.0, rslora=True, modules=("q_proj", "v_proj"), seed=2),
        blank(shapes, 4, 8.0, seed=3, norms=row_norms(model, shapes)),
    ]
    all_settings = [
        RunSettings(12, 1e-3, pull_strong=0.1, pull_weak=0.01, strong_fraction=0.5, eval_every=5),
        RunSettings(20, 5e-3, seed=1, eval_every=7, averaging=0.7),
        RunSettings(9, 1e-2, batch_rows=6, seed=2, warmup_steps=3),
        RunSettings(15, 5e-3, seed=3),
    ]
    rows = world.encoder.encode_all(world.task.train)
    evaluate = Evaluator(model, world.encoder, world.task.valid[:20], "exact_match")
    return [TrainingRun(start, rows, settings, evaluate) for start, settings in zip(starts, all_settings, strict=True)]


def run_all(group: TrainingGroup, runs: Sequence[TrainingRun], join_at: Sequence[int]) -> dict[Any, Any]:
    ends: dict[Any, Any] = {}
    step = 0
    while len(ends) < len(runs):
        for key, run in enumerate(runs):
            if join_at[key] == step:
                group.add(key, run)
        ends.update(group.step())
        step += 1
    return ends


def assert_same_run(one: TrainingResult, other: TrainingResult) -> None:
    assert [p.step for p in one.curve] == [p.step for p in other.curve]
    for mine, theirs in zip(one.curve, other.curve, strict=True):
        assert_near(mine.loss, theirs.loss, TRAINED)
    assert (one.steps_done, one.verdict) == (other.steps_done, other.verdict)
    assert_same_weights(one.last, other.last)


def assert_same_weights(one: Adapter, other: Adapter) -> None:
    assert layout_of(one) == layout_of(other)
    for name, factors in one.factors.items():
        assert_near(factors.delta(), other.factors[name].delta(), TRAINED)
        if factors.magnitude_F is not None:
            assert_near(factors.magnitude_F, other.factors[name].magnitude_F, TRAINED)


@pytest.mark.parametrize("join_at", [(0, 0, 0, 0), (3, 0, 6, 1)])
def test_each_adapter_trains_as_it_would_alone(world: TaskWorld, model: Any, join_at: tuple[int, ...]) -> None:
    runs = runs_of_many_kinds(world, model)
    bare = logits(model)
    together = run_all(TrainingGroup(model), runs, join_at)
    assert torch.equal(logits(model), bare)
    for key, run in enumerate(runs):
        assert_same_run(together[key], fine_tune(model, run))


def test_an_adapter_leaves_at_once_when_it_is_ready_or_dropped(world: TaskWorld, model: Any) -> None:
    stays, other, *_ = runs_of_many_kinds(world, model)
    leaves = replace(other, watch=ready_when(lambda evaluation: True))
    dropped = replace(other, watch=lambda evaluation: Verdict.DROP)
    group = TrainingGroup(model)
    for key, run in (("leaves", leaves), ("stays", stays), ("dropped", dropped)):
        group.add(key, run)
    ends = {key: end for key, end in group.step() if isinstance(end, TrainingResult)}
    assert {key: (end.verdict, end.steps_done) for key, end in ends.items()} == {
        "leaves": (Verdict.READY, 0),
        "dropped": (Verdict.DROP, 0),
    }
    [(_, end)] = [end for _ in range(20) for end in group.step()]
    assert isinstance(end, TrainingResult)
    assert_same_run(end, fine_tune(model, stays))


def test_a_broken_adapter_does_not_affect_the_others(world: TaskWorld, model: Any) -> None:
    """It shares a cohort with the first run, and a batch with all others."""
    runs = runs_of_many_kinds(world, model)
    first, factors = next(iter(world.specialist.factors.items()))
    sick = Adapter({**world.specialist.factors, first: replace(factors, a_RD=factors.a_RD * torch.inf)})
    ends = run_all(TrainingGroup(model), [*runs, replace(runs[0], start=sick)], (0, 0, 0, 0, 2))
    assert isinstance(ends[4], BrokenRunError)
    assert "step 0" in str(ends[4])
    for key, run in enumerate(runs):
        assert_same_run(ends[key], fine_tune(model, run))


def test_an_evaluation_runs_only_its_own_adapter(world: TaskWorld, model: Any) -> None:
    runs = runs_of_many_kinds(world, model)
    ends = run_all(TrainingGroup(model), runs, (0, 0, 0, 0))
    for end in ends.values():
        alone = judge(model, end.last, world.encoder, world.task.valid[:20], "exact_match")
        assert_near(end.curve[-1].loss, alone.loss, FORWARD)


def test_an_adapter_that_does_not_fit_is_refused_and_the_others_go_on(world: TaskWorld, model: Any) -> None:
    run = runs_of_many_kinds(world, model)[0]
    group = TrainingGroup(model)
    group.add("sound", run)
    name = next(iter(world.specialist.factors))
    with pytest.raises(InvalidAdapterError):
        group.add("misfit", replace(run, start=Adapter({name: random_factors(5, 7, 2, 1.0, seed=0)})))
    assert group.step() == []
    group.close()
    group.add("sound", run)  # its name is free again
    group.close()


def test_an_evaluation_that_raises_leaves_the_model_bare(world: TaskWorld, model: Any) -> None:
    bare = logits(model)

    def evaluate() -> Evaluation:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fine_tune(model, replace(runs_of_many_kinds(world, model)[0], evaluate=evaluate))
    assert torch.equal(logits(model), bare)


def test_a_row_that_cannot_be_encoded_ends_its_own_run_and_no_other(world: TaskWorld, model: Any) -> None:
    """The row comes in the middle of a run, because rows are encoded when they are first used."""
    runs = runs_of_many_kinds(world, model)
    rows = EncodedRows(world.encoder, [*world.task.train[:80], Row("too long", "x" * world.encoder.max_tokens)])
    ends = run_all(TrainingGroup(model), [*runs, replace(runs[1], rows=rows)], (0, 0, 0, 0, 1))
    assert isinstance(ends[4], InvalidDataError)
    assert "leaves no room" in str(ends[4])
    for key, run in enumerate(runs):
        assert_same_run(ends[key], fine_tune(model, run))


def test_an_evaluation_that_fails_ends_its_own_run_and_no_other(world: TaskWorld, model: Any) -> None:
    stays, other, *_ = runs_of_many_kinds(world, model)

    def evaluate() -> Evaluation:
        raise torch.OutOfMemoryError("no room for these answers")

    ends = run_all(TrainingGroup(model), [replace(other, evaluate=evaluate), stays], (0, 0))
    assert isinstance(ends[0], torch.OutOfMemoryError)
    assert_same_run(ends[1], fine_tune(model, stays))
