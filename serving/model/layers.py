"""The decoder layers of the Llama family and their rotary tables.

Modules that read the same input share one GEMM of the base model. Each module's adapters then add to its slice of the
output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.onednn import from_blocked, linear, to_blocked
from kernels.ops import Ops
from serving.model.batch import Batch
from serving.model.config import ModelConfig

MODULE_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARENTS = ("self_attn",) * 4 + ("mlp",) * 3  # by module kind
PROJECTIONS = (0, 0, 0, 1, 2, 2, 3)  # by module kind: the index in `Layer.projections`


@dataclass(frozen=True, eq=False)
class Step:
    """What all layers of one forward pass share. kv_pages: [P, L, 2, page_tokens, K, H], a view of the arena."""

    ops: Ops
    batch: Batch
    arena: Tensor
    kv_pages: Tensor
    cos_TJ: Tensor
    sin_TJ: Tensor


class Norm:
    """RMSNorm over the last dimension, see `kernels.reference.rms_norm`."""

    def __init__(self, size: int, eps: float, like: Tensor):
        self.weight_D = torch.empty(size, dtype=like.dtype, device=like.device)
        self.eps = eps

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        """Return the normalised x, in its dtype."""
        return step.ops.rms_norm(x_TD, self.weight_D, self.eps)

    def of_heads(self, x_TNH: Tensor, step: Step) -> Tensor:
        """Normalise each head by itself."""
        return self(x_TNH.reshape(-1, x_TNH.shape[2]), step).view(x_TNH.shape)


class Projection:
    """Target modules of one layer that read the same input: one base GEMM, then each module's adapters.

    `first_module` is the first one's module index, `widths` are the out features of all.
    """

    def __init__(self, first_module: int, widths: Sequence[int], num_in: int, has_bias: bool, like: Tensor):
        self.first_module = first_module
        self.widths = tuple(widths)
        self.weight_FD = torch.empty(sum(widths), num_in, dtype=like.dtype, device=like.device)
        self.bias_F = torch.empty(sum(widths), dtype=like.dtype, device=like.device) if has_bias else None

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        """Return the modules' outputs side by side."""
        out_TF = linear(x_TD, self.weight_FD, self.bias_F)
        lora = step.batch.lora
        group = lora.groups.get(self.first_module) if lora is not None else None
        if lora is not None and group is not None:
            lora.wait_for(self.first_module, len(self.widths))
            if group.has_gains:
                step.ops.dora_scale(step.arena, group, out_TF, self.bias_F)
            step.ops.lora_expand(step.ops.lora_shrink(x_TD, step.arena, group), step.arena, group, out_TF)
        return out_TF

    def to_blocked(self) -> None:
        """Convert the weight to oneDNN's blocked layout, if that is supported."""
        self.weight_FD = to_blocked(self.weight_FD)

    def parameters(self) -> dict[str, Tensor]:
        """Return each module's weight and bias by name within the layer: views, or copies of a blocked weight."""
        named = {}
        weights = from_blocked(self.weight_FD).split(self.widths)
        biases = (None,) * len(weights) if self.bias_F is None else self.bias_F.split(self.widths)
        for module, (weight_FD, bias_F) in enumerate(zip(weights, biases, strict=True), self.first_module):
            kind = module % len(MODULE_KINDS)
            path = f"{PARENTS[kind]}.{MODULE_KINDS[kind]}"
            named[f"{path}.weight"] = weight_FD
            if bias_F is not None:
                named[f"{path}.bias"] = bias_F
        return named


class Layer:
    """One decoder layer: attention and gated MLP, each with its norm and residual connection."""

    def __init__(self, config: ModelConfig, index: int, like: Tensor):
        hidden, inner = config.hidden_size, config.intermediate_size
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        module, eps = index * len(MODULE_KINDS), config.rms_norm_eps
        self.index = index
        self.head_dim = config.head_dim
        self.num_heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.window = config.windows[index]
        self.input_norm = Norm(hidden, eps, like)
        self.qkv = Projection(module, (q_width, kv_width, kv_width), hidden, config.has_qkv_bias, like)
        self.q_norm = Norm(config.head_dim, eps, like) if config.has_qk_norm else None
        self.k_norm = Norm(config.head_dim, eps, like) if config.has_qk_norm else None
        self.o = Projection(module + 3, (hidden,), q_width, config.has_o_bias, like)
        self.mlp_norm = Norm(hidden, eps, like)
        self.gate_up = Projection(module + 4, (inner, inner), hidden, config.has_mlp_bias, like)
        self.down = Projection(module + 6, (hidden,), inner, config.has_mlp_bias, like)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        """Return the hidden state after this layer, [T, D]."""
        x_TD = x_TD + self._attention(self.input_norm(x_TD, step), step)
        return x_TD + self._mlp(self.mlp_norm(x_TD, step), step)

    def _attention(self, x_TD: Tensor, step: Step) -> Tensor:
        q_TNH, k_TKH, v_TKH = self._heads(self.qkv(x_TD, step), step)
        batch = step.batch
        step.ops.store_kv(k_TKH, v_TKH, step.kv_pages, self.index, batch.slots_T)
        o_TNH = step.ops.paged_attention(
            q_TNH,
            step.kv_pages,
            self.index,
            batch.attention,
            scale=self.head_dim**-0.5,
            window=self.window,
        )
        return self.o(o_TNH.flatten(1), step)

    def _heads(self, qkv_TF: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values by head; queries and keys are rotated to their positions."""
        heads_TNH = qkv_TF.unflatten(-1, (-1, self.head_dim))
        q_TNH, k_TKH, v_TKH = heads_TNH.split(self.num_heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm.of_heads(q_TNH, step), self.k_norm.of_heads(k_TKH, step)
            step.ops.rotate(q_TNH, step.cos_TJ, step.sin_TJ)
            step.ops.rotate(k_TKH, step.cos_TJ, step.sin_TJ)
        else:  # queries and keys are still adjacent: one call for both
            num_rotated = q_TNH.shape[1] + k_TKH.shape[1]
            step.ops.rotate(heads_TNH[:, :num_rotated], step.cos_TJ, step.sin_TJ)
        return q_TNH, k_TKH, v_TKH

    def _mlp(self, x_TD: Tensor, step: Step) -> Tensor:
        return self.down(step.ops.silu_mul(self.gate_up(x_TD, step)), step)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections of target modules, in the order of their module indices."""
        return self.qkv, self.o, self.gate_up, self.down

    def parameters(self) -> dict[str, Tensor]:
        """Return all weights by name within the layer."""
        named = {
            "input_layernorm.weight": self.input_norm.weight_D,
            "post_attention_layernorm.weight": self.mlp_norm.weight_D,
        }
        if self.q_norm is not None and self.k_norm is not None:
            named["self_attn.q_norm.weight"] = self.q_norm.weight_D
            named["self_attn.k_norm.weight"] = self.k_norm.weight_D
        for projection in self.projections:
            named |= projection.parameters()
        return named


def rope_tables(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of all positions, [P, J] each (rotary position embedding, arXiv 2104.09864).

    As in transformers, they are computed in float32 and rounded once.
    """
    frequencies_J, scaling = _rope_frequencies(config)
    positions_P1 = torch.arange(config.max_position, dtype=torch.float32, device=device)[:, None]
    angles_PJ = positions_P1 * frequencies_J.to(device)
    return (angles_PJ.cos() * scaling).to(dtype), (angles_PJ.sin() * scaling).to(dtype)


def _rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the rotary frequencies, and the factor that some rope types apply to cosines and sines (else 1)."""
    parameters = config.rope.rope_parameters
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config.rope)
    exponents_J = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (parameters["rope_theta"] ** exponents_J), 1.0
