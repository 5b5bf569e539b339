"""LoRA on a Hugging Face model: trainable factors beside frozen linears, without touching the model's own weights.

Shape letters: D in, F out, R rank.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from cluster.adapter_files import Adapter, LoraFactors, check_fits
from cluster.checkpoints import open_checkpoint
from readapt.training.causal_lm import CausalLM
from readapt.training.lora_stack import ALL_ROWS, LoraHooks, LoraStack, Segment, flatten


def load_base(folder: Path, device: str | torch.device = "cpu") -> CausalLM:
    """Loads a checkpoint as a frozen float32 Hugging Face causal LM in eval mode.

    Of its generation settings only the stop tokens are kept: a repetition penalty, say, which many checkpoints come
    with, would bend greedy decoding away from what an engine answers, for whom only the request's own settings count.
    InvalidCheckpointError where the folder is no complete checkpoint.
    """
    open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.requires_grad_(False).eval()


def linear_shapes(model: CausalLM) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear inside the model's layers, by module path; the head is not among them."""
    modules = model.named_modules()
    return {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, nn.Linear) and ".layers." in n}


def row_norms(model: CausalLM, modules: Iterable[str]) -> dict[str, Tensor]:
    """Norm [F] of each row of these linears' weights, on the CPU: the magnitudes of a DoRA that adds nothing."""
    return {n: torch.linalg.vector_norm(model.get_submodule(n).weight.detach().float(), dim=1).cpu() for n in modules}


class LoraWeights:
    """Owner of the trainable factors of one adapter on one model; made by `attach`, undone by `detach`."""

    def __init__(self, model: CausalLM, adapter: Adapter):
        self._model = model
        self._hooks = LoraHooks(model)
        self.load(adapter)

    def load(self, adapter: Adapter) -> None:
        """Puts another adapter in place of the present one; modules and ranks may differ. Parameters are new ones.

        InvalidAdapterError where the adapter does not fit the model.
        """
        check_fits(adapter, linear_shapes(self._model))
        self._stack = LoraStack([adapter], flatten(adapter)[None].to(self._model.device))
        self._hooks.segments = (Segment(self._stack, ALL_ROWS),)
        self._hooks.cover(adapter.factors)

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, in order."""
        return list(self._stack.factors)

    def parameters(self) -> list[Tensor]:
        """Every A [1, R, D], every B transposed [1, R, F], every magnitude of DoRA [1, F]; in order of `modules`."""
        return self._stack.parameters()

    def export(self) -> Adapter:
        """A copy of the present factors as an adapter on the CPU."""
        return self._stack.adapter(0)

    def detach(self) -> None:
        """Takes the adapter off the model, which then computes what the bare base computes."""
        self._hooks.cover(())


def attach(model: CausalLM, adapter: Adapter) -> LoraWeights:
    """Puts an adapter on a model. InvalidAdapterError where it does not fit."""
    return LoraWeights(model, adapter)


@contextmanager
def attached(model: CausalLM, adapter: Adapter) -> Iterator[LoraWeights]:
    """An adapter on a bare model for as long as the block lasts; the model is bare again afterwards, come what may."""
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
    """An untrained adapter: A from PEFT's uniform distribution (bound 1/sqrt(D)), B zero.

    `shapes` is (out, in) by module path; `modules` are kinds such as "q_proj" (None: all of `shapes`). With `norms`,
    the `row_norms` of the base, it is DoRA.
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
    """An untrained adapter with the modules, ranks, scalings and kind of `adapter`.

    Of DoRA the magnitudes are `norms`, the `row_norms` of the base that it is for; required then.
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
