"""The fused start: alpha * T + beta * E, with the best approximation at the serving rank.

T is the old task adapter. E is the base model's evolution as a low-rank adapter (see `delta`). Both have few rank-one
terms, so their sum is factored without an F x D matrix: QR of the stacked factors, then an SVD of a small core.

Of a DoRA adapter the direction is fused and the magnitudes are kept. With all of E, alpha 1 and beta -1 restore the
directions of the old weights, and with them the old specialist. R2 in shapes is the stacked rank of T and E, at most F
or D in the core.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cluster.adapters.files import Adapter, LoraFactors
from readapt.fusion.points import Point, module_groups
from readapt.lowrank.truncation import truncate

Rank = int | Literal["task"] | None


class FusionTerms:
    """One module's stacked factors, A = [A_T; A_E] and B = [B_T, B_E]. All points share them and only weigh the terms.

    `groups` are the module's path and groups, by which a `Point` finds its (alpha, beta).
    """

    def __init__(self, task: LoraFactors, evolution: LoraFactors | None, groups: tuple[str, ...]):
        self.task = task
        self.evolution = evolution
        self.groups = groups
        both = [task] if evolution is None else [task, evolution]
        self.a_R2D = torch.cat([factors.a_RD for factors in both])
        self.b_FR2 = torch.cat([factors.b_FR for factors in both], dim=1)
        self._q_b_FR2, self._r_b_R2R2 = torch.linalg.qr(self.b_FR2)
        self._q_a_DR2, self._r_a_R2R2 = torch.linalg.qr(self.a_R2D.T)

    def pairs(self, points: Sequence[Point]) -> Tensor:
        """Return this module's (alpha, beta) at each point, C x 2."""
        return torch.tensor([point.of(self.groups) for point in points], device=self.task.a_RD.device)

    def factors(self, pairs_C2: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best approximations of rank `rank`, balanced and without scaling: A [C, R, D] and B [C, F, R]."""
        u_CR2R2, s_CR2, v_CR2R2 = torch.linalg.svd(self._cores(pairs_C2), full_matrices=False)
        root_CR = s_CR2[:, :rank].sqrt()
        a_CRD = root_CR[:, :, None] * (v_CR2R2[:, :rank] @ self._q_a_DR2.T)
        return a_CRD, (self._q_b_FR2 @ u_CR2R2[:, :, :rank]) * root_CR[:, None, :]

    def whole(self, pairs_C2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the uncut sums: A [R2, D], shared by all, and B [C, F, R2]. Differentiable in `pairs_C2`."""
        return self.a_R2D, self.b_FR2 * self._weights(pairs_C2)[:, None, :]

    def cut(self, pairs_C2: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the sums cut to `rank`, in the shapes of `whole`, with orthonormal A. Differentiable in `pairs_C2`."""
        return self._q_a_DR2.T, self._q_b_FR2 @ truncate(self._cores(pairs_C2), rank)

    def singular_values(self, point: Point) -> Tensor:
        """Return the singular values of alpha * T + beta * E, largest first."""
        return torch.linalg.svdvals(self._cores(self.pairs([point]))[0])

    def _weights(self, pairs_C2: Tensor) -> Tensor:
        """Return the weight of each term [C, R2] at each candidate's (alpha, beta)."""
        task_CR = pairs_C2[:, :1].expand(-1, self.task.rank) * self.task.scaling
        if self.evolution is None:
            return task_CR
        evolution_CR = pairs_C2[:, 1:].expand(-1, self.evolution.rank) * self.evolution.scaling
        return torch.cat([task_CR, evolution_CR], dim=1)

    def _cores(self, pairs_C2: Tensor) -> Tensor:
        """Return the sums in the bases of the QRs, [C, R2, R2]."""
        return (self._r_b_R2R2 * self._weights(pairs_C2)[:, None, :]) @ self._r_a_R2R2.T

    def num_terms(self, rank: Rank) -> int:
        """Return the rank that `rank` means for this module, at most the highest that the sum can have."""
        wanted = self.task.rank if rank == "task" else rank
        most = min(*self.task.shape, len(self.a_R2D))
        return most if wanted is None else min(wanted, most)


class Fusion:
    """All fused adapters of one task adapter and one evolution. A point costs one small SVD per module.

    The result has the task adapter's modules, scalings, magnitudes and kind. The evolution of other modules is left
    out: the owner of an adapter decides what it costs to serve.
    """

    def __init__(self, task: Adapter, evolution: Adapter):
        self._task = task
        self.terms = {
            name: FusionTerms(task.factors[name], evolution.factors.get(name), groups)
            for name, groups in module_groups(task.factors).items()
        }

    def at(self, point: Point, rank: Rank = "task") -> Adapter:
        """Return the adapter alpha * T + beta * E.

        `rank` "task" keeps each module's own rank, None keeps all terms of T and E (no loss), a number caps every rank.
        If nothing has to be cut or mixed (beta 0, or a module that did not change), the task's own factors are kept
        without rebalancing: training chose the balance of A and B.
        """
        factors = {name: _fused(terms, point, rank) for name, terms in self.terms.items()}
        return replace(self._task, factors=factors)

    def lost_energy(self, point: Point, rank: Rank = "task") -> dict[str, float]:
        """Return, by module, the share of the squared Frobenius norm of the sum that is lost by a cut to `rank`."""
        return {name: _lost(terms, point, rank) for name, terms in self.terms.items()}


def _fused(terms: FusionTerms, point: Point, rank: Rank) -> LoraFactors:
    task = terms.task
    alpha, beta = point.of(terms.groups)
    is_cut = isinstance(rank, int) and rank < task.rank
    if (terms.evolution is None or beta == 0.0) and not is_cut:
        return replace(task, a_RD=task.a_RD.clone(), b_FR=task.b_FR * alpha)
    a_CRD, b_CFR = terms.factors(terms.pairs([point]), terms.num_terms(rank))
    scaling = task.scaling or 1.0
    root = abs(scaling) ** -0.5
    return replace(task, a_RD=a_CRD[0] * root, b_FR=b_CFR[0] * math.copysign(root, scaling), scaling=scaling)


def _lost(terms: FusionTerms, point: Point, rank: Rank) -> float:
    energy_R2 = terms.singular_values(point).double().square()
    total = float(energy_R2.sum())
    return float(energy_R2[terms.num_terms(rank) :].sum()) / total if total else 0.0


def align(adapter: Adapter, target: Adapter) -> Adapter:
    """Return the same function as `adapter`, with factors as near to `target`'s as possible (same modules and ranks).

    B A = (B Q)(Q^T A) for every orthogonal Q; the nearest one solves the Procrustes problem. Factors of different
    origin must be aligned before they are compared or pulled together element by element.
    """
    factors = {name: _align(adapter.factors[name], like) for name, like in target.factors.items()}
    return replace(adapter, factors=factors)


def _align(factors: LoraFactors, like: LoraFactors) -> LoraFactors:
    u_RR, _, v_RR = torch.linalg.svd(factors.b_FR.T @ like.b_FR + factors.a_RD @ like.a_RD.T)
    q_RR = u_RR @ v_RR
    return replace(factors, a_RD=q_RR.T @ factors.a_RD, b_FR=factors.b_FR @ q_RR)
