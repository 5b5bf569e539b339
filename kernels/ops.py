"""Which implementation of the operations serves a device."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ops:
    """The operations of `kernels.reference`, same signatures and meaning, for one kind of device."""

    lora_shrink: Callable[..., Tensor]
    lora_lookup: Callable[..., Tensor]
    lora_expand: Callable[..., None]
    dora_scale: Callable[..., None]
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

    return _ops_of(cpu, cpu)


def _reference_ops() -> Ops:
    from kernels import reference

    return _ops_of(reference, reference)


def _triton_ops() -> Ops:
    from kernels import triton_attention, triton_lora

    return _ops_of(triton_lora, triton_attention)


def _ops_of(lora: ModuleType, attention: ModuleType) -> Ops:
    return Ops(
        lora.lora_shrink,
        lora.lora_lookup,
        lora.lora_expand,
        lora.dora_scale,
        attention.store_kv,
        attention.paged_attention,
    )
