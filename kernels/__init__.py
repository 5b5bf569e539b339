"""Tensor operations of serving: segmented LoRA, paged attention, KV store.

Every public name loads lazily, so that importing the package stays cheap: Hugging Face has an optional package of the
same name, and transformers looks for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.attention import AttentionMetadata
    from kernels.ops import Ops, ops_for
    from kernels.segments import LoraGroup, LoraSegments

__all__ = ["AttentionMetadata", "LoraGroup", "LoraSegments", "Ops", "ops_for"]

_MODULES = {
    "AttentionMetadata": "kernels.attention",
    "LoraGroup": "kernels.segments",
    "LoraSegments": "kernels.segments",
    "Ops": "kernels.ops",
    "ops_for": "kernels.ops",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
