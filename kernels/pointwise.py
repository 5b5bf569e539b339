"""Operations on single rows in torch, for any device; `kernels.reference` defines each one."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise each row; see `kernels.reference.rms_norm`."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def rotate(x_TNH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> None:
    """Apply rotary position embedding, in place; see `kernels.reference.rotate`."""
    first_TNJ, second_TNJ = x_TNH.chunk(2, dim=-1)
    cos_T1J, sin_T1J = cos_TJ[:, None], sin_TJ[:, None]
    rotated_TNJ = first_TNJ * cos_T1J - second_TNJ * sin_T1J
    second_TNJ.mul_(cos_T1J).addcmul_(first_TNJ, sin_T1J)
    first_TNJ.copy_(rotated_TNJ)


def mask_logits(logits_OV: Tensor, rows_O2: Tensor, bits_O2V2: Tensor) -> None:
    """Set the logits of the tokens that each row's mask lacks to -inf; see `kernels.reference.mask_logits`."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits_O2V2.device)
    is_allowed_O2V = (bits_O2V2[:, :, None] >> shifts & 1).flatten(1)[:, : logits_OV.shape[1]]
    logits_OV[rows_O2] = logits_OV[rows_O2].masked_fill(is_allowed_O2V == 0, -torch.inf)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """Return `silu(gate) * up` of each row; see `kernels.reference.silu_mul`."""
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return silu(gate_TF) * up_TF
