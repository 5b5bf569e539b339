"""Tensor operations of serving: segmented LoRA, paged attention, KV store. The shop window; everything loads lazily.

Light on purpose: Hugging Face has an optional package of the same import name, and transformers looks for it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.ops import ops_for
    from kernels.segments import LoraGroup, LoraSegments

__all__ = ["LoraGroup", "LoraSegments", "ops_for"]


def __getattr__(name: str) -> object:
    if name == "ops_for":
        from kernels.ops import ops_for

        return ops_for
    if name in ("LoraGroup", "LoraSegments"):
        from kernels import segments

        return getattr(segments, name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
