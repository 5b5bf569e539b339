"""The truncated SVD that extraction and base evolution share: exact for small matrices, block Krylov for large ones.

Both ways project the matrix onto an orthonormal basis Q of its column space (the exact way: all of it), and the
eigenvectors of the small Gram matrix (Q^T W)(Q^T W)^T give the left vectors. The right side is then the projection of
the matrix itself on them, so that any loss of precision in the eigenvectors costs optimality of a part that holds no
energy, never correctness: what is kept is `U U^T W`, and its energy is measured, not estimated.

The randomised way is the block Krylov method (Musco & Musco, arXiv 1504.05477, algorithm 2) instead of the power
iteration of Halko, Martinsson & Tropp (SIAM Review 2011): with as many products it is far nearer to the optimum where
the spectrum is flat. 4096 x 4096, rank 64, independent normal entries, one thread of an EPYC, 2026-11-22: four power
iterations lose 8.3 % of the energy that could be had, eight Krylov blocks 0.2 %. It stops when a further block gains
next to nothing, after two where the spectrum decays as those of fine-tuning do.

Shape letters: D in (columns), F out (rows), R rank, Q basis vectors, K block width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

from readapt.lowrank.spectra import Spectrum

EXACT_SIDE = 1024  # a matrix whose smaller side is up to this is decomposed exactly: it costs less than 0.2 s
NARROWNESS = 8  # the randomised way pays where the smaller side is at least this many blocks wide
MIN_OVERSAMPLING = 8
MAX_BLOCKS = 10
GAIN_TO_GO_ON = 2e-3  # the part by which the held energy must grow for another block
DOUBLE_SIDE = 512  # Gram matrices up to this are taken in float64, where memory does not count
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The leading singular triplets of a matrix W, in falling order.

    `total` is the squared Frobenius norm of W, summed in float64. `gap_bound` bounds the part of the best possible
    energy at this rank that these triplets may miss; it is certain, and loose where the spectrum is flat.
    """

    u_FR: Tensor
    s_R: Tensor
    v_RD: Tensor
    total: float
    is_exact: bool
    gap_bound: float

    def spectrum(self) -> Spectrum:
        """Return the singular values as the rules for ranks see them."""
        return Spectrum(tuple(self.s_R.tolist()), self.total, self.u_FR.shape[0] + self.v_RD.shape[1])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return balanced factors a_RD = sqrt(S) V^T and b_FR = U sqrt(S) of the leading `rank` triplets."""
        root_R = self.s_R[:rank].sqrt()
        return root_R[:, None] * self.v_RD[:rank], self.u_FR[:, :rank] * root_R


def decompose(w_FD: Tensor, max_rank: int) -> Decomposition:
    """Decompose a float32 matrix into at most `max_rank` singular triplets; fewer where it has fewer. Deterministic.

    The triplets are on the matrix's device and of its dtype. Memory beyond the matrix: at most about three times it
    (exact, square), far less for a small rank.
    """
    assert w_FD.ndim == 2, "a matrix"
    assert max_rank > 0, "a positive rank"
    if w_FD.shape[0] > w_FD.shape[1]:
        found = decompose(w_FD.T, max_rank)
        u_FR, v_RD = found.v_RD.T, found.u_FR.T
        return Decomposition(u_FR, found.s_R, v_RD, found.total, found.is_exact, found.gap_bound)
    rank = min(max_rank, w_FD.shape[0])
    total = squared_norm(w_FD)
    width = rank + max(MIN_OVERSAMPLING, rank // 8)
    if w_FD.shape[0] <= EXACT_SIDE or width * NARROWNESS > w_FD.shape[0]:
        u_FR, s_R, v_RD = _leading(w_FD, rank)
        return Decomposition(u_FR, s_R, v_RD, total, True, 0.0)
    basis_FQ, core_QD = _krylov(w_FD, rank, width)
    u_QR, s_R, v_RD = _leading(core_QD, rank)
    return Decomposition(basis_FQ @ u_QR, s_R, v_RD, total, False, _gap_bound(s_R, squared_norm(core_QD), total))


def squared_norm(w: Tensor) -> float:
    """Return the squared Frobenius norm, summed in float64 by pieces so that no second copy is made."""
    if w.numel() == 0:
        return 0.0
    rows = w[None] if w.ndim == 0 else w
    pieces = rows.split(max(1, _CHUNK_VALUES // rows[0].numel()))
    return sum(float(piece.double().square().sum()) for piece in pieces)


def _leading(w_FD: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of a matrix that is not tall, by the eigenvectors of its Gram matrix."""
    wide = w_FD.double() if w_FD.shape[0] <= DOUBLE_SIDE else w_FD
    u_FR = _eigenvectors(wide @ wide.T)[:, -rank:].flip(1).to(w_FD.dtype)
    del wide
    v_RD = u_FR.T @ w_FD
    s_R = torch.linalg.vector_norm(v_RD, dim=1)
    s_R, order_R = s_R.sort(descending=True, stable=True)  # nearly sorted: rounding in the smallest
    v_RD = v_RD[order_R].div_(s_R.clamp_min(torch.finfo(s_R.dtype).tiny)[:, None])
    return u_FR[:, order_R], s_R, v_RD


def _eigenvectors(gram_FF: Tensor) -> Tensor:
    """Of a symmetric matrix, which may be overwritten, by rising eigenvalue; on the matrix's own device."""
    if gram_FF.device.type != "cpu":
        return torch.linalg.eigh(gram_FF)[1]
    # In place, unlike torch's: a square matrix costs one copy less, and at 3072 2.0 s instead of 2.6 (one EPYC thread).
    return torch.from_numpy(eigh(gram_FF.numpy().T, overwrite_a=True, check_finite=False, driver="evd")[1])


def _krylov(w_FD: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor]:
    """A basis of the block Krylov space of W W^T, and W projected on it, grown until the held energy stands still."""
    max_blocks = min(MAX_BLOCKS, w_FD.shape[0] // width)
    space = _growing(w_FD, width)
    basis_FQ, core_QD = next(space)
    held = _held(core_QD, rank)
    for _ in range(max_blocks - 1):
        before = held
        basis_FQ, core_QD = next(space)
        held = _held(core_QD, rank)
        if held - before <= GAIN_TO_GO_ON * held:
            break
    return basis_FQ, core_QD


def _growing(w_FD: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start_DK = torch.randn(w_FD.shape[1], width, generator=generator).to(w_FD)
    basis_FQ = torch.linalg.qr(w_FD @ start_DK)[0]
    core_QD = (w_FD.T @ basis_FQ).T
    while True:
        yield basis_FQ, core_QD
        block_FK = w_FD @ core_QD[-width:].T
        for _ in range(2):  # once leaves what rounding brings back
            block_FK = torch.linalg.qr(block_FK - basis_FQ @ (basis_FQ.T @ block_FK))[0]
        basis_FQ = torch.cat([basis_FQ, block_FK], dim=1)
        core_QD = torch.cat([core_QD, (w_FD.T @ block_FK).T])


def _held(core_QD: Tensor, rank: int) -> float:
    return float(torch.linalg.eigvalsh(core_QD @ core_QD.T)[-rank:].double().sum())


def _gap_bound(s_R: Tensor, projected: float, total: float) -> float:
    """W^T W is the sum of that of the projection and of the rest: by Ky Fan, the best energy is at most the sum too."""
    held, rest = squared_norm(s_R), max(total - projected, 0.0)
    return rest / (held + rest) if rest else 0.0
