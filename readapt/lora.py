"""LoRA on a Hugging Face model: trainable factors beside frozen linears, without touching the model's own weights.

Shape letters: B rows, T tokens, D in, F out, R rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, GenerationConfig

from cluster.adapter_files import Adapter, LoraFactors, check_fits
from cluster.checkpoints import open_checkpoint


def load_base(folder: Path, device: str | torch.device = "cpu") -> Any:
    """Loads a checkpoint as a frozen float32 Hugging Face causal LM in eval mode.

    Of its generation settings only the stop tokens are kept: a repetition penalty, say, which many checkpoints come
    with, would bend greedy decoding away from what an engine answers, for whom only the request's own settings count.
    InvalidCheckpointError where the folder is no complete checkpoint.
    """
    open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.requires_grad_(False).eval()


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear inside the model's layers, by module path; the head is not among them."""
    modules = model.named_modules()
    return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear) and ".layers." in n}


@dataclass
class _Trainable:
    a_RD: nn.Parameter
    b_FR: nn.Parameter
    scaling: float


class LoraWeights:
    """Owner of the trainable factors of one adapter on one model; made by `attach`, undone by `detach`.

    Each adapted linear has a forward hook that adds `scaling * x A^T B^T` to its output.
    """

    def __init__(self, model: Any, adapter: Adapter):
        self._model = model
        self._handles: list[RemovableHandle] = []
        self.load(adapter)

    def load(self, adapter: Adapter) -> None:
        """Puts another adapter in place of the present one; modules and ranks may differ. Parameters are new ones.

        InvalidAdapterError where the adapter does not fit the model.
        """
        check_fits(adapter, linear_shapes(self._model))
        self.detach()
        self._is_rslora, self._base_model = adapter.is_rslora, adapter.base_model
        device = next(self._model.parameters()).device
        self._factors = {name: _trainable(factors, device) for name, factors in adapter.factors.items()}
        self._handles = [
            self._model.get_submodule(name).register_forward_hook(_add_delta(trainable))
            for name, trainable in self._factors.items()
        ]

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, in order."""
        return list(self._factors)

    def parameters(self) -> list[nn.Parameter]:
        """All A, then all B, in order of `modules`."""
        return [f.a_RD for f in self._factors.values()] + [f.b_FR for f in self._factors.values()]

    def export(self) -> Adapter:
        """A copy of the present factors as an adapter on the CPU."""
        factors = {name: LoraFactors(_copy(f.a_RD), _copy(f.b_FR), f.scaling) for name, f in self._factors.items()}
        return Adapter(factors=factors, is_rslora=self._is_rslora, base_model=self._base_model)

    def detach(self) -> None:
        """Takes the adapter off the model, which then computes what the bare base computes."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def attach(model: Any, adapter: Adapter) -> LoraWeights:
    """Puts an adapter on a model. InvalidAdapterError where it does not fit."""
    return LoraWeights(model, adapter)


def _trainable(factors: LoraFactors, device: torch.device) -> _Trainable:
    a_RD, b_FR = (nn.Parameter(f.detach().to(device, torch.float32, copy=True)) for f in (factors.a_RD, factors.b_FR))
    return _Trainable(a_RD, b_FR, factors.scaling)


def _add_delta(factors: _Trainable) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], y_BTF: Tensor) -> Tensor:
        return y_BTF + (inputs[0] @ factors.a_RD.T) @ (factors.b_FR.T * factors.scaling)

    return hook


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


def blank(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    alpha: float,
    rslora: bool = False,
    modules: Sequence[str] | None = None,
    seed: int = 0,
) -> Adapter:
    """An untrained adapter: A from PEFT's uniform distribution (bound 1/sqrt(D)), B zero.

    `shapes` is (out, in) by module path; `modules` are kinds such as "q_proj" (None: all of `shapes`).
    """
    chosen = [name for name in sorted(shapes) if modules is None or name.rsplit(".", 1)[-1] in modules]
    scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
    zeros = {n: LoraFactors(torch.zeros(rank, shapes[n][1]), torch.zeros(shapes[n][0], rank), scaling) for n in chosen}
    return blank_like(Adapter(factors=zeros, is_rslora=rslora), seed)


def blank_like(adapter: Adapter, seed: int) -> Adapter:
    """An untrained adapter with the modules, ranks and scalings of `adapter`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {name: _blank_factors(like, generator) for name, like in adapter.factors.items()}
    return Adapter(factors=factors, is_rslora=adapter.is_rslora, base_model=adapter.base_model)


def _blank_factors(like: LoraFactors, generator: torch.Generator) -> LoraFactors:
    a_RD = torch.empty_like(like.a_RD)
    nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator)
    return LoraFactors(a_RD, torch.zeros_like(like.b_FR), like.scaling)
