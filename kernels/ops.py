"""Which implementation of the operations serves a device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ops:
    """The four operations of `kernels.reference`, same signatures and meaning, for one kind of device."""

    lora_shrink: Callable[..., Tensor]
    lora_expand: Callable[..., None]
    store_kv: Callable[..., None]
    paged_attention: Callable[..., Tensor]


def ops_for(device: str | torch.device) -> Ops:
    """The fastest implementation for a device: Triton on CUDA, batched torch on a CPU, the twins anywhere else.

    Triton is imported only when a CUDA device asks for it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return _triton_ops()
    return _cpu_ops() if kind == "cpu" else _reference_ops()


def _cpu_ops() -> Ops:
    from kernels import cpu

    return Ops(cpu.lora_shrink, cpu.lora_expand, cpu.store_kv, cpu.paged_attention)


def _reference_ops() -> Ops:
    from kernels import reference

    return Ops(reference.lora_shrink, reference.lora_expand, reference.store_kv, reference.paged_attention)


def _triton_ops() -> Ops:
    from kernels import triton_attention, triton_lora

    return Ops(
        triton_lora.lora_shrink,
        triton_lora.lora_expand,
        triton_attention.store_kv,
        triton_attention.paged_attention,
    )
