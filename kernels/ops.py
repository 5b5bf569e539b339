"""The interface of the operations, and which implementation each device gets."""

from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import AttentionMetadata
from kernels.segments import LoraGroup, LoraSegments


class Ops(Protocol):
    """The operations of `kernels.reference`, which defines them, for one kind of device. Modules implement it too."""

    def lora_shrink(self, x_TD: Tensor, arena: Tensor, group: LoraGroup) -> Tensor:
        """Multiply each token with its adapter's `lora_a` in each module, and scale."""

    def lora_lookup(self, ids_T: Tensor, arena: Tensor, module: LoraSegments, width: int) -> Tensor:
        """Read the column of its adapter's `lora_a` that each token id names, and scale it."""

    def lora_expand(self, h_TR: Tensor, arena: Tensor, group: LoraGroup, out_TF: Tensor) -> None:
        """Add `h @ lora_b^T` of each token's adapter to the modules' outputs, in place."""

    def dora_scale(self, arena: Tensor, group: LoraGroup, out_TF: Tensor, bias_F: Tensor | None) -> None:
        """Scale the base model's outputs as DoRA adapters do, in place."""

    def store_kv(self, k_TKH: Tensor, v_TKH: Tensor, kv_pages: Tensor, layer: int, slots_T: Tensor) -> None:
        """Write the keys and values of new tokens to their pages, in place."""

    def paged_attention(
        self,
        q_TNH: Tensor,
        kv_pages: Tensor,
        layer: int,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend causally from each sequence's new tokens to all its tokens."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalise each row by its root mean square."""

    def rotate(self, x_TNH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> None:
        """Apply rotary position embedding, in place."""

    def silu_mul(self, gate_up_TF: Tensor) -> Tensor:
        """Return `silu(gate) * up` of each row."""

    def mask_logits(self, logits_OV: Tensor, rows_O2: Tensor, bits_O2V2: Tensor) -> None:
        """Set the logits of the tokens that some rows' masks lack to -inf, in place."""


def ops_for(device: str | torch.device, *, is_compiled: bool = False) -> Ops:
    """Return the fastest operations for a device: Triton on CUDA, torch on a CPU, the twins elsewhere.

    With `is_compiled` a CPU gets the C++ operations if this machine can run and compile them (see `kernels.native`).
    Triton is imported only for a CUDA device.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        from kernels import triton_ops

        return triton_ops
    if kind == "cpu":
        from kernels import cpu, native

        compiled = native.load_native() if is_compiled else None
        return cpu if compiled is None else compiled
    from kernels import reference

    return reference
