"""Many adapters in one pass: the layout of batches, AdamW by rows, and that no adapter notices the others."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.adapter_files import Adapter
from cluster.errors import InvalidAdapterError, InvalidDataError
from readapt.training.data import Encoded, EncodedRows, Row, collate
from readapt.training.evaluate import Evaluation, Evaluator, Verdict, judge, label_logits
from readapt.training.lora import blank, linear_shapes, load_base, row_norms
from readapt.training.lora_stack import layout_of
from readapt.training.optimiser import adamw_, clip_
from readapt.training.packed_batch import pack_batch
from readapt.training.training_group import TrainingGroup, fine_tune, mean_losses
from readapt.training.training_run import BrokenRunError, RunSettings, TrainingResult, TrainingRun
from tests.worlds.precision import FORWARD, TRAINED, assert_near
from tests.worlds.readapt import World, logits, make_world, random_factors, ready_when


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("packing"))


@pytest.fixture
def model(world: World) -> Any:
    return load_base(world.base)


def random_rows(num_rows: int, seed: int, longest: int = 60) -> list[Encoded]:
    rng = random.Random(seed)
    lengths = [rng.randint(2, longest) for _ in range(num_rows)]
    return [Encoded(tuple(rng.choices(range(256), k=n)), rng.randint(1, n - 1)) for n in lengths]


def test_packed_losses_are_those_of_padded_batches(model: Any) -> None:
    cohorts = [[random_rows(7, 0), random_rows(7, 1)], [random_rows(1, 2, longest=5)], [random_rows(5, 3, longest=200)]]
    batch = pack_batch(cohorts)
    runs = [rows for cohort in cohorts for rows in cohort]
    with torch.no_grad():
        packed = mean_losses(model, batch, num_adapters=4)
        for loss, rows in zip(packed, runs, strict=True):
            logits_YV, labels_Y, _ = label_logits(model, collate(rows))
            assert_near(loss, torch.nn.functional.cross_entropy(logits_YV, labels_Y), FORWARD)


@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_hold_each_sequence_once_in_rows_of_its_adapter(seed: int) -> None:
    cohorts = [[random_rows(9, 10 * seed + k) for k in range(3)], [random_rows(2, 99 + seed)]]
    batch = pack_batch(cohorts)
    assert [rows.start for rows in batch.cohort_rows] == [0, batch.cohort_rows[0].stop]
    assert batch.cohort_rows[-1].stop == len(batch.input_ids_BT)
    num_tokens = sum(len(s.input_ids) for cohort in cohorts for rows in cohort for s in rows)
    is_start_BT = torch.nn.functional.pad(batch.position_ids_BT, (1, 0), value=-1).diff(dim=1) != 1
    assert num_tokens <= batch.input_ids_BT.numel()
    assert int(is_start_BT.sum()) >= 29 - len(batch.input_ids_BT)  # the first of a row goes on from the -1 before it
    for owner, rows in enumerate(rows for cohort in cohorts for rows in cohort):
        labels = sorted(t for s in rows for t in s.input_ids[s.num_prompt_tokens :])
        assert sorted(batch.labels_Y[batch.owners_Y == owner].tolist()) == labels


def test_few_cells_of_a_batch_are_padding() -> None:
    rows = random_rows(16, 4)
    batch = pack_batch([[rows]])
    assert batch.input_ids_BT.numel() <= 1.15 * sum(len(row.input_ids) for row in rows)


def test_adamw_by_rows_is_torchs_with_each_rows_own_count_and_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    values, first, second = (torch.zeros(3, 50, dtype=torch.float64) for _ in range(3))
    values.normal_(generator=generator)
    theirs = [torch.nn.Parameter(row.clone()) for row in values]
    rates = [1e-2, 3e-3, 1e-1]
    optimizers = [torch.optim.AdamW([p], lr=r, weight_decay=0.0) for p, r in zip(theirs, rates, strict=True)]
    counts = [0, 0, 0]
    for step in range(12):
        gradients = torch.randn(3, 50, dtype=torch.float64, generator=generator) * torch.tensor([[9.0], [0.1], [1.0]])
        joined = 3 if step >= 4 else 2  # the third joins later
        for parameter, gradient, optimizer in list(zip(theirs, gradients, optimizers, strict=True))[:joined]:
            parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
        counts = [count + (row < joined) for row, count in enumerate(counts)]
        mine = [t[:joined] for t in (values, gradients, first, second)]
        clip_(mine[1], 1.0)
        adamw_(*mine, counts[:joined], rates[:joined])
    assert_near(values, torch.stack([p.detach() for p in theirs]), multiple=16)  # rates are float32


def runs_of_many_kinds(world: World, model: Any) -> list[TrainingRun]:
    """Other layouts, kinds, rates, batch sizes, pulls and lengths of runs; the first two share a stack."""
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
def test_each_adapter_goes_as_it_would_alone(world: World, model: Any, join_at: tuple[int, ...]) -> None:
    runs = runs_of_many_kinds(world, model)
    bare = logits(model)
    together = run_all(TrainingGroup(model), runs, join_at)
    assert torch.equal(logits(model), bare)
    for key, run in enumerate(runs):
        assert_same_run(together[key], fine_tune(model, run))


def test_an_adapter_leaves_at_once_when_it_is_ready_or_dropped(world: World, model: Any) -> None:
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


def test_a_poisoned_adapter_harms_itself_alone(world: World, model: Any) -> None:
    """It shares a stack and the batch's rows with the sound one, and a batch with the others."""
    runs = runs_of_many_kinds(world, model)
    first, factors = next(iter(world.specialist.factors.items()))
    sick = Adapter({**world.specialist.factors, first: replace(factors, a_RD=factors.a_RD * torch.inf)})
    ends = run_all(TrainingGroup(model), [*runs, replace(runs[0], start=sick)], (0, 0, 0, 0, 2))
    assert isinstance(ends[4], BrokenRunError)
    assert "step 0" in str(ends[4])
    for key, run in enumerate(runs):
        assert_same_run(ends[key], fine_tune(model, run))


def test_an_evaluation_meets_its_own_adapter_alone(world: World, model: Any) -> None:
    runs = runs_of_many_kinds(world, model)
    ends = run_all(TrainingGroup(model), runs, (0, 0, 0, 0))
    for end in ends.values():
        alone = judge(model, end.last, world.encoder, world.task.valid[:20], "exact_match")
        assert_near(end.curve[-1].loss, alone.loss, FORWARD)


def test_an_adapter_that_does_not_fit_is_refused_and_the_others_go_on(world: World, model: Any) -> None:
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


def test_an_evaluation_that_raises_leaves_the_model_bare(world: World, model: Any) -> None:
    bare = logits(model)

    def evaluate() -> Evaluation:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fine_tune(model, replace(runs_of_many_kinds(world, model)[0], evaluate=evaluate))
    assert torch.equal(logits(model), bare)


def test_a_row_that_cannot_be_encoded_ends_its_own_run_and_no_other(world: World, model: Any) -> None:
    """It is met in the middle of a run, for rows are encoded when they are first asked for."""
    runs = runs_of_many_kinds(world, model)
    rows = EncodedRows(world.encoder, [*world.task.train[:80], Row("too long", "x" * world.encoder.max_tokens)])
    ends = run_all(TrainingGroup(model), [*runs, replace(runs[1], rows=rows)], (0, 0, 0, 0, 1))
    assert isinstance(ends[4], InvalidDataError)
    assert "leaves no room" in str(ends[4])
    for key, run in enumerate(runs):
        assert_same_run(ends[key], fine_tune(model, run))


def test_an_evaluation_that_fails_ends_its_own_run_and_no_other(world: World, model: Any) -> None:
    stays, other, *_ = runs_of_many_kinds(world, model)

    def evaluate() -> Evaluation:
        raise torch.OutOfMemoryError("no room for these answers")

    ends = run_all(TrainingGroup(model), [replace(other, evaluate=evaluate), stays], (0, 0))
    assert isinstance(ends[0], torch.OutOfMemoryError)
    assert_same_run(ends[1], fine_tune(model, stays))
