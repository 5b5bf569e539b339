"""LoRA on a Hugging Face model: trainable factors beside frozen linears. The model's own weights stay as they are."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from cluster.adapters.files import Adapter, LoraFactors, check_fits
from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import open_checkpoint
from readapt.training.causal_lm import CausalLM
from readapt.training.lora_stack import ALL_ROWS, LoraHooks, LoraStack, Segment, values_of


def load_base(folder: Path, device: str | torch.device = "cpu") -> CausalLM:
    """Load a checkpoint as a frozen float32 Hugging Face causal LM in eval mode.

    Of its generation settings only the end tokens are kept. Many checkpoints set others, such as a repetition penalty,
    but the engine uses only those of the request: with them, transformers' answers would differ from the engine's.
    InvalidCheckpointError if the folder is not a complete checkpoint: transformers would make up missing weights.
    """
    open_checkpoint(folder)
    model = _from_pretrained(folder).to(device)
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.requires_grad_(False).eval()


def _from_pretrained(folder: Path) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidCheckpointError(f"{folder}: transformers cannot load it: {error!r}") from error
    faults = [f"{name!r} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name!r} has shape {tuple(has)}, not {tuple(wants)}" for name, has, wants in report["mismatched_keys"]]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise InvalidCheckpointError(f"{folder}: the weights do not fit config.json: tensor {faults[0]}{more}.")
    return model


def linear_shapes(model: CausalLM) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear in the model's layers, by module path. The head is left out."""
    modules = model.named_modules()
    return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear) and ".layers." in n}


def row_norms(model: CausalLM, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return the norm [F] of each weight row of these linears, on the CPU: the magnitudes of an untrained DoRA."""
    return {n: torch.linalg.vector_norm(model.get_submodule(n).weight.detach().float(), dim=1).cpu() for n in modules}


class LoraWeights:
    """The trainable factors of one adapter on a model, from `attach` until `detach`."""

    def __init__(self, model: CausalLM, adapter: Adapter):
        self._model = model
        self._hooks = LoraHooks(model)
        self.load(adapter)

    def load(self, adapter: Adapter) -> None:
        """Replace the adapter by another, whose modules and ranks may differ. `parameters` are then new tensors.

        InvalidAdapterError if the adapter does not fit the model.
        """
        check_fits(adapter, linear_shapes(self._model))
        self._stack = LoraStack([adapter], values_of(adapter)[None].to(self._model.device))
        self._hooks.segments = (Segment(self._stack, ALL_ROWS),)
        self._hooks.set_modules(adapter.factors)

    @property
    def modules(self) -> list[str]:
        """The paths of the adapted modules, in order."""
        return list(self._stack.factors)

    def parameters(self) -> list[Tensor]:
        """Return every A [1, R, D], every B transposed [1, R, F], every magnitude [1, F], in order of `modules`."""
        return self._stack.parameters()

    def export(self) -> Adapter:
        """Return a copy of the present factors as an adapter on the CPU."""
        return self._stack.adapter(0)

    def detach(self) -> None:
        """Take the adapter off the model, which then computes what the bare base computes."""
        self._hooks.set_modules(())


def attach(model: CausalLM, adapter: Adapter) -> LoraWeights:
    """Put an adapter on a model. InvalidAdapterError if it does not fit."""
    return LoraWeights(model, adapter)


@contextmanager
def attached(model: CausalLM, adapter: Adapter) -> Iterator[LoraWeights]:
    """Put an adapter on a bare model inside the block. The model is bare again afterwards, even after an error."""
    lora = attach(model, adapter)
    try:
        yield lora
    finally:
        lora.detach()


def blank(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    alpha: float,
    rslora: bool = False,
    modules: Sequence[str] | None = None,
    seed: int = 0,
    norms: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Return an untrained adapter: A from PEFT's uniform distribution (bound 1/sqrt(D)), B zero.

    `shapes` is (out, in) by module path. `modules` are kinds such as "q_proj" (None: all of `shapes`). With `norms`,
    the `row_norms` of the base, the adapter is DoRA.
    """
    chosen = [name for name in sorted(shapes) if modules is None or name.rsplit(".", 1)[-1] in modules]
    scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
    magnitudes = {name: norms[name] if norms else None for name in chosen}
    factors = {
        name: LoraFactors(torch.zeros(rank, num_in), torch.zeros(num_out, rank), scaling, magnitudes[name])
        for name, (num_out, num_in) in ((name, shapes[name]) for name in chosen)
    }
    return blank_like(Adapter(factors=factors, is_rslora=rslora), seed, norms)


def blank_like(adapter: Adapter, seed: int, norms: Mapping[str, Tensor] | None = None) -> Adapter:
    """Return an untrained adapter with the modules, ranks, scalings and kind of `adapter`.

    DoRA needs `norms`, the `row_norms` of the base that the adapter is for; they are its magnitudes.
    """
    assert norms is not None or not adapter.is_dora, "DoRA starts from the norms of its base"
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: replace(
            like,
            a_RD=_uniform(like.a_RD, generator),
            b_FR=torch.zeros_like(like.b_FR),
            magnitude_F=norms[name].clone() if norms and like.magnitude_F is not None else None,
        )
        for name, like in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def _uniform(like_RD: Tensor, generator: torch.Generator) -> Tensor:
    a_RD = torch.empty_like(like_RD)
    nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator)
    return a_RD
