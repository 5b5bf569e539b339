"""Least squares for the transplant: ridge regression cut to a rank, and the map between two models' heads."""

import torch
from torch import Tensor

from cluster.errors import TrainingError
from readapt.lowrank.spectra import EnergyShare
from readapt.lowrank.svd import decompose
from readapt.training.causal_lm import CausalLM

HEAD_RIDGE = 1e-3  # values from 1e-4 to 1e-2 made no difference
MAX_PENALTIES = 4  # tried one after the other, each ten times the last, until the Gram matrix can be factored
BALANCE_FLOOR = 1e-4  # least length of A's rows when balancing, so that B's columns can be trained if A is zero


class Regression:
    """Ridge regression on the inputs x_UD. Their Gram matrix is factored once, for all outputs.

    The penalty is `ridge` times the mean diagonal of the Gram matrix, and larger if that cannot be factored. Raises
    TrainingError if no penalty helps: the inputs are not finite then.
    """

    def __init__(self, x_UD: Tensor, ridge: float):
        self.x_UD = x_UD
        gram_DD = (x_UD.T @ x_UD).double()
        least = ridge * gram_DD.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        self._penalty, self._cholesky_DD = _factored(gram_DD, least)

    def solve(
        self,
        y_UF: Tensor,
        max_rank: int,
        centre_FD: Tensor | None = None,
        *,
        min_rank: int = 1,
        energy: float = 1.0,
    ) -> tuple[Tensor, Tensor, float]:
        """Return the factors (a_RD, b_FR) of the best map, and the share of the full map's energy that they hold.

        The rank is the smallest that holds the share `energy`, between `min_rank` and `max_rank`. The penalty pulls the
        full map to `centre_FD` (None: to zero). The two factors have equal norms, which helps training.
        Raises TrainingError if the outputs are not finite.
        """
        moment_DF = (self.x_UD.T @ y_UF).double()
        if centre_FD is not None:
            moment_DF += self._penalty * centre_FD.T
        full_FD = torch.cholesky_solve(moment_DF, self._cholesky_DD).T.float()
        if not full_FD.isfinite().all():
            raise TrainingError("the transplant failed: a module's outputs are not finite")
        found = decompose(full_FD @ self._cholesky_DD.float(), max_rank)
        rank = max(min_rank, EnergyShare(energy).rank(found.spectrum()))
        b_FR = found.u_FR[:, :rank]
        a_RD = b_FR.T @ full_FD
        balance_R = torch.linalg.vector_norm(a_RD, dim=1).clamp_min(BALANCE_FLOOR).sqrt()
        return a_RD / balance_R[:, None], b_FR * balance_R, found.spectrum().energy(rank)


def _factored(gram_DD: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first penalty, from `least` upwards, that lets the matrix be factored, and the Cholesky factor."""
    for penalty in (least * 10**power for power in range(MAX_PENALTIES)):
        ridged_DD = gram_DD.clone()
        ridged_DD.diagonal().add_(penalty)
        cholesky_DD, failed_at = torch.linalg.cholesky_ex(ridged_DD)
        if not failed_at and cholesky_DD.isfinite().all():
            return penalty, cholesky_DD
    raise TrainingError("the transplant failed: a module's inputs are not finite, so their Gram matrix has no factors")


class HeadMap:
    """Maps the teacher's last stream to the stream from which the student's norm and head compute the same logits.

    Least squares over the vocabulary, with half of the weight on the answers' tokens. A penalty pulls the map to the
    identity, so that equal heads map a stream to itself. The gain of each final RMS norm is multiplied into its head.
    The stream's length is left as it is, because the norms remove it. Only tokens that both models have count.
    """

    def __init__(self, teacher: CausalLM, student: CausalLM, answers_Y: Tensor):
        old_VD, new_VD = _head(teacher), _head(student)
        num_shared = min(len(old_VD), len(new_VD))
        old_VD, new_VD = old_VD[:num_shared], new_VD[:num_shared]
        counts_V = answers_Y[answers_Y < num_shared].bincount(minlength=num_shared).to(new_VD)
        weights_V = 0.5 / num_shared + 0.5 * counts_V / counts_V.sum().clamp_min(1)
        weighted_DV = (new_VD * weights_V[:, None]).T
        gram_DD = (weighted_DV @ new_VD).double()
        scales_D = gram_DD.diagonal()  # grows with the squares of the new gains, so the penalty does too; never 0
        penalty_DD = HEAD_RIDGE * scales_D.clamp_min(HEAD_RIDGE * scales_D.mean()).diag()
        moment_DD = (weighted_DV @ old_VD).double() + penalty_DD
        self._map_DD = torch.linalg.solve(gram_DD + penalty_DD, moment_DD).float()

    def __call__(self, stream_UD: Tensor) -> Tensor:
        """Return the stream to ask of the student."""
        return stream_UD @ self._map_DD.T


def _head(model: CausalLM) -> Tensor:
    """Return the map [V, D] from a stream of unit mean square to the logits."""
    head_VD: Tensor = model.get_output_embeddings().weight.float()
    return head_VD * model.base_model.norm.weight.float()
