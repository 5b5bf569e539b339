"""The forward pass of the Llama family (Llama, Mistral, Qwen2, Qwen3): a flat batch in, logits out, KV in pages.

Inference only; the caller enters `torch.inference_mode()`.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kernels.onednn import from_blocked, linear, to_blocked
from kernels.ops import ops_for
from kernels.segments import LoraGroup
from serving.adapters.packing import piece_width
from serving.model.batch import Batch, LoraLayout
from serving.model.config import ModelConfig
from serving.model.layers import MODULE_KINDS, PARENTS, PROJECTIONS, Layer, Norm, Step, rope_tables

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class CausalLM:
    """A language model of the Llama family. `serving.model.weights.load_model` fills its weights, which start unset.

    `target_shapes` maps the path of every module that adapters may change to (out, in), in the order of the module
    index: `linear_shapes`, then the embedding (its input counts as one-hot), then the head. Token ids are below
    `vocab_size`, positions below `max_position`. `is_compiled` asks for compiled kernels (see `kernels.ops.ops_for`).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, is_compiled: bool = False):
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
        self._cos_PJ, self._sin_PJ = rope_tables(config, dtype, device)
        self._blocked_head_VD = self.head_VD
        self.ops = ops_for(device, is_compiled=is_compiled)

    def to_blocked(self) -> None:
        """Convert all weights to blocked ones, after they are set. A head tied to the embedding becomes a copy."""
        for layer in self.layers:
            for projection in layer.projections:
                projection.to_blocked()
        self._blocked_head_VD = to_blocked(self.head_VD)
        if not self.config.is_tied:
            self.head_VD = self._blocked_head_VD

    def parameters(self) -> dict[str, Tensor]:
        """Return all weights under their names in a checkpoint.

        Weights of fused GEMMs are views of their slice. Blocked weights (see `to_blocked`) are copies.
        """
        named = {"model.embed_tokens.weight": self.embedding_VD, "model.norm.weight": self.norm.weight_D}
        if self.head_VD is not self.embedding_VD:
            named["lm_head.weight"] = from_blocked(self.head_VD)
        for layer in self.layers:
            named |= {f"model.layers.{layer.index}.{name}": weight for name, weight in layer.parameters().items()}
        return named

    def weight(self, name: str) -> Tensor | None:
        """Return one of the weights by its name in a checkpoint, or None. A tied head is the embedding."""
        if name == "lm_head.weight":
            return from_blocked(self.head_VD)
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match is None:
            return {"model.embed_tokens.weight": self.embedding_VD, "model.norm.weight": self.norm.weight_D}.get(name)
        index = int(match[1])
        return self.layers[index].parameters().get(name[match.end() :]) if index < self.num_layers else None

    def forward(self, batch: Batch, arena: Tensor, page_tokens: int) -> Tensor:
        """Run one step: store the batch's keys and values, and return the logits of `batch.logit_rows_O`.

        arena: flat, in the model's dtype; whole pages of L * 2 * page_tokens * K * H elements
        Returns float32 [O, V].
        """
        step = Step(
            ops=self.ops,
            batch=batch,
            arena=arena,
            kv_pages=arena.view(-1, self.num_layers, 2, page_tokens, self.num_kv_heads, self.head_dim),
            cos_TJ=self._cos_PJ[batch.positions_T],
            sin_TJ=self._sin_PJ[batch.positions_T],
        )
        x_TD = self._embed(step)
        for layer in self.layers:
            x_TD = layer(x_TD, step)
        return self._logits(self.norm(x_TD[batch.logit_rows_O], step), step)

    def target_weights(self) -> Mapping[str, Tensor]:
        """Return the weight (out, in) of each target module by path, in the order of the module index.

        The embedding is transposed. Blocked weights are converted on access.
        """
        return _TargetWeights(self)

    def lora_layout(self, page_elements: int) -> LoraLayout:
        """Return which target modules share an input, and how rows of vocabulary size are cut into pieces."""
        projections = [projection for layer in self.layers for projection in layer.projections]
        return LoraLayout(
            widths={projection.first_module: projection.widths for projection in projections},
            embedding=len(self.linear_shapes),
            hidden_size=self.config.hidden_size,
            vocab_size=self.vocab_size,
            piece_width=piece_width(self.vocab_size, page_elements),
        )

    def _embed(self, step: Step) -> Tensor:
        tokens_T, lora = step.batch.tokens_T, step.batch.lora
        x_TD = embedding(tokens_T, self.embedding_VD)
        if lora is not None and lora.embedding is not None:
            lora.wait_for(lora.layout.embedding)
            if lora.embedding.has_gains:
                step.ops.dora_scale(step.arena, lora.embedding, x_TD, None)
            module, width = lora.embedding.modules[0], lora.layout.piece_width
            h_TR = step.ops.lora_lookup(tokens_T, step.arena, module, width)
            step.ops.lora_expand(h_TR, step.arena, lora.embedding, x_TD)
        return x_TD

    def _logits(self, x_OD: Tensor, step: Step) -> Tensor:
        logits_OV, lora = linear(x_OD, self._blocked_head_VD).float(), step.batch.lora
        if lora is not None and lora.head is not None:
            lora.wait_for(lora.layout.head)
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
            for parent, kind in zip(PARENTS, MODULE_KINDS, strict=True)
        )
        return {path: (weights[f"{path}.weight"].shape[0], weights[f"{path}.weight"].shape[1]) for path in paths}


class _TargetWeights(Mapping[str, Tensor]):
    """Weights by path, converted from blocked ones on access, because callers read only a few."""

    def __init__(self, model: CausalLM):
        self._model = model

    def __getitem__(self, path: str) -> Tensor:
        model = self._model
        if path in (EMBEDDING, HEAD):
            return model.embedding_VD.T if path == EMBEDDING else from_blocked(model.head_VD)
        layer, name = path.removeprefix("model.layers.").split(".", 1)
        own = PROJECTIONS[MODULE_KINDS.index(name.rpartition(".")[2])]
        return model.layers[int(layer)].projections[own].parameters()[f"{name}.weight"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.target_shapes)

    def __len__(self) -> int:
        return len(self._model.target_shapes)
