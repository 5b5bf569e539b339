"""The size of an accepted adapter: the smallest cut that loses nothing, and the gate on growth.

A transplant may need many more ranks than the old adapter, and a rank that helps little costs as much memory and time
in serving as one that helps much. So an adapter that passed its gate and has grown is cut to 1, 1.5, 2, 3 and 4 times
its old ranks, smallest first. The first cut that answers as many of the gate's rows right is shipped instead. The
evaluation of a cut that fails ends early.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from cluster.adapters.files import Adapter, LoraFactors
from readapt.training.evaluate import Evaluation, Gate

MULTIPLES = (1.0, 1.5, 2.0, 3.0, 4.0)  # of the old adapter's ranks
ORDERED = ("transplant", "wide")  # rungs whose factors are sorted by what each rank gives to the outputs

Judge = Callable[[Adapter, Gate], Evaluation]
"""Evaluates an adapter on the gate's rows; the evaluation may end early if the given gate will be missed."""


@dataclass(frozen=True)
class Fitted:
    """The adapter to ship, and its quality. `setback` says why it is too large to be shipped."""

    adapter: Adapter
    quality: float
    setback: str | None = None


def fitted(
    adapter: Adapter, quality: float, rung: str, old: Adapter, gate: Gate, max_growth: float, judge: Judge
) -> Fitted:
    """Return the adapter, or a cut of it that is smaller.

    Within `max_growth` times the old adapter's parameters (0: no limit), a cut must lose nothing. If the adapter itself
    is larger, the best cut within the limit that passes the gate is taken, and there is a setback if none passes.
    """
    is_too_large = 0 < max_growth < growth(adapter, old) - 1e-9
    multiples = sorted({*MULTIPLES, max_growth} if is_too_large else MULTIPLES)
    least = gate if is_too_large else Gate(quality, 0.0)
    passing = []
    for cut in _cuts(adapter, rung, old, multiples):
        if is_too_large and growth(cut, old) > max_growth + 1e-9:
            continue
        evaluation = judge(cut, least)
        if evaluation.is_complete and least.passes(evaluation.quality):
            if not is_too_large:
                return Fitted(cut, evaluation.quality)
            passing.append(Fitted(cut, evaluation.quality))
    if not is_too_large:
        return Fitted(adapter, quality)
    if passing:
        return max(passing, key=lambda found: found.quality)  # the first, smallest one among equals
    setback = (
        f"it passed its gate, but has {growth(adapter, old):.1f} times the parameters of the old adapter; no cut to "
        f"readapt.gate.max_growth = {max_growth:g} times passes"
    )
    return Fitted(adapter, quality, setback)


def growth(adapter: Adapter, old: Adapter) -> float:
    """Return how many times the old adapter's parameters an adapter has."""
    return _num_values(adapter) / _num_values(old)


def _num_values(adapter: Adapter) -> int:
    tensors = [t for f in adapter.factors.values() for t in (f.a_RD, f.b_FR, f.magnitude_F) if t is not None]
    return sum(tensor.numel() for tensor in tensors)


def _cuts(adapter: Adapter, rung: str, old: Adapter, multiples: list[float]) -> Iterator[Adapter]:
    """Yield the cuts that are smaller than the adapter, smallest first; none of a DoRA, whose norms would change."""
    if adapter.is_dora:
        return
    choices = [{name: max(1, int(multiple * f.rank)) for name, f in old.factors.items()} for multiple in multiples]
    for ranks, previous in zip(choices, [None, *choices], strict=False):
        if ranks != previous and any(f.rank > ranks.get(name, f.rank) for name, f in adapter.factors.items()):
            yield _cut(adapter, ranks, is_ordered=rung in ORDERED)


def _cut(adapter: Adapter, ranks: Mapping[str, int], *, is_ordered: bool) -> Adapter:
    factors = {}
    for name, found in adapter.factors.items():
        rank = ranks.get(name, found.rank)
        whole = found if is_ordered or rank >= found.rank else _sorted(found)
        factors[name] = replace(whole, a_RD=whole.a_RD[:rank], b_FR=whole.b_FR[:, :rank])
    return replace(adapter, factors=factors)


def _sorted(factors: LoraFactors) -> LoraFactors:
    """Return the factors of the same delta with the largest singular values first."""
    q_FR, left_RR = torch.linalg.qr(factors.b_FR)
    q_DR, right_RR = torch.linalg.qr(factors.a_RD.T)
    u_RR, s_R, v_RR = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    root_R = s_R.sqrt()
    return replace(factors, a_RD=root_R[:, None] * (v_RR @ q_DR.T), b_FR=(q_FR @ u_RR) * root_R)
