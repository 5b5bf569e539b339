"""The base model's evolution E = W2 - W1 as a low-rank adapter, computed tensor by tensor.

It is computed once per base update and shared by all adapters of the fleet.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.adapters.files import Adapter, LoraFactors
from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import Checkpoint
from readapt.lowrank.spectra import EnergyShare
from readapt.lowrank.svd import decompose, squared_norm

# The keys of config.json for a model's shape. The heads can change while every matrix keeps its size.
SHAPE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
MAX_NAMED = 4  # modules in an error message: a list of 80 layers does not help
ADVICE = "train them from scratch on the new base, or distil the old service into new adapters"


@dataclass(frozen=True)
class ModuleEnergy:
    """How much one module changed, and how much of the change is kept.

    `energy` is the share of the squared Frobenius norm of E that the kept rank holds (1 if E is zero).
    `relative_norm` is |E| / |W1|. Rank 0 means that the weight is the same in both versions.
    """

    module: str
    rank: int
    energy: float
    relative_norm: float


def base_evolution(
    old: Checkpoint, new: Checkpoint, rank: int, energy: float, modules: Collection[str] | None = None
) -> tuple[Adapter, list[ModuleEnergy]]:
    """Return the truncated SVD of W2 - W1 of each linear module: the smallest rank that holds `energy`, at most `rank`.

    Factors are balanced (A = sqrt(S) V^T, B = U sqrt(S), scaling 1). Unchanged modules are absent from the adapter.
    `modules` are kinds such as "q_proj" (None: all). Deterministic. Memory: a few times the largest matrix.
    InvalidCheckpointError if the two have different modules or shapes, or a weight is not finite.
    """
    factors = {}
    report = []
    check_same_shape(old, new)
    for module in (m for m in sorted(linears(old)) if modules is None or m.rsplit(".", 1)[-1] in modules):
        w_FD = _weight(old, module)
        e_FD = _weight(new, module) - w_FD
        found, module_energy = _truncate(e_FD, rank, energy)
        if found is not None:
            factors[module] = found
        found_rank = 0 if found is None else found.rank
        report.append(
            ModuleEnergy(module, found_rank, module_energy, float(e_FD.norm() / w_FD.norm().clamp(min=1e-30)))
        )
    return Adapter(factors=factors, base_model=str(new.folder)), report


def cosine(old_model: nn.Module, new_model: nn.Module, modules: Collection[str]) -> float:
    """Return the cosine between all of W1 and all of W2 in these linears of two loaded models.

    It is near 1 after an ordinary update, well above 0 after a severe one, and 0 between independently trained models:
    their units are unrelated, even if the shapes are equal.
    """
    pairs = [(old_model.get_submodule(name).weight, new_model.get_submodule(name).weight) for name in modules]
    inner = sum(float((old.detach() * new.detach()).sum(dtype=torch.float64)) for old, new in pairs)
    norms = [math.sqrt(sum(squared_norm(weight.detach()) for weight in side)) for side in zip(*pairs, strict=True)]
    return inner / math.prod(norms) if all(norms) else 0.0


def check_same_shape(old: Checkpoint, new: Checkpoint) -> None:
    """Raise InvalidCheckpointError unless depth, width and heads are equal, both in the configs and in the weights.

    Only shapes are read. The vocabularies may differ: embeddings and head are not linear modules of a layer.
    """
    said = [
        key for key in SHAPE_KEYS if key in old.config and key in new.config
    ]  # a key that is left out follows from the others
    before, after = ({**{key: c.config[key] for key in said}, **linears(c)} for c in (old, new))
    differing = [key for key in (*said, *sorted(linears(old) | linears(new))) if before.get(key) != after.get(key)]
    if differing:
        raise InvalidCheckpointError(
            f"{new.folder} has another shape than {old.folder}: {_named(after, differing)}, "
            f"instead of {_named(before, differing)}. Adapters cannot be carried over: {ADVICE}."
        )


def linears(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return the checkpoint's `linear_shapes`. InvalidCheckpointError if there are none."""
    shapes = checkpoint.linear_shapes()
    if not shapes:
        raise InvalidCheckpointError(f"{checkpoint.folder}: has no linear modules that ReLoRA knows")
    return shapes


def _named(shape: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {shape.get(key, 'none')}" for key in keys[:MAX_NAMED])


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise InvalidCheckpointError with the first tensor that has a NaN or an infinity, if there is one."""
    for name in checkpoint.names():
        if not torch.isfinite(checkpoint.load(name)).all():
            raise InvalidCheckpointError(f"{checkpoint.folder}: {name} has values that are not finite")


def _weight(checkpoint: Checkpoint, module: str) -> Tensor:
    weight_FD = checkpoint.load(f"{module}.weight").float()
    if not torch.isfinite(weight_FD).all():
        raise InvalidCheckpointError(f"{checkpoint.folder}: {module}.weight has values that are not finite")
    return weight_FD


def _truncate(e_FD: Tensor, max_rank: int, energy: float) -> tuple[LoraFactors | None, float]:
    if squared_norm(e_FD) == 0.0:
        return None, 1.0
    found = decompose(e_FD, max_rank)
    rank = EnergyShare(energy).rank(found.spectrum())
    a_RD, b_FR = found.factors(rank)
    return LoraFactors(a_RD.contiguous(), b_FR.contiguous(), 1.0), found.spectrum().energy(rank)
