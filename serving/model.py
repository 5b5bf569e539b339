"""The Llama family (Llama, Mistral, Qwen2, Qwen3) as the engine runs it: a flat batch in, logits out, KV in pages.

Inference only, under the caller's `torch.inference_mode()`. Weights are plain tensors in small classes. Modules that
read the same input share one GEMM of the base model; each one's adapters add to their slice of its output.

Shape letters: T tokens, D hidden size, F out features, N query heads, K key/value heads, H head dim, C = H / 2
frequencies, V vocabulary, O rows whose logits are wanted, P pages, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from kernels import ops_for
from kernels.ops import Ops
from kernels.segments import LoraGroup
from serving.batch import Batch, LoraLayout
from serving.model_config import ModelConfig
from serving.packing import piece_width
from serving.rope import rope_tables, rotate

MODULE_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_PARENTS = ("self_attn",) * 4 + ("mlp",) * 3  # of the kinds above


@dataclass(frozen=True, eq=False)
class _Step:
    """What all layers of one forward pass share. kv_pages: [P, L, 2, page_tokens, K, H], a view of the arena."""

    ops: Ops
    batch: Batch
    arena: Tensor
    kv_pages: Tensor
    cos_TC: Tensor
    sin_TC: Tensor


class Norm:
    """RMSNorm over the last dimension: in float32, rounded before the weight is applied, as transformers does."""

    def __init__(self, size: int, eps: float, like: Tensor):
        self.weight_D = torch.empty(size, dtype=like.dtype, device=like.device)
        self.eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the normed x, in its dtype."""
        x = x_TD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight_D * x.to(x_TD.dtype)


class Projection:
    """Target modules of one layer that read the same input: one base GEMM, then each module's adapters.

    `widths` are the modules' out features, from module index `first_module` on.
    """

    def __init__(self, first_module: int, widths: Sequence[int], num_in: int, has_bias: bool, like: Tensor):
        self.first_module = first_module
        self.widths = tuple(widths)
        self.weight_FD = torch.empty(sum(widths), num_in, dtype=like.dtype, device=like.device)
        self.bias_F = torch.empty(sum(widths), dtype=like.dtype, device=like.device) if has_bias else None

    def __call__(self, x_TD: Tensor, step: _Step) -> tuple[Tensor, ...]:
        """Return each module's output: column slices of one tensor."""
        out_TF = linear(x_TD, self.weight_FD, self.bias_F)
        group = step.batch.lora.groups.get(self.first_module) if step.batch.lora is not None else None
        if group is not None:
            if group.has_gains:
                step.ops.dora_scale(step.arena, group, out_TF, self.bias_F)
            step.ops.lora_expand(step.ops.lora_shrink(x_TD, step.arena, group), step.arena, group, out_TF)
        return out_TF.split(self.widths, dim=-1)

    def parameters(self) -> dict[str, Tensor]:
        """Views of each module's weight and bias, by name within the layer."""
        named = {}
        weights = self.weight_FD.split(self.widths)
        biases = (None,) * len(weights) if self.bias_F is None else self.bias_F.split(self.widths)
        for module, (weight_FD, bias_F) in enumerate(zip(weights, biases, strict=True), self.first_module):
            kind = module % len(MODULE_KINDS)
            path = f"{_PARENTS[kind]}.{MODULE_KINDS[kind]}"
            named[f"{path}.weight"] = weight_FD
            if bias_F is not None:
                named[f"{path}.bias"] = bias_F
        return named


class Layer:
    """One decoder layer: attention and gated MLP, each behind its norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int, like: Tensor):
        hidden, inner = config.hidden_size, config.intermediate_size
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        module, eps = index * len(MODULE_KINDS), config.rms_norm_eps
        self.index = index
        self.head_dim = config.head_dim
        self.window = config.windows[index]
        self.input_norm = Norm(hidden, eps, like)
        self.qkv = Projection(module, (q_width, kv_width, kv_width), hidden, config.has_qkv_bias, like)
        self.q_norm = Norm(config.head_dim, eps, like) if config.has_qk_norm else None
        self.k_norm = Norm(config.head_dim, eps, like) if config.has_qk_norm else None
        self.o = Projection(module + 3, (hidden,), q_width, config.has_o_bias, like)
        self.mlp_norm = Norm(hidden, eps, like)
        self.gate_up = Projection(module + 4, (inner, inner), hidden, config.has_mlp_bias, like)
        self.down = Projection(module + 6, (hidden,), inner, config.has_mlp_bias, like)

    def __call__(self, x_TD: Tensor, step: _Step) -> Tensor:
        """Return the stream after this layer."""
        x_TD = x_TD + self._attention(self.input_norm(x_TD), step)
        return x_TD + self._mlp(self.mlp_norm(x_TD), step)

    def _attention(self, x_TD: Tensor, step: _Step) -> Tensor:
        q_TNH, k_TKH, v_TKH = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(x_TD, step))
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH, k_TKH = (rotate(x, step.cos_TC, step.sin_TC) for x in (q_TNH, k_TKH))
        batch = step.batch
        step.ops.store_kv(k_TKH, v_TKH, step.kv_pages, batch.slots_T, self.index)
        o_TNH = step.ops.paged_attention(
            q_TNH,
            step.kv_pages,
            self.index,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables_NB,
            scale=self.head_dim**-0.5,
            window=self.window,
            max_query_tokens=batch.max_query_tokens,
            max_context_tokens=batch.max_context_tokens,
        )
        return self.o(o_TNH.flatten(1), step)[0]

    def _mlp(self, x_TD: Tensor, step: _Step) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD, step)
        return self.down(silu(gate_TF) * up_TF, step)[0]

    def parameters(self) -> dict[str, Tensor]:
        """All weights, by name within the layer."""
        named = {
            "input_layernorm.weight": self.input_norm.weight_D,
            "post_attention_layernorm.weight": self.mlp_norm.weight_D,
        }
        if self.q_norm is not None and self.k_norm is not None:
            named["self_attn.q_norm.weight"] = self.q_norm.weight_D
            named["self_attn.k_norm.weight"] = self.k_norm.weight_D
        return named | self.qkv.parameters() | self.o.parameters() | self.gate_up.parameters() | self.down.parameters()


class CausalLM:
    """A language model of the Llama family. The weights are unset until `serving.weights.load_model` fills them.

    `target_shapes` has (out, in) of every module that adapters may change, by its path, in the order of the module
    index: `linear_shapes`, then the embedding (whose input is one-hot), then the head. `vocab_size` bounds token ids,
    `max_position` the tokens of a context.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.config = config
        self.embedding_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [Layer(config, index, self.embedding_VD) for index in range(config.num_layers)]
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, self.embedding_VD)
        self.head_VD = self.embedding_VD if config.is_tied else torch.empty_like(self.embedding_VD)
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.vocab_size = config.vocab_size
        self.max_position = config.max_position
        self.linear_shapes = self._linear_shapes()
        vocab, hidden = config.vocab_size, config.hidden_size
        self.target_shapes = {**self.linear_shapes, EMBEDDING: (hidden, vocab), HEAD: (vocab, hidden)}
        self._cos_PC, self._sin_PC = rope_tables(config, dtype, device)
        self._ops = ops_for(device)

    def parameters(self) -> dict[str, Tensor]:
        """All weights under their names in a checkpoint; those of fused GEMMs are views of their slice."""
        named = {"model.embed_tokens.weight": self.embedding_VD, "model.norm.weight": self.norm.weight_D}
        if self.head_VD is not self.embedding_VD:
            named["lm_head.weight"] = self.head_VD
        for layer in self.layers:
            named |= {f"model.layers.{layer.index}.{name}": weight for name, weight in layer.parameters().items()}
        return named

    def forward(self, batch: Batch, arena: Tensor, page_tokens: int) -> Tensor:
        """Run one step: stores the batch's keys and values, and returns float32 logits of the rows that want them.

        arena: flat, in the model's dtype; whole pages of L * 2 * page_tokens * K * H elements. Returns [O, V].
        """
        step = _Step(
            ops=self._ops,
            batch=batch,
            arena=arena,
            kv_pages=arena.view(-1, self.num_layers, 2, page_tokens, self.num_kv_heads, self.head_dim),
            cos_TC=self._cos_PC[batch.positions_T],
            sin_TC=self._sin_PC[batch.positions_T],
        )
        x_TD = self._embed(step)
        for layer in self.layers:
            x_TD = layer(x_TD, step)
        return self._logits(self.norm(x_TD[batch.logit_rows_O]), step)

    def target_weights(self) -> dict[str, Tensor]:
        """The weight (out, in) of each target module, in the order of their index; the embedding's is transposed."""
        named = self.parameters()
        linears = {path: named[f"{path}.weight"] for path in self.linear_shapes}
        return {**linears, EMBEDDING: self.embedding_VD.T, HEAD: self.head_VD}

    def lora_layout(self, page_elements: int) -> LoraLayout:
        """Which target modules share an input, and how rows of vocabulary size are cut."""
        projections = [p for layer in self.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return LoraLayout(
            widths={projection.first_module: projection.widths for projection in projections},
            embedding=len(self.linear_shapes),
            hidden_size=self.config.hidden_size,
            vocab_size=self.vocab_size,
            piece_width=piece_width(self.vocab_size, page_elements),
        )

    def _embed(self, step: _Step) -> Tensor:
        tokens_T, lora = step.batch.tokens_T, step.batch.lora
        x_TD = embedding(tokens_T, self.embedding_VD)
        if lora is not None and lora.embedding is not None:
            if lora.embedding.has_gains:
                step.ops.dora_scale(step.arena, lora.embedding, x_TD, None)
            module, width = lora.embedding.modules[0], lora.layout.piece_width
            h_TR = step.ops.lora_lookup(tokens_T, step.arena, module, width)
            step.ops.lora_expand(h_TR, step.arena, lora.embedding, x_TD)
        return x_TD

    def _logits(self, x_OD: Tensor, step: _Step) -> Tensor:
        logits_OV, lora = linear(x_OD, self.head_VD).float(), step.batch.lora
        if lora is not None and lora.head is not None:
            if lora.head.has_gains:
                step.ops.dora_scale(step.arena, lora.head, logits_OV, None)
            first_piece = LoraGroup.of(lora.head.modules[:1], lora.head.widths[:1])
            h_OR = step.ops.lora_shrink(x_OD, step.arena, first_piece)
            step.ops.lora_expand(h_OR, step.arena, lora.head, logits_OV)
        return logits_OV

    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        weights = self.parameters()
        paths = (
            f"model.layers.{layer.index}.{parent}.{kind}"
            for layer in self.layers
            for parent, kind in zip(_PARENTS, MODULE_KINDS, strict=True)
        )
        return {path: (weights[f"{path}.weight"].shape[0], weights[f"{path}.weight"].shape[1]) for path in paths}
