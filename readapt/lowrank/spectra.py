"""The rules that choose each module's rank from its singular values.

A rule gets the spectra of all modules at once, because modules share a budget. `cost` is the number of stored values
that one rank of a module takes (in + out).
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Spectrum:
    """One module's leading singular values in falling order; `total` is the sum of the squares of all its values."""

    values: tuple[float, ...]
    total: float
    cost: int

    def energy(self, rank: int) -> float:
        """Return the share of the total that the leading `rank` values hold; 1 if the total is zero."""
        held = math.fsum(value * value for value in self.values[:rank])
        return held / max(self.total, held) if self.total else 1.0

    def gain(self, rank: int) -> float:
        """Return the absolute energy per stored value that the step from `rank` to the next rank gains."""
        return self.values[rank] ** 2 / self.cost


class Rule(Protocol):
    """A way to choose ranks."""

    @property
    def label(self) -> str:
        """The name of the adapter with these ranks, fit for a folder, such as `rank-8`."""

    def limit(self, side: int) -> int:
        """Return the largest rank that the rule may choose for a matrix whose smaller side is `side`."""

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """Return the rank of each module, at most the number of known values. 0 leaves the module out."""

    def asks_more(self, spectrum: Spectrum, rank: int) -> bool:
        """Return whether the rule would give a module more than `rank`, the cap that it got."""


@dataclass(frozen=True)
class FixedRank:
    """The same rank for every module."""

    rank: int

    def __post_init__(self) -> None:
        _check(self.rank >= 1, f"rank is {self.rank}; expected at least 1")

    @property
    def label(self) -> str:
        """`rank-8`."""
        return f"rank-{self.rank}"

    def limit(self, side: int) -> int:
        """See `Rule`."""
        return min(self.rank, side)

    def asks_more(self, spectrum: Spectrum, rank: int) -> bool:
        """See `Rule`."""
        return self.rank > rank

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """See `Rule`."""
        return {name: min(self.rank, _num_nonzero(spectrum)) for name, spectrum in spectra.items()}


@dataclass(frozen=True)
class EnergyShare:
    """The smallest rank that holds a share of each module's energy, or all known values if they hold less."""

    share: float

    def __post_init__(self) -> None:
        _check(0.0 < self.share <= 1.0, f"energy is {self.share}; expected above 0 and at most 1")

    @property
    def label(self) -> str:
        """`energy-0.95`."""
        return f"energy-{self.share:g}"

    def limit(self, side: int) -> int:
        """See `Rule`."""
        return side

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """See `Rule`."""
        return {name: self.rank(spectrum) for name, spectrum in spectra.items()}

    def asks_more(self, spectrum: Spectrum, rank: int) -> bool:
        """See `Rule`."""
        return spectrum.energy(rank) < self.share

    def rank(self, spectrum: Spectrum) -> int:
        """Return the rank of one module."""
        num_values = _num_nonzero(spectrum)
        wanted = self.share * max(spectrum.total, math.fsum(value * value for value in spectrum.values))
        held = 0.0
        for rank, value in enumerate(spectrum.values[:num_values], 1):
            held += value * value
            if held >= wanted:
                return rank
        return num_values


@dataclass(frozen=True)
class Knee:
    """The knee of the curve of held energy: the rank after which each further rank gains less than the average.

    With rank and held energy scaled to [0, 1], it is the point farthest above the diagonal (Satopaa et al., Finding a
    "Kneedle" in a Haystack, 2011).
    """

    @property
    def label(self) -> str:
        """`knee`."""
        return "knee"

    def limit(self, side: int) -> int:
        """See `Rule`."""
        return side

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """See `Rule`."""
        return {name: self._rank(spectrum.values[: _num_nonzero(spectrum)]) for name, spectrum in spectra.items()}

    def asks_more(self, spectrum: Spectrum, rank: int) -> bool:
        """See `Rule`."""
        return self.ranks({"": spectrum})[""] > rank

    def _rank(self, values: Sequence[float]) -> int:
        known = math.fsum(value * value for value in values)
        best_rank = 0
        best_height = -math.inf
        held = 0.0
        for rank, value in enumerate(values, 1):
            held += value * value
            height = held / known - rank / len(values)
            if height > best_height:
                best_rank = rank
                best_height = height
        return best_rank


@dataclass(frozen=True)
class Budget:
    """At most `parameters` stored values in total, spent where each gains the most energy.

    The greedy choice is optimal up to the last rank that does not fit, because a module's gains fall with its rank.
    """

    parameters: int

    def __post_init__(self) -> None:
        _check(self.parameters >= 1, f"budget is {self.parameters} parameters; expected at least 1")

    @property
    def label(self) -> str:
        """`budget-100000`."""
        return f"budget-{self.parameters}"

    def limit(self, side: int) -> int:
        """See `Rule`."""
        return side

    def ranks(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """See `Rule`."""
        ranks = dict.fromkeys(spectra, 0)
        left = self.parameters
        queue = [(-spectrum.gain(0), name) for name, spectrum in spectra.items() if _num_nonzero(spectrum)]
        heapq.heapify(queue)
        while queue:
            _, name = heapq.heappop(queue)
            spectrum = spectra[name]
            if spectrum.cost > left:
                continue  # a cheaper module may still fit
            left -= spectrum.cost
            ranks[name] += 1
            if ranks[name] < _num_nonzero(spectrum):
                heapq.heappush(queue, (-spectrum.gain(ranks[name]), name))
        return ranks

    def asks_more(self, spectrum: Spectrum, rank: int) -> bool:
        """See `Rule`."""
        return True


def _num_nonzero(spectrum: Spectrum) -> int:
    return sum(value > 0.0 for value in spectrum.values)


def _check(is_fine: bool, problem: str) -> None:
    if not is_fine:
        raise ConfigError(f"extraction: {problem}")


def rules_of(ranks: Sequence[int], energy: float | None, knee: bool, budget: int | None) -> tuple[Rule, ...]:
    """Return the rules that a command line names, or an energy of 0.95 if it names none."""
    rules: list[Rule] = [FixedRank(rank) for rank in ranks]
    rules += [EnergyShare(energy)] if energy is not None else []
    rules += [Knee()] if knee else []
    rules += [Budget(budget)] if budget is not None else []
    return tuple(rules) or (EnergyShare(0.95),)
