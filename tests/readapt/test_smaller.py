"""An accepted adapter is shipped in the smallest size that answers as well, and never above the limit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.files import Adapter, LoraFactors
from cluster.config.readapt import ReadaptConfig, SearchConfig
from readapt.ladder.inputs import Bases, LadderTask, TaskRows
from readapt.ladder.smaller import Fitted, fitted, growth
from readapt.ladder.starts import transplanted
from readapt.training.evaluate import Evaluation, Evaluator, Gate, judge
from readapt.training.lora import attached, load_base
from tests.worlds.readapt import evolve, make_world, pad_ranks, random_factors

OLD = Adapter({name: random_factors(16, 24, 4, 0.5, seed) for seed, name in enumerate("ab")})


def grown(rank: int) -> Adapter:
    return Adapter({name: random_factors(16, 24, rank, 0.5, 7 + seed) for seed, name in enumerate("ab")})


def by_rank(qualities: dict[int, float], tried: list[int]) -> Callable[[Adapter, Gate], Evaluation]:
    """Judge adapters by their rank alone."""

    def judged(adapter: Adapter, gate: Gate) -> Evaluation:
        tried.append(adapter.max_rank)
        quality = qualities[adapter.max_rank]
        return Evaluation(0.1, quality, num_rows=50, is_complete=gate.passes(quality))

    return judged


def fit(rank: int, qualities: dict[int, float], max_growth: float = 0.0) -> tuple[Fitted, list[int]]:
    tried: list[int] = []
    found = fitted(grown(rank), 98.0, "train", OLD, Gate(98.5, 1.0), max_growth, by_rank(qualities, tried))
    return found, tried


def test_the_smallest_cut_that_loses_nothing_is_taken():
    found, tried = fit(16, {4: 90.0, 6: 97.9, 8: 98.0})
    assert (found.adapter.max_rank, found.quality, found.setback) == (8, 98.0, None)
    assert tried == [4, 6, 8]


def test_if_every_cut_loses_something_the_whole_adapter_stays():
    found, tried = fit(16, {4: 90.0, 6: 91.0, 8: 95.0, 12: 97.9})
    assert (found.adapter.max_rank, found.quality) == (16, 98.0)
    assert tried == [4, 6, 8, 12]


def test_an_adapter_that_has_not_grown_is_not_evaluated_again():
    assert fit(4, {})[1] == []


def test_above_the_limit_the_best_cut_that_passes_the_gate_is_taken():
    found, tried = fit(16, {4: 97.6, 6: 97.0, 8: 97.8, 10: 97.8}, max_growth=2.5)
    assert (found.adapter.max_rank, found.quality, found.setback) == (8, 97.8, None)
    assert tried == [4, 6, 8, 10]


def test_if_no_cut_within_the_limit_passes_there_is_a_setback():
    found, tried = fit(16, {4: 90.0, 6: 91.0, 8: 97.4}, max_growth=2.0)
    assert tried == [4, 6, 8]
    assert found.setback is not None
    assert "has 4.0 times the parameters" in found.setback
    assert "readapt.gate.max_growth = 2 times" in found.setback


def test_a_cut_is_the_best_of_its_rank():
    padded = pad_ranks(OLD, 16)
    mixed = {}
    for name, factors in padded.factors.items():
        turn_RR = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
        mixed[name] = LoraFactors(turn_RR @ factors.a_RD, factors.b_FR @ turn_RR.T, factors.scaling)
    found = fitted(Adapter(mixed), 98.0, "train", OLD, Gate(98.0, 1.0), 0.0, by_rank({4: 98.0}, []))
    for name, factors in OLD.factors.items():
        assert found.adapter.factors[name].rank == 4
        error = (found.adapter.factors[name].delta() - factors.delta()).norm() / factors.delta().norm()
        assert error < 16 * 24 * torch.finfo(torch.float32).eps


@pytest.mark.timeout(600)
def test_a_transplant_shrinks_and_answers_as_well_on_rows_that_nobody_saw(tmp_path: Path):
    """The base changes strongly, so the transplant takes more ranks than the old adapter needs."""
    world = make_world(tmp_path)
    padded = world.specialist.factors  # ranks above 4 are zero
    old = Adapter({name: replace(f, a_RD=f.a_RD[:4], b_FR=f.b_FR[:, :4]) for name, f in padded.items()})
    new_folder = evolve(world.base, tmp_path / "v2", rank=8, scale=0.3)
    old_base, new_base = load_base(world.base), load_base(new_folder)
    rows = TaskRows.split(world.task, SearchConfig())
    reference = judge(old_base, old, world.encoder, rows.gate, "exact_match").quality
    config = ReadaptConfig()
    task = LadderTask(old, rows, Gate.beside(reference, config.gate), "exact_match")
    bases = Bases(old_base, new_base, world.encoder, Adapter({}))
    transplant = replace(config.transplant, rank=32, wide_rank=32, energy=0.999)
    start = transplanted(bases, task, transplant, seed=0).adapter
    quality = judge(new_base, start, world.encoder, rows.gate, "exact_match").quality

    def judged(adapter: Adapter, gate: Gate) -> Evaluation:
        with attached(new_base, adapter):
            return Evaluator(new_base, world.encoder, rows.gate, "exact_match", gate=gate)()

    found = fitted(start, quality, "transplant", old, task.gate, 0.0, judged)
    before, after = (
        judge(new_base, a, world.encoder, world.task.test, "exact_match").quality for a in (start, found.adapter)
    )
    print(
        f"growth {growth(start, old):.2f} -> {growth(found.adapter, old):.2f}, "
        f"gate rows {quality:.1f} -> {found.quality:.1f}, test rows {before:.1f} -> {after:.1f}"
    )
    assert found.quality >= quality
    assert growth(found.adapter, old) < growth(start, old)
    assert after >= before - 100.0 / len(world.task.test) - 1e-6, "at most one of 40 rows"
