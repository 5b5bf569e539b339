"""Which implementation of the operations serves a device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    rms_norm: Callable[..., Tensor]
    rotate: Callable[..., None]
    silu_mul: Callable[..., Tensor]


def ops_for(device: str | torch.device, *, is_compiled: bool = False) -> Ops:
    """The fastest implementation for a device: Triton on CUDA, batched torch on a CPU, the twins anywhere else.

    With `is_compiled` a CPU gets the C++ ones instead, where there is a compiler for them (see `kernels.native`).
    Triton is imported only when a CUDA device asks for it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return _triton_ops()
    return _cpu_ops(is_compiled) if kind == "cpu" else _reference_ops()


def _cpu_ops(is_compiled: bool) -> Ops:
    from kernels import cpu, native, pointwise

    compiled = native.load_native() if is_compiled else None
    return _ops_of(cpu, cpu, pointwise) if compiled is None else _ops_of(compiled, compiled, compiled)


def _reference_ops() -> Ops:
    from kernels import reference

    return _ops_of(reference, reference, reference)


def _triton_ops() -> Ops:
    from kernels import pointwise, triton_attention, triton_lora

    return _ops_of(triton_lora, triton_attention, pointwise)


def _ops_of(lora: Any, attention: Any, pointwise: Any) -> Ops:
    return Ops(
        lora.lora_shrink,
        lora.lora_lookup,
        lora.lora_expand,
        lora.dora_scale,
        attention.store_kv,
        attention.paged_attention,
        pointwise.rms_norm,
        pointwise.rotate,
        pointwise.silu_mul,
    )
