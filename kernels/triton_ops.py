"""The operations on CUDA: Triton for LoRA and attention, torch for the rest."""

from kernels.pointwise import mask_logits, rms_norm, rotate, silu_mul
from kernels.triton_attention import paged_attention, store_kv
from kernels.triton_lora import dora_scale, lora_expand, lora_lookup, lora_shrink

__all__ = [
    "dora_scale",
    "lora_expand",
    "lora_lookup",
    "lora_shrink",
    "mask_logits",
    "paged_attention",
    "rms_norm",
    "rotate",
    "silu_mul",
    "store_kv",
]
