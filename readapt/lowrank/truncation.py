"""The best approximation of a given rank, differentiable: how a cut to the serving rank changes a gradient.

torch's gradient of an SVD divides by the differences of all singular values, though those on one side of the cut cancel
out. It is NaN if the matrix has equal or zero singular values. This gradient only needs a gap at the cut.

R2 is the rows and columns of a matrix, R the rank that is kept, R3 = R2 - R the rank that is cut.
"""

from typing import Any

import torch
from torch import Tensor

SMALLEST_GAP = 1e-6  # of the largest singular value squared


def truncate(m_CR2R2: Tensor, rank: int) -> Tensor:
    """Return the matrices of rank `rank` that are nearest to `m_CR2R2` in the Frobenius norm."""
    kept: Tensor = _Truncate.apply(m_CR2R2, rank)
    return kept


class _Truncate(torch.autograd.Function):
    """The truncation of M = U S V^T and its derivative.

    With H = U^T dM V, the kept part changes by H inside the kept block. Beside it, for i kept and j cut, it changes by
    (s_i^2 H_ij + s_i s_j H_ji) / (s_i^2 - s_j^2). This map is symmetric, so the backward pass is the same map.
    """

    @staticmethod
    def forward(ctx: Any, m_CR2R2: Tensor, rank: int) -> Tensor:
        u_CR2R2, s_CR2, v_CR2R2 = torch.linalg.svd(m_CR2R2, full_matrices=False)
        ctx.save_for_backward(u_CR2R2, s_CR2, v_CR2R2)
        ctx.rank = rank
        return (u_CR2R2[..., :rank] * s_CR2[..., None, :rank]) @ v_CR2R2[..., :rank, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        u_CR2R2, s_CR2, v_CR2R2 = ctx.saved_tensors
        (g_CR2R2,), rank = gradients, ctx.rank
        h_CR2R2 = u_CR2R2.mT @ g_CR2R2 @ v_CR2R2.mT
        kept_CR1 = s_CR2[..., :rank, None]
        cut_C1R3 = s_CR2[..., None, rank:]
        smallest = SMALLEST_GAP * s_CR2[..., :1, None].square()
        gap_CRR3 = (kept_CR1.square() - cut_C1R3.square()).clamp_min(smallest).clamp_min(torch.finfo(s_CR2.dtype).tiny)
        right_CRR3 = h_CR2R2[..., :rank, rank:]
        below_CRR3 = h_CR2R2[..., rank:, :rank].mT
        cross_CRR3 = kept_CR1 * cut_C1R3
        changed_CR2R2 = torch.zeros_like(h_CR2R2)
        changed_CR2R2[..., :rank, :rank] = h_CR2R2[..., :rank, :rank]
        changed_CR2R2[..., :rank, rank:] = (kept_CR1.square() * right_CRR3 + cross_CRR3 * below_CRR3) / gap_CRR3
        changed_CR2R2[..., rank:, :rank] = ((kept_CR1.square() * below_CRR3 + cross_CRR3 * right_CRR3) / gap_CRR3).mT
        # Directions without a singular value (the matrix is not square) count as if their value were 0.
        u_CR2R = u_CR2R2[..., :rank]
        v_CRR2 = v_CR2R2[..., :rank, :]
        outside_CR2R2 = (g_CR2R2 - u_CR2R2 @ (u_CR2R2.mT @ g_CR2R2)) @ v_CRR2.mT @ v_CRR2
        outside_CR2R2 = outside_CR2R2 + u_CR2R @ u_CR2R.mT @ (g_CR2R2 - (g_CR2R2 @ v_CR2R2.mT) @ v_CR2R2)
        return u_CR2R2 @ changed_CR2R2 @ v_CR2R2 + outside_CR2R2, None
