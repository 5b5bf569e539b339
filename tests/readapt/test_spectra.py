import math

import pytest

from cluster.errors import ConfigError
from readapt.lowrank.spectra import Budget, EnergyShare, FixedRank, Knee, Spectrum, rules_of


def spectrum(*squares: float, total: float | None = None, cost: int = 10) -> Spectrum:
    return Spectrum(tuple(math.sqrt(square) for square in squares), sum(squares) if total is None else total, cost)


SPECTRA = {"steep": spectrum(90, 5, 3, 2), "flat": spectrum(25, 25, 25, 25), "cut": spectrum(40, 30, total=100)}


def test_energy_is_the_smallest_rank_that_holds_the_share_or_all_known_values():
    assert EnergyShare(0.9).ranks(SPECTRA) == {"steep": 1, "flat": 4, "cut": 2}
    assert EnergyShare(0.95).ranks(SPECTRA)["steep"] == 2
    assert SPECTRA["cut"].energy(2) == pytest.approx(0.7)
    assert EnergyShare(1.0).ranks({"a": spectrum(4, 1, 0, 0)}) == {"a": 2}


def test_a_fixed_rank_is_at_most_the_number_of_values():
    assert FixedRank(3).ranks(SPECTRA) == {"steep": 3, "flat": 3, "cut": 2}
    assert FixedRank(3).ranks({"a": spectrum(7, 0, 0)}) == {"a": 1}


def test_the_knee_is_where_the_curve_turns():
    values = {"a": spectrum(50, 40, 1, 1, 1, 1, 1, 1)}
    assert Knee().ranks(values) == {"a": 2}


def test_a_budget_is_spent_where_it_gains_most_per_parameter():
    spectra = {"cheap": spectrum(10, 1, cost=1), "dear": spectrum(50, 30, cost=10), "none": spectrum(0.1, cost=1)}
    assert Budget(1).ranks(spectra) == {"cheap": 1, "dear": 0, "none": 0}
    assert Budget(11).ranks(spectra) == {"cheap": 1, "dear": 1, "none": 0}
    assert Budget(22).ranks(spectra) == {"cheap": 2, "dear": 2, "none": 0}
    assert Budget(999).ranks(spectra) == {"cheap": 2, "dear": 2, "none": 1}


def test_budget_beats_every_fixed_rank_of_the_same_size():
    spectra = {"steep": spectrum(90, 5, 3, 2), "flat": spectrum(25, 24, 23, 22)}
    for rank in (1, 2, 3):
        chosen = Budget(rank * 20).ranks(spectra)
        assert sum(chosen.values()) == 2 * rank
        held, fixed = (
            sum(s.energy(r[n]) * s.total for n, s in spectra.items()) for r in (chosen, FixedRank(rank).ranks(spectra))
        )
        assert held >= fixed


def test_bad_values_are_errors_and_the_default_is_an_energy():
    for make in (lambda: FixedRank(0), lambda: EnergyShare(1.5), lambda: EnergyShare(0.0), lambda: Budget(0)):
        with pytest.raises(ConfigError, match="expected"):
            make()
    assert rules_of([], None, False, None) == (EnergyShare(0.95),)
    assert [rule.label for rule in rules_of([8, 16], 0.9, True, 5)] == [
        "rank-8",
        "rank-16",
        "energy-0.9",
        "knee",
        "budget-5",
    ]
