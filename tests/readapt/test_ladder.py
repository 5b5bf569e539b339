from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import Adapter, LoraFactors
from cluster.config.readapt import GateConfig, LadderConfig, ReadaptConfig, SearchConfig, TrainConfig, TransplantConfig
from cluster.errors import InvalidCheckpointError, TrainingError
from cluster.storage.checkpoints import open_checkpoint
from readapt.fusion.points import COPY, CORNERS
from readapt.fusion.search import FusionObjective, SearchResult
from readapt.ladder import ladder as ladder_module
from readapt.ladder import starts as starts_module
from readapt.ladder.inputs import Bases, LadderTask, TaskRows
from readapt.ladder.ladder import Ladder
from readapt.ladder.outcome import Outcome
from readapt.ladder.runs import anchor_adapter, train_scratch
from readapt.lowrank.delta import base_evolution
from readapt.training.evaluate import Evaluator, Gate, judge
from readapt.training.lora import blank_like, load_base, row_norms
from readapt.training.training_run import CurvePoint
from tests.worlds.readapt import TaskWorld, evolve, logits, make_world, ready_when, try_points
from tests.worlds.serving import make_checkpoint

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
def world(tmp_path_factory: pytest.TempPathFactory) -> TaskWorld:
    return make_world(tmp_path_factory.mktemp("ladder"))


def corner_search(objective: FusionObjective) -> SearchResult:
    return try_points(objective, CORNERS)


def refuse_search(objective: FusionObjective) -> SearchResult:
    raise AssertionError("a copy that passes needs no search")


def copy_search(objective: FusionObjective) -> SearchResult:
    return try_points(objective, [COPY])


def climb(
    world: TaskWorld, new: Path, config: ReadaptConfig = CONFIG, reference: float | None = None, **more
) -> Outcome:
    rows = TaskRows.split(world.task, config.search)
    if reference is None:
        reference = judge(load_base(world.base), world.specialist, world.encoder, rows.gate, "exact_match").quality
    evolution, _ = base_evolution(open_checkpoint(world.base), open_checkpoint(new), 64, 0.9999)
    model = more.pop("model", None) or load_base(new)
    bases = Bases(load_base(world.base), model, world.encoder, evolution)
    old, gate = more.pop("old", world.specialist), Gate.beside(reference, config.gate)
    task = LadderTask(old, rows, gate, "exact_match")
    return Ladder(bases, task, config, more.pop("search", corner_search), **more).climb_alone()


def gate_quality(world: TaskWorld, new: Path, adapter: Adapter) -> float:
    gate_rows = TaskRows.split(world.task, CONFIG.search).gate
    return judge(load_base(new), adapter, world.encoder, gate_rows, "exact_match").quality


def test_an_unchanged_base_keeps_the_copy(world: TaskWorld) -> None:
    outcome = climb(world, world.base, search=refuse_search)
    assert (outcome.rung, outcome.accepted, outcome.alpha, outcome.beta) == ("copy", True, 1.0, 0.0)
    assert outcome.quality == outcome.copy_quality > 90
    assert [a.rung for a in outcome.attempts] == ["copy"]
    assert outcome.adapter is world.specialist


def test_fusion_undoes_a_low_rank_change_without_training(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    outcome = climb(world, new)
    assert (outcome.rung, outcome.accepted, outcome.alpha, outcome.beta) == ("fused", True, 1.0, -1.0)
    assert outcome.copy_quality < 30 < 90 < outcome.quality
    assert [a.rung for a in outcome.attempts] == ["copy", "fused"]
    assert gate_quality(world, new, outcome.adapter) == outcome.quality


def test_a_change_that_fusion_cannot_undo_takes_training(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    seen: list[tuple[str, CurvePoint]] = []
    outcome = climb(world, new, report=lambda rung, point: seen.append((rung, point)))
    assert outcome.accepted
    assert outcome.rung in ("short", "full")
    assert outcome.quality >= outcome.reference - 2.0
    assert gate_quality(world, new, outcome.adapter) == outcome.quality
    rungs = [a.rung for a in outcome.attempts]
    assert rungs == ["copy", "fused", "short", "full", "scratch"][: len(rungs)]
    assert rungs[-1] == outcome.rung
    assert [(a.rung, p) for a in outcome.attempts for p in a.curve] == seen
    assert all(a.quality == max(p.quality for p in a.curve) for a in outcome.attempts)
    assert all(a.seconds > 0 for a in outcome.attempts)


def test_steps_after_short_steps_count_as_full(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    never = replace(CONFIG, train=replace(TRAIN, short_steps=20, full_steps=40, scratch_steps=20))
    outcome = climb(world, new, never, reference=200.0)
    steps = {a.rung: [p.step for p in a.curve] for a in outcome.attempts}
    assert steps == {"copy": [0], "fused": [0], "short": [20], "full": [40], "scratch": [0, 20]}


def test_an_unreachable_gate_is_lowered_to_what_scratch_reaches(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    lenient = GateConfig(tolerance_points=2.0, max_drop_points=200.0)
    few = replace(CONFIG, train=replace(TRAIN, full_steps=20, scratch_steps=20), gate=lenient)
    outcome = climb(world, new, few, reference=200.0)
    assert 0 < outcome.reference < 90
    assert outcome.accepted
    assert outcome.quality == gate_quality(world, new, outcome.adapter)
    assert outcome.rung != "scratch", "the undone adapter is better than 20 steps from scratch"


def test_a_gate_is_not_lowered_below_its_floor(world: TaskWorld, tmp_path: Path) -> None:
    """A few steps of scratch training reach almost nothing. That must not let almost nothing ship."""
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    few = replace(CONFIG, train=replace(TRAIN, full_steps=1, scratch_steps=1, learning_rate=1e-9))
    outcome = climb(world, new, few)
    assert not outcome.accepted
    assert outcome.ready is None
    assert outcome.reference == 100.0 - CONFIG.gate.max_drop_points


def test_a_transplant_passes_without_training(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    config = replace(CONFIG, ladder=LadderConfig(copy_cosine=0.9))
    outcome = climb(world, new, config, search=refuse_search)
    assert [a.rung for a in outcome.attempts] == ["copy", "transplant"]
    assert outcome.accepted
    assert outcome.copy_quality is not None
    assert outcome.quality == gate_quality(world, new, outcome.adapter) > outcome.copy_quality
    assert outcome.ready is not None
    assert (outcome.ready.rung, outcome.ready.step) == ("transplant", 0)
    assert outcome.ready.seconds >= sum(a.seconds for a in outcome.attempts)


def test_if_the_bases_moved_apart_the_transplant_comes_before_the_copy(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    outcome = climb(world, new, only("copy", "transplant"))
    assert [a.rung for a in outcome.attempts] == ["transplant"]
    outcome = climb(world, new, only("copy", "transplant"), reference=200.0)
    assert [a.rung for a in outcome.attempts] == ["transplant", "wide", "copy"], (
        "the transplant misses by far, so a wide one follows"
    )


def test_a_budget_is_used_up_and_the_first_pass_is_recorded(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    ladder = LadderConfig(rungs=("copy", "fused", "train", "scratch"), stop="budget")
    outcome = climb(world, new, replace(CONFIG, ladder=ladder))
    assert outcome.ready is not None
    assert outcome.ready.rung == "fused"
    assert [a.rung for a in outcome.attempts] == ["copy", "fused", "full"], (
        "it is ready, so there is no scratch and few evaluations"
    )
    assert outcome.attempts[-1].curve[-1].step == TRAIN.full_steps
    assert outcome.quality >= outcome.ready.quality
    alone = climb(world, new, replace(CONFIG, ladder=replace(ladder, rungs=("scratch",))))
    assert alone.copy_quality is None
    assert alone.attempts[0].curve[-1].step == TRAIN.scratch_steps
    assert alone.ready is not None
    assert 0 < alone.ready.step < TRAIN.scratch_steps


def test_unrelated_bases_go_straight_to_scratch(world: TaskWorld, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", std=0.08, seed=99)
    outcome = climb(world, other, replace(CONFIG, ladder=LadderConfig()), search=refuse_search)
    assert [a.rung for a in outcome.attempts] == ["scratch"]


def test_scratch_ships_if_the_old_adapter_is_worthless(world: TaskWorld) -> None:
    worthless = blank_like(world.specialist, seed=3)
    start = replace(CONFIG, train=replace(TRAIN, full_steps=20, learning_rate=1e-9))
    outcome = climb(world, world.base, start, old=worthless)
    assert (outcome.rung, outcome.accepted, outcome.alpha, outcome.beta) == ("scratch", True, 0.0, 0.0)
    assert outcome.quality >= outcome.reference - 2.0 > 90


def test_diverged_training_leaves_the_starts(world: TaskWorld, tmp_path: Path) -> None:
    """If all training diverges, the better of copy and fused start is returned, but not accepted."""
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    wild = replace(CONFIG, train=replace(TRAIN, learning_rate=1e30, scratch_learning_rate=1e30))
    outcome = climb(world, new, wild)
    assert not outcome.accepted
    assert outcome.reference > 90
    assert [a.rung for a in outcome.attempts] == ["copy", "fused"]
    assert outcome.quality == gate_quality(world, new, outcome.adapter)
    assert all(torch.isfinite(f.a_RD).all() for f in outcome.adapter.factors.values())


def only(*rungs: str, config: ReadaptConfig = CONFIG, **train: object) -> ReadaptConfig:
    ladder = replace(config.ladder, rungs=rungs)
    return replace(config, ladder=ladder, train=replace(config.train, **train))


def test_a_climb_without_any_adapter_raises_the_last_error(world: TaskWorld) -> None:
    with pytest.raises(TrainingError, match="no rung of the ladder led to an adapter: the loss became"):
        climb(world, world.base, only("scratch", scratch_learning_rate=1e30))


def no_trials(objective: FusionObjective) -> SearchResult:
    raise TrainingError("no trial could be carried out")


def test_a_failed_start_does_not_stop_the_other_rungs(world: TaskWorld) -> None:
    outcome = climb(world, world.base, only("fused", "copy"), search=no_trials)
    assert (outcome.rung, outcome.accepted) == ("copy", True)
    failed, copy = outcome.attempts
    assert (failed.rung, failed.quality, failed.curve) == ("fused", 0.0, ())
    assert failed.error == "TrainingError: no trial could be carried out"
    assert copy.error is None
    with pytest.raises(TrainingError, match="no trial could be carried out"):
        climb(world, world.base, only("fused", "train"), search=no_trials)


def test_a_model_of_an_unknown_family_is_trained_instead_of_transplanted(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise InvalidCheckpointError("another family")

    monkeypatch.setattr(starts_module, "transplant", refuse)
    outcome = climb(world, world.base, only("transplant", "scratch"))
    assert [a.error for a in outcome.attempts] == ["InvalidCheckpointError: another family", None]
    assert outcome.rung == "scratch"


def test_if_the_old_base_can_read_no_row_there_is_no_transplant(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts_module, "calibration_rows", lambda rows, vocab_size, num_tokens: [])
    outcome = climb(world, world.base, only("transplant", "copy"))
    assert [(a.rung, a.quality > 0) for a in outcome.attempts] == [("transplant", False), ("copy", True)]
    assert "does not know" in str(outcome.attempts[0].error)


@pytest.mark.parametrize(
    ("rungs", "stop", "is_dropped"),
    [
        (("copy", "train", "scratch"), "ready", True),
        (("copy", "train"), "ready", False),
        (("copy", "train", "scratch"), "budget", False),
    ],
)
def test_a_run_is_dropped_only_if_scratch_training_follows(
    world: TaskWorld, rungs: tuple[str, ...], stop: str, is_dropped: bool
) -> None:
    """No step improves the start: the learning rate is almost zero, and the gate is out of reach."""
    config = only(*rungs, learning_rate=1e-12, short_steps=20, full_steps=60, scratch_steps=1)
    config = replace(config, ladder=replace(config.ladder, stop=stop))
    outcome = climb(world, world.base, config, reference=200.0)
    steps = [p.step for a in outcome.attempts if a.rung in ("short", "full") for p in a.curve]
    assert steps[-1] == (20 if is_dropped else 60)


def test_a_start_whose_loss_is_not_a_number_is_not_the_best(world: TaskWorld) -> None:
    broken = {n: replace(f, b_FR=f.b_FR * torch.nan) for n, f in world.specialist.factors.items()}
    config = only("copy", "fused", "train", full_steps=20)
    old = replace(world.specialist, factors=broken)
    seen: list[tuple[str, float]] = []

    def search(objective: FusionObjective) -> SearchResult:
        return SearchResult(COPY, 1.0, ())

    def swap(objective: FusionObjective, point: object) -> Adapter:
        return world.specialist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionObjective, "adapter", swap)
        outcome = climb(
            world,
            world.base,
            config,
            reference=200.0,
            old=old,
            search=search,
            report=lambda rung, point: seen.append((rung, point.quality)),
        )
    assert dict(seen)["short"] > 50
    assert outcome.quality > 50


def test_a_transplants_attempt_has_its_least_energy(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    energies = []
    for rank in (8, 32):
        config = replace(only("copy", "transplant"), transplant=TransplantConfig(rank=rank, wide_rank=rank))
        transplant, copy = climb(world, new, config, reference=200.0).attempts
        assert copy.energy is None
        assert transplant.energy is not None
        energies.append(transplant.energy)
    assert 0 < energies[0] < energies[1] <= 1 + 1e-6


def test_a_dora_can_climb(world: TaskWorld) -> None:
    norms = row_norms(load_base(world.base), world.specialist.factors)
    factors = {n: replace(f, magnitude_F=norms[n]) for n, f in world.specialist.factors.items()}
    dora = replace(world.specialist, factors=factors)
    few = only("transplant", "train", "scratch", full_steps=20, scratch_steps=40, anchor="old")
    outcome = climb(world, world.base, few, old=dora, reference=200.0)
    qualities = {a.rung: a.quality for a in outcome.attempts}
    start = judge(load_base(world.base), dora, world.encoder, world.task.valid, "exact_match").quality
    assert qualities["transplant"] > start - 20
    assert {"short", "scratch"} <= qualities.keys()
    assert all(a.error is None for a in outcome.attempts)


def test_a_complete_evaluation_is_not_repeated(world: TaskWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluator gets no gate here, so that its evaluations never end early."""

    def refuse(evaluator: Evaluator) -> None:
        raise AssertionError("all rows were seen already")

    monkeypatch.setattr(ladder_module, "Evaluator", lambda *args, **options: Evaluator(*args))
    monkeypatch.setattr(Evaluator, "complete", refuse)
    outcome = climb(world, world.base, only("copy"), reference=200.0)
    assert not outcome.accepted
    assert outcome.quality == gate_quality(world, world.base, world.specialist)


def test_a_good_start_survives_a_diverged_run(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    wild = replace(CONFIG, train=replace(TRAIN, learning_rate=1e30, scratch_learning_rate=1e30))
    outcome = climb(world, new, wild, reference=200.0)
    assert (outcome.rung, outcome.accepted, outcome.beta) == ("fused", False, -1.0)
    assert outcome.quality > 90 > outcome.copy_quality
    assert gate_quality(world, new, outcome.adapter) == outcome.quality


def test_search_and_gate_share_no_rows_and_test_rows_are_not_read(world: TaskWorld, tmp_path: Path) -> None:
    """The test rows cannot even be encoded, and the search shows which rows it got."""
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    poisoned = replace(world, task=replace(world.task, test=[replace(world.task.test[0], completion="x" * 999)]))
    model = load_base(new)
    searched: list[float] = []

    def search(objective: FusionObjective) -> SearchResult:
        searched.extend(objective.losses([COPY]))
        return corner_search(objective)

    assert climb(poisoned, new, model=model, search=search).accepted
    rows = TaskRows.split(world.task, CONFIG.search)
    assert not set(rows.search) & set(rows.gate)
    expected = judge(model, world.specialist, world.encoder, rows.search, "exact_match").loss
    assert searched == [pytest.approx(expected, rel=1e-5)]


def test_the_model_is_bare_after_the_climb(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=4, scale=1.2)
    model = load_base(new)
    bare = logits(model)
    climb(world, new, model=model)
    assert torch.equal(logits(model), bare)


def test_train_scratch_reaches_a_gate(world: TaskWorld) -> None:
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


def test_anchors(world: TaskWorld) -> None:
    """The old adapter as an anchor is the same function with the layout of the start, whatever its rank and scaling."""
    name, factors = next(iter(world.specialist.factors.items()))
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    start = Adapter({name: factors})
    assert anchor_adapter("init", start, start) is None
    zero = anchor_adapter("zero", start, start)
    assert zero is not None
    assert not zero.factors[name].a_RD.any()
    turned = LoraFactors(q.T @ factors.a_RD, factors.b_FR @ q, factors.scaling)
    lower = LoraFactors(factors.a_RD[:4], 4 * factors.b_FR[:, :4], factors.scaling / 4)  # the other ranks are zero
    higher = LoraFactors(torch.cat([factors.a_RD] * 2), torch.cat([factors.b_FR] * 2, dim=1), factors.scaling / 2)
    for old in (turned, lower, higher):
        anchor = anchor_adapter("old", start, Adapter({name: old}))
        assert anchor is not None
        found = anchor.factors[name]
        assert (found.rank, found.scaling) == (factors.rank, factors.scaling)
        torch.testing.assert_close(found.delta(), factors.delta(), rtol=1e-3, atol=1e-4)
    anchor = anchor_adapter("old", start, Adapter({name: turned}))
    assert anchor is not None
    torch.testing.assert_close(anchor.factors[name].b_FR, factors.b_FR, rtol=1e-3, atol=1e-4)


def test_training_with_each_anchor(world: TaskWorld, tmp_path: Path) -> None:
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    losses = {}
    for anchor in ("old", "zero"):
        few = replace(CONFIG, train=replace(TRAIN, full_steps=20, scratch_steps=20, anchor=anchor, pull_strong=0.1))
        outcome = climb(world, new, few, reference=200.0, search=copy_search)
        losses[anchor] = next(a for a in outcome.attempts if a.rung == "short").curve[-1].loss
    assert losses["old"] < losses["zero"], "a pull to zero slows training down"
