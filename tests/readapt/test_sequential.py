"""The early stop of an evaluation, compared with exact probabilities from scipy."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from readapt.training.evaluate import Gate
from readapt.training.sequential import FIRST_CHUNK_ROWS, failing_hits, fewest_hits, likely_rise, looks


def chance_to_be_given_up(num_rows: int, num_right: int, given_up: dict[int, int]) -> float:
    """Return the exact chance, from the distribution of hits at each look."""
    chance, seen = 0.0, 0
    alive = np.zeros(num_right + 1)  # alive[h]: probability of h hits so far, not given up
    alive[0] = 1.0
    for look, limit in given_up.items():
        then = np.zeros_like(alive)
        for hits in np.flatnonzero(alive):
            more = np.arange(min(look - seen, num_right - hits) + 1)
            drawn = hypergeom.pmf(more, num_rows - seen, num_right - hits, look - seen)
            then[hits + more] += alive[hits] * drawn
        chance += then[: limit + 1].sum()
        then[: limit + 1] = 0.0
        alive, seen = then, look
    return chance


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(17, 300), data=st.data(), confidence=st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_a_passing_adapter_is_given_up_as_rarely_as_stated(
    num_rows: int, data: st.DataObject, confidence: float
) -> None:
    needed = data.draw(st.integers(0, num_rows))
    num_right = data.draw(st.one_of(st.just(needed), st.integers(needed, num_rows)))
    given_up = failing_hits(num_rows, needed, confidence)
    assert chance_to_be_given_up(num_rows, num_right, given_up) <= 1 - confidence + 1e-9


@settings(max_examples=200, deadline=None)
@given(num_rows=st.integers(1, 200), reference=st.floats(0, 110), hits=st.integers(0, 200))
def test_fewest_hits_is_the_threshold_of_the_gate(num_rows: int, reference: float, hits: int) -> None:
    gate, hits = Gate(reference, 1.0), min(hits, num_rows)
    assert gate.passes(100.0 * hits / num_rows) == (hits >= fewest_hits(num_rows, gate.passes))


@settings(max_examples=100, deadline=None)
@given(num_rows=st.integers(17, 400), share=st.floats(0, 1.1))
def test_a_certain_failure_is_given_up(num_rows: int, share: float) -> None:
    """At each look, one more hit than the limit could still pass, or is too probable to be ruled out."""
    needed = min(int(share * num_rows), num_rows + 1)
    for look, limit in failing_hits(num_rows, needed, 0.999).items():
        assert limit >= needed - 1 - (num_rows - look) or limit == look
        assert limit < needed, "an adapter with enough hits is never given up"


def test_looks_quadruple_and_end_with_all_rows() -> None:
    assert looks(300) == [16, 64, 256, 300]
    assert looks(FIRST_CHUNK_ROWS) == [FIRST_CHUNK_ROWS]
    assert failing_hits(FIRST_CHUNK_ROWS, 10, 0.999) == {}


def test_a_useless_adapter_is_given_up_early_and_a_near_miss_late() -> None:
    limits = failing_hits(350, 336, 0.999)  # 96 % asked
    assert limits[16] >= 8, "a useless copy costs 16 rows of 350"
    assert limits[64] < 58, "64 rows do not distinguish 92 % from 96 %"


@pytest.mark.parametrize("seed", range(3))
def test_many_random_orders_agree_with_the_stated_confidence(seed: int) -> None:
    """Shuffle, look and count, at a confidence that is low enough to see errors."""
    rng = random.Random(seed)
    given_up = failing_hits(120, 90, 0.8)
    rows = [True] * 90 + [False] * 30
    failures = 0
    for _ in range(2000):
        rng.shuffle(rows)
        failures += any(sum(rows[:look]) <= limit for look, limit in given_up.items())
    assert 0 < failures / 2000 <= 0.2


@pytest.mark.parametrize("draw", ["bell", "skewed", "few have all"])
def test_texts_at_the_gate_are_rarely_given_up(draw: str) -> None:
    """As rarely as stated for bell-shaped scores, a few times as often if few rows have all the points."""
    rng = np.random.default_rng(0)
    populations = {
        "bell": rng.normal(60, 15, 200),
        "skewed": rng.exponential(20, 200),
        "few have all": 100.0 * (np.arange(200) < 20),
    }
    rows, missed, trials = populations[draw], 0, 2000
    early = looks(200)[:-1]
    for _ in range(trials):
        drawn = rng.permutation(rows)
        missed += any(
            drawn[:look].mean() + likely_rise(drawn[:look].tolist(), 200, 0.999, len(early)) < rows.mean()
            for look in early
        )
    assert missed / trials <= {"bell": 0.001, "skewed": 0.002, "few have all": 0.006}[draw]


def test_the_mean_of_all_rows_rarely_exceeds_the_likely_rise() -> None:
    rng = random.Random(0)
    rows = [rng.uniform(0, 100) ** 1.5 / 10 for _ in range(200)]
    all_rows, missed = sum(rows) / 200, 0
    for _ in range(2000):
        seen = rng.sample(rows, 64)
        missed += sum(seen) / 64 + likely_rise(seen, 200, 0.9, num_looks=1) < all_rows
    assert 50 < missed < 250, "near the stated tenth, on the safe side"
    assert likely_rise(rows, 200, 0.999, num_looks=2) == 0.0, "nothing is left to rise"
    assert likely_rise(seen, 200, 0.999, 2) > likely_rise(seen, 200, 0.999, 1) > likely_rise(seen, 200, 0.9, 1) > 0
