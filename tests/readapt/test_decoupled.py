"""The ladder's decoupled warm start on a tiny world whose base has moved on."""

from dataclasses import replace

import pytest
import torch

from cluster.adapter_files import Adapter
from readapt.continual.decoupled import DecoupledJob, decoupled_start, train_decoupled
from readapt.continual.directions import fold
from readapt.training.evaluate import Evaluator, Verdict, judge
from readapt.training.lora import load_base
from readapt.training.train import BrokenRunError, RunSettings
from tests.worlds.readapt import World, evolve, logits, make_world, random_factors

PLAN = RunSettings(steps=60, learning_rate=1e-2, eval_every=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def job(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, DecoupledJob]:
    """The bare new base, and the job on it; the evolution's directions are noise, so the fresh one has to do it."""
    model = load_base(evolve(world.base, tmp_path_factory.mktemp("new") / "v2", rank=4, scale=0.6))
    shapes = {name: factors.shape for name, factors in world.specialist.factors.items()}
    evolution = Adapter({n: random_factors(*shape, 2, 0.01, seed=i) for i, (n, shape) in enumerate(shapes.items())})
    evaluate = Evaluator(model, world.encoder, world.task.valid, "exact_match")
    rows = world.encoder.encode_all(world.task.train)
    return model, DecoupledJob(world.specialist, evolution, rows, PLAN, evaluate)


def test_it_recovers_from_the_fused_start_at_the_serving_rank(world: World, job: tuple[torch.nn.Module, DecoupledJob]):
    model, whole = job
    bare = logits(model)
    result = train_decoupled(model, whole)
    assert torch.equal(logits(model), bare), "the model is bare again"
    start = judge(
        model, fold(decoupled_start(whole.old, whole.evolution)), world.encoder, world.task.valid, "exact_match"
    )
    assert result.curve[0].quality == pytest.approx(start.quality, abs=2.0)
    assert result.best_quality >= result.curve[0].quality + 10
    assert result.steps_done == PLAN.steps
    assert result.best.max_rank == world.specialist.max_rank
    again = judge(model, result.best, world.encoder, world.task.valid, "exact_match")
    assert again.quality == pytest.approx(result.best_quality), "what was judged is what is returned"


def test_the_watcher_ends_the_run(job: tuple[torch.nn.Module, DecoupledJob]):
    model, whole = job
    result = train_decoupled(model, replace(whole, watch=lambda evaluation: Verdict.READY))
    assert (result.steps_done, result.is_ready, len(result.curve)) == (0, True, 1)


def test_a_broken_run_keeps_what_it_had(job: tuple[torch.nn.Module, DecoupledJob]):
    model, whole = job
    with pytest.raises(BrokenRunError, match="the loss became") as caught:
        train_decoupled(model, replace(whole, plan=replace(PLAN, learning_rate=1e30)))
    assert caught.value.kept.curve[0].step == 0
