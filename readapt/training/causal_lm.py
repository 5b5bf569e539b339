"""The part of a Hugging Face causal language model that `readapt` uses, as types."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class Decoder(Protocol):
    """A causal language model without its head: embeddings, decoder layers and the final norm."""

    layers: nn.ModuleList  # each as in Llama: self_attn, mlp and two norms
    norm: nn.Module

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states of all tokens."""

    def register_forward_pre_hook(self, hook: Callable[..., None], *, with_kwargs: bool = False) -> RemovableHandle:
        """Call `hook` before each forward pass."""


class CausalLM(Protocol):
    """A loaded model such as `LlamaForCausalLM`; `load_base` returns one.

    "Bare" means without hooks: no adapter changes what the model computes.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def base_model(self) -> Decoder:
        """The model without its head."""

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Return the logits, and the hidden states of all tokens if they are asked for."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which maps hidden states to logits."""

    def get_submodule(self, target: str) -> nn.Module:
        """The module at this path."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules with their paths."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """All weights by name; they share the model's memory."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze all weights, or make them trainable."""

    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool) -> nn.Embedding:
        """Change the size of the vocabulary."""
