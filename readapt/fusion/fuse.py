"""The fused start: alpha * T + beta * E, exactly recompressed to the serving rank.

T is the old task adapter, E the base model's own evolution as a low-rank adapter (see `delta`). Both are sums of few
rank-one terms, so the sum is factored without ever forming an F x D matrix: QR of the stacked factors, then an SVD of a
small core. Of a DoRA adapter the direction is fused and its magnitudes are kept: with E whole, alpha 1 and beta -1 give
back the old weights' directions, and with them the old specialist.

Shape letters: C candidates (points), D in, F out, R rank, K stacked rank of T and E (at most F or D in the core).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors
from readapt.fusion.points import Point, labels
from readapt.lowrank.truncation import truncate

Rank = int | Literal["task"] | None


class FusionTerms:
    """One module's stacked factors, A = [A_T; A_E] and B = [B_T, B_E]: the same for all points, which only weigh terms.

    `labels` are what a point knows the module by.
    """

    def __init__(self, task: LoraFactors, evolution: LoraFactors | None, labels: tuple[str, ...]):
        self.task, self.evolution, self.labels = task, evolution, labels
        terms = [task] if evolution is None else [task, evolution]
        self.a_KD = torch.cat([term.a_RD for term in terms])
        self.b_FK = torch.cat([term.b_FR for term in terms], dim=1)
        self._q_b_FK, self._r_b_KK = torch.linalg.qr(self.b_FK)
        self._q_a_DK, self._r_a_KK = torch.linalg.qr(self.a_KD.T)

    def pairs(self, points: Sequence[Point]) -> Tensor:
        """This module's (alpha, beta) of each point, C x 2."""
        return torch.tensor([point.of(self.labels) for point in points], device=self.task.a_RD.device)

    def factors(self, pairs_C2: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximations of rank `rank`, balanced, without a scaling: A (C x R x D) and B (C x F x R)."""
        u_CKK, s_CK, v_CKK = torch.linalg.svd(self._cores(pairs_C2), full_matrices=False)
        root_CR = s_CK[:, :rank].sqrt()
        a_CRD = root_CR[:, :, None] * (v_CKK[:, :rank] @ self._q_a_DK.T)
        return a_CRD, (self._q_b_FK @ u_CKK[:, :, :rank]) * root_CR[:, None, :]

    def whole(self, pairs_C2: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates' sums uncut: A (K x D, of all) and B (C x F x K); differentiable in `pairs_C2`."""
        return self.a_KD, self.b_FK * self._spread(pairs_C2)[:, None, :]

    def cut(self, pairs_C2: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The sums cut to `rank`, in K terms, of which A (K x D, of all) is orthonormal; differentiable as `whole`."""
        return self._q_a_DK.T, self._q_b_FK @ truncate(self._cores(pairs_C2), rank)

    def singular_values(self, point: Point) -> Tensor:
        """Of alpha * T + beta * E, largest first."""
        return torch.linalg.svdvals(self._cores(self.pairs([point]))[0])

    def _spread(self, pairs_C2: Tensor) -> Tensor:
        """The weight of each term, C x K, from each candidate's (alpha, beta)."""
        task_CR = pairs_C2[:, :1].expand(-1, self.task.rank) * self.task.scaling
        if self.evolution is None:
            return task_CR
        evolution_CR = pairs_C2[:, 1:].expand(-1, self.evolution.rank) * self.evolution.scaling
        return torch.cat([task_CR, evolution_CR], dim=1)

    def _cores(self, pairs_C2: Tensor) -> Tensor:
        """The sums in the bases of the QRs, C x K x K."""
        return (self._r_b_KK * self._spread(pairs_C2)[:, None, :]) @ self._r_a_KK.T

    def num_terms(self, rank: Rank) -> int:
        """The rank that `rank` means for this module: at most what the sum can have."""
        wanted = self.task.rank if rank == "task" else rank
        most = min(*self.task.shape, len(self.a_KD))
        return most if wanted is None else min(wanted, most)


class Fusion:
    """All fused adapters of one task adapter and one evolution; a point costs one small SVD per module.

    The result has the task adapter's modules, scalings, magnitudes and kind: the evolution of other modules is left
    out, because the serving cost of an adapter is its owner's choice.
    """

    def __init__(self, task: Adapter, evolution: Adapter):
        self._task = task
        self.stacks = {
            name: FusionTerms(task.factors[name], evolution.factors.get(name), names)
            for name, names in labels(task.factors).items()
        }

    def at(self, point: Point, rank: Rank = "task") -> Adapter:
        """The adapter alpha * T + beta * E.

        `rank` "task" keeps each module's own rank, None all terms of T and E (no loss), a number caps every module.
        Where nothing has to be cut or mixed (beta 0, or a module that did not change) the task's own factors are kept,
        not rebalanced: their balance of A and B is what training left.
        """
        factors = {name: _fused(stack, point, rank) for name, stack in self.stacks.items()}
        return replace(self._task, factors=factors)

    def lost_energy(self, point: Point, rank: Rank = "task") -> dict[str, float]:
        """By module the share of the squared Frobenius norm of alpha * T + beta * E that a cut to `rank` loses."""
        return {name: _lost(stack, point, rank) for name, stack in self.stacks.items()}


def _fused(stack: FusionTerms, point: Point, rank: Rank) -> LoraFactors:
    task = stack.task
    alpha, beta = point.of(stack.labels)
    is_cut = isinstance(rank, int) and rank < task.rank
    if (stack.evolution is None or beta == 0.0) and not is_cut:
        return replace(task, a_RD=task.a_RD.clone(), b_FR=task.b_FR * alpha)
    a_CRD, b_CFR = stack.factors(stack.pairs([point]), stack.num_terms(rank))
    scaling = task.scaling or 1.0
    root = abs(scaling) ** -0.5
    return replace(task, a_RD=a_CRD[0] * root, b_FR=b_CFR[0] * math.copysign(root, scaling), scaling=scaling)


def _lost(stack: FusionTerms, point: Point, rank: Rank) -> float:
    energy_K = stack.singular_values(point).double().square()
    total = float(energy_K.sum())
    return float(energy_K[stack.num_terms(rank) :].sum()) / total if total else 0.0


def align(adapter: Adapter, target: Adapter) -> Adapter:
    """The same function as `adapter`, its factors turned to lie as near to `target`'s as can be (same modules, ranks).

    B A = (B Q)(Q^T A) for every orthogonal Q; the nearest one is the Procrustes solution. Needed where factors of
    different origin are compared or pulled together element by element.
    """
    factors = {name: _align(adapter.factors[name], like) for name, like in target.factors.items()}
    return replace(adapter, factors=factors)


def _align(factors: LoraFactors, like: LoraFactors) -> LoraFactors:
    u_RR, _, v_RR = torch.linalg.svd(factors.b_FR.T @ like.b_FR + factors.a_RD @ like.a_RD.T)
    q_RR = u_RR @ v_RR
    return replace(factors, a_RD=q_RR.T @ factors.a_RD, b_FR=factors.b_FR @ q_RR)
