"""Take a decoder through its layers one at a time, with a visitor at the inputs and outputs of its linear modules.

A layer has four sites: q/k/v, then o, then gate/up, then down. The visitor sees what a site's modules read and return,
and decides what they return to the rest of the layer. Works on decoders of the Llama family, as `serving.model` does.
All tokens of all rows lie in one tensor `[U, D]` without padding; only attention sees padded batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cluster.errors import InvalidCheckpointError
from readapt.training.causal_lm import CausalLM
from readapt.training.data import BatchTensors, Encoded, collate

WALK_TOLERANCE = 1e-3  # relative difference between a layer's own output and the walked one
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION_OUTPUT = ("self_attn.o_proj",)
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
MLP_OUTPUT = ("mlp.down_proj",)


class Visitor(Protocol):
    """Called at each site of a layer."""

    def __call__(
        self, modules: tuple[str, ...], x_UD: Tensor, outputs: list[Tensor], stream_UD: Tensor | None
    ) -> list[Tensor]:
        """Return the outputs [U, F] that the layer uses from here on, one per module.

        `modules` are paths inside the layer, `x_UD` is their common input and `outputs` what they computed. `stream_UD`
        is the residual stream that the output is added to; None at q/k/v and gate/up.
        """
        ...


class Stream:
    """One model's residual stream for a list of batches, advanced layer by layer."""

    def __init__(self, model: CausalLM, batches: Sequence[BatchTensors]):
        self._is_token = [batch.attention_mask_BT.bool().to(model.device) for batch in batches]
        calls = [_first_layer_call(model, batch) for batch in batches]
        self._settings = [settings for _, settings in calls]
        self.hidden_UD = torch.cat([x_BTD[kept] for (x_BTD, _), kept in zip(calls, self._is_token, strict=True)])

    def advance(self, layer: Any, visit: Visitor) -> None:
        """Take the stream through one decoder layer."""
        stream_UD = self.hidden_UD
        x_UD = layer.input_layernorm(stream_UD)
        qkv = visit(ATTENTION_INPUTS, x_UD, _outputs(layer, ATTENTION_INPUTS, x_UD), None)
        mixed_UD, added_UD = self._attend(layer.self_attn, x_UD, qkv)
        [added_UD] = visit(ATTENTION_OUTPUT, mixed_UD, [added_UD], stream_UD)
        stream_UD = stream_UD + added_UD
        x_UD = layer.post_attention_layernorm(stream_UD)
        gate_UF, up_UF = visit(MLP_INPUTS, x_UD, _outputs(layer, MLP_INPUTS, x_UD), None)
        inner_UF = layer.mlp.act_fn(gate_UF) * up_UF
        [added_UD] = visit(MLP_OUTPUT, inner_UF, _outputs(layer, MLP_OUTPUT, inner_UF), stream_UD)
        self.hidden_UD = stream_UD + added_UD

    def _attend(self, attention: Any, x_UD: Tensor, qkv: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the input and the output of o_proj when q, k and v are those given."""
        mixed: list[Tensor] = []
        added: list[Tensor] = []
        for is_token_BT, settings, x_BTD, *qkv_BTF in zip(
            self._is_token, self._settings, self._padded(x_UD), *map(self._padded, qkv), strict=True
        ):
            with _fixed_qkv(attention, qkv_BTF) as o_inputs:
                y_BTD = attention(hidden_states=x_BTD, **settings)[0]
            mixed.append(o_inputs[0][is_token_BT])
            added.append(y_BTD[is_token_BT])
        return torch.cat(mixed), torch.cat(added)

    def _padded(self, x_UD: Tensor) -> Iterator[Tensor]:
        """Yield the tokens of each batch, padded to its width."""
        pieces = x_UD.split([int(is_token_BT.sum()) for is_token_BT in self._is_token])
        for is_token_BT, piece_UD in zip(self._is_token, pieces, strict=True):
            x_BTD = piece_UD.new_zeros(*is_token_BT.shape, x_UD.shape[1])
            x_BTD[is_token_BT] = piece_UD
            yield x_BTD


@torch.no_grad()
def check_walk(model: CausalLM, rows: Sequence[Encoded]) -> None:
    """Raise InvalidCheckpointError if the walk computes something else for the first layer than the layer itself."""
    try:
        batch = collate(rows)
        layer = model.base_model.layers[0]
        x_BTD, settings = _first_layer_call(model, batch)
        own = layer(x_BTD, **settings)
        stream = Stream(model, [batch])
        stream.advance(layer, lambda modules, x_UD, outputs, stream_UD: outputs)
    except AttributeError as error:
        raise InvalidCheckpointError(f"a transplant needs a decoder of the Llama family: {error}") from error
    own_BTD = own[0] if isinstance(own, tuple) else own
    own_UD = own_BTD[batch.attention_mask_BT.bool().to(own_BTD.device)]
    if not (stream.hidden_UD - own_UD).norm() <= WALK_TOLERANCE * own_UD.norm():
        raise InvalidCheckpointError("a transplant needs a decoder of the Llama family, but the model's layers differ")


class _Fixed(nn.Module):
    """A linear's stand-in that returns a given output. With a hook the linear would still compute its own."""

    def __init__(self, y_BTF: Tensor):
        super().__init__()
        self._y_BTF = y_BTF

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._y_BTF


@contextmanager
def _fixed_qkv(attention: Any, qkv: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Fix the outputs of q, k and v inside the block; yield a list that receives o_proj's input."""
    names = ("q_proj", "k_proj", "v_proj")
    linears = [getattr(attention, name) for name in names]
    o_inputs: list[Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(lambda module, inputs: o_inputs.append(inputs[0]))
    try:
        for name, y_BTF in zip(names, qkv, strict=True):
            setattr(attention, name, _Fixed(y_BTF))
        yield o_inputs
    finally:
        handle.remove()
        for name, linear in zip(names, linears, strict=True):
            setattr(attention, name, linear)


def _outputs(layer: Any, modules: Sequence[str], x_UD: Tensor) -> list[Tensor]:
    """Return the outputs of some linears of a layer, adapters included."""
    return [layer.get_submodule(name)(x_UD[None])[0] for name in modules]


class _FirstLayerReached(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    pass


def _first_layer_call(model: CausalLM, batch: BatchTensors) -> tuple[Tensor, dict[str, Any]]:
    """Return the first layer's arguments: the embeddings [B, T, D], and by keyword the masks and rotary tables.

    All layers get the same arguments, except for sliding windows, which are longer than any calibration row.
    """
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(layer: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        found.append((positional[0] if positional else named.pop("hidden_states"), named))
        raise _FirstLayerReached

    handle = model.base_model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    input_ids_BT = batch.input_ids_BT.to(model.device)
    mask_BT = batch.attention_mask_BT.to(model.device)
    try:
        model.base_model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False)
    except _FirstLayerReached:
        pass
    finally:
        handle.remove()
    return found[0]
