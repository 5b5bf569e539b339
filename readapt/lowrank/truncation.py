"""The best approximation of a rank, differentiable: what a cut to the serving rank does to a gradient.

torch's gradient of an SVD divides by the differences of all singular values, though those on one side of the cut cancel
out, and is NaN where a core has zeros. This one only needs a gap at the cut.
Shape letters: C matrices, K rows and columns, R rank.
"""

from typing import Any

import torch
from torch import Tensor

SMALLEST_GAP = 1e-6  # of the largest singular value squared


def truncate(m_CKK: Tensor, rank: int) -> Tensor:
    """The matrices nearest to `m_CKK` (Frobenius) of rank `rank`."""
    kept: Tensor = _Truncate.apply(m_CKK, rank)
    return kept


class _Truncate(torch.autograd.Function):
    """With M = U S V^T and a change H = U^T dM V, the kept part changes by H inside the kept block, and beside it by
    (s_i^2 H_ij + s_i s_j H_ji) / (s_i^2 - s_j^2), i kept and j not: a symmetric map, so it is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, m_CKK: Tensor, rank: int) -> Tensor:
        u_CKK, s_CK, v_CKK = torch.linalg.svd(m_CKK, full_matrices=False)
        ctx.save_for_backward(u_CKK, s_CK, v_CKK)
        ctx.rank = rank
        return (u_CKK[..., :rank] * s_CK[..., None, :rank]) @ v_CKK[..., :rank, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        u_CKK, s_CK, v_CKK = ctx.saved_tensors
        (g_CKK,), rank = gradients, ctx.rank
        h_CKK = u_CKK.mT @ g_CKK @ v_CKK.mT
        kept_CR1, cut_C1Q = s_CK[..., :rank, None], s_CK[..., None, rank:]
        smallest = SMALLEST_GAP * s_CK[..., :1, None].square()
        gap_CRQ = (kept_CR1.square() - cut_C1Q.square()).clamp_min(smallest).clamp_min(torch.finfo(s_CK.dtype).tiny)
        right_CRQ, below_CRQ = h_CKK[..., :rank, rank:], h_CKK[..., rank:, :rank].mT
        cross_CRQ = kept_CR1 * cut_C1Q
        changed_CKK = torch.zeros_like(h_CKK)
        changed_CKK[..., :rank, :rank] = h_CKK[..., :rank, :rank]
        changed_CKK[..., :rank, rank:] = (kept_CR1.square() * right_CRQ + cross_CRQ * below_CRQ) / gap_CRQ
        changed_CKK[..., rank:, :rank] = ((kept_CR1.square() * below_CRQ + cross_CRQ * right_CRQ) / gap_CRQ).mT
        # A matrix that is not square has directions without a singular value: as with the value 0.
        u_CKR, v_CRK = u_CKK[..., :rank], v_CKK[..., :rank, :]
        outside_CKK = (g_CKK - u_CKK @ (u_CKK.mT @ g_CKK)) @ v_CRK.mT @ v_CRK
        outside_CKK = outside_CKK + u_CKR @ u_CKR.mT @ (g_CKK - (g_CKK @ v_CKK.mT) @ v_CKK)
        return u_CKK @ changed_CKK @ v_CKK + outside_CKK, None
