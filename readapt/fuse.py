"""The fused start: alpha * T + beta * E, exactly recompressed to the serving rank.

T is the old task adapter, E the base model's own evolution as a low-rank adapter (see `delta`). Both are sums of few
rank-one terms, so the sum is factored without ever forming an F x D matrix: QR of the stacked factors, then an SVD of a
small core. Shape letters: D in, F out, R rank, K stacked rank of T and E.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors

Rank = int | Literal["task"] | None


@dataclass(frozen=True)
class _Stack:
    """QR of the stacked factors [B_T, B_E] and [A_T; A_E]^T: the same for all (alpha, beta)."""

    q_b_FK: Tensor
    r_b_KK: Tensor
    q_a_DK: Tensor
    r_a_KK: Tensor
    num_task_terms: int
    evolution_scaling: float

    def fuse(self, alpha: float, beta: float, rank: int | None, scaling: float) -> LoraFactors:
        num_terms = self.r_b_KK.shape[1]
        weights_K = torch.full((num_terms,), beta * self.evolution_scaling)
        weights_K[: self.num_task_terms] = alpha * scaling
        u_KK, s_K, v_KK = torch.linalg.svd((self.r_b_KK * weights_K) @ self.r_a_KK.T, full_matrices=False)
        rank = len(s_K) if rank is None else min(rank, len(s_K))
        root_R = (s_K[:rank] / scaling).sqrt()
        b_FR = (self.q_b_FK @ u_KK[:, :rank]) * root_R
        a_RD = root_R[:, None] * (v_KK[:rank] @ self.q_a_DK.T)
        return LoraFactors(a_RD, b_FR, scaling)


def _stack(*terms: LoraFactors) -> _Stack:
    q_b_FK, r_b_KK = torch.linalg.qr(torch.cat([term.b_FR for term in terms], dim=1))
    q_a_DK, r_a_KK = torch.linalg.qr(torch.cat([term.a_RD for term in terms]).T)
    return _Stack(q_b_FK, r_b_KK, q_a_DK, r_a_KK, terms[0].rank, terms[-1].scaling)


class Fusion:
    """All fused adapters of one task adapter and one evolution; a point costs one small SVD per module.

    The result has the task adapter's modules, scalings and kind: the evolution of other modules is left out, because
    the serving cost of an adapter is its owner's choice.
    """

    def __init__(self, task: Adapter, evolution: Adapter):
        self._task = task
        shared = task.factors.keys() & evolution.factors.keys()
        self._stacks = {name: _stack(task.factors[name], evolution.factors[name]) for name in shared}

    def at(self, alpha: float, beta: float, rank: Rank = "task") -> Adapter:
        """The adapter alpha * T + beta * E.

        `rank` "task" keeps each module's own rank, None all terms of T and E (no loss), a number caps every module.
        Where nothing has to be cut or mixed (beta 0, or a module that did not change) the task's own factors are kept,
        not rebalanced: their balance of A and B is what training left.
        """
        factors = {name: self._module(name, alpha, beta, rank) for name in self._task.factors}
        return Adapter(factors=factors, is_rslora=self._task.is_rslora, base_model=self._task.base_model)

    def _module(self, name: str, alpha: float, beta: float, rank: Rank) -> LoraFactors:
        task = self._task.factors[name]
        wanted = task.rank if rank == "task" else rank
        is_cut = wanted is not None and wanted < task.rank
        if name in self._stacks and (beta != 0.0 or is_cut):
            return self._stacks[name].fuse(alpha, beta, wanted, task.scaling)
        if is_cut:
            return _stack(task).fuse(alpha, 0.0, wanted, task.scaling)
        return LoraFactors(task.a_RD.clone(), task.b_FR * alpha, task.scaling)


def fuse(task: Adapter, evolution: Adapter, alpha: float, beta: float, rank: Rank = "task") -> Adapter:
    """One fused adapter; see `Fusion.at`."""
    return Fusion(task, evolution).at(alpha, beta, rank)


def align(adapter: Adapter, target: Adapter) -> Adapter:
    """The same function as `adapter`, its factors turned to lie as near to `target`'s as can be (same modules, ranks).

    B A = (B Q)(Q^T A) for every orthogonal Q; the nearest one is the Procrustes solution. Needed where factors of
    different origin are compared or pulled together element by element.
    """
    factors = {name: _align(adapter.factors[name], like) for name, like in target.factors.items()}
    return Adapter(factors=factors, is_rslora=adapter.is_rslora, base_model=adapter.base_model)


def _align(factors: LoraFactors, like: LoraFactors) -> LoraFactors:
    u_RR, _, v_RR = torch.linalg.svd(factors.b_FR.T @ like.b_FR + factors.a_RD @ like.a_RD.T)
    q_RR = u_RR @ v_RR
    return LoraFactors(q_RR.T @ factors.a_RD, factors.b_FR @ q_RR, factors.scaling)
