"""Which tensors of a checkpoint are matrices that a LoRA adapter can change, and in which module of which kind.

The answer comes from the model's own class, built without weights on torch's meta device. For a checkpoint of no known
class it comes from names and shapes, as well as it can. Nothing assumes a language model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from cluster.checkpoints import Checkpoint

_EMBEDDING_NAME = re.compile(r"(?:.*[._])?(?:embed|embeds|embedding|embeddings|embed_tokens|embed_positions|wte|wpe)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Kind(StrEnum):
    """How a module uses its weight; PEFT lays out the factors of each kind in a way of its own."""

    LINEAR = "linear"
    TRANSPOSED = "transposed linear"  # the `Conv1D` of transformers, as in GPT-2: its weight is (in, out)
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Place:
    """A module whose weight an adapter can change."""

    module: str
    kind: Kind


@dataclass(frozen=True)
class Anatomy:
    """What a model class says about its tensors, by the names that the class itself uses (`path` gives them).

    `places` has every weight that an adapter can carry, `refused` the reason for weights of modules that it cannot,
    and `tied` the target -> source pairs of parameters that are one and the same. `modules` are all module paths.
    """

    architecture: str
    places: Mapping[str, Place]
    refused: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()

    def path(self, name: str) -> str:
        """The class's own name of a tensor of the checkpoint, where the two differ."""
        return self.paths.get(name, name)

    def tied_places(self, path: str) -> list[Place]:
        """The other modules that use the same weight."""
        return [self.places[target] for target, source in self.tied.items() if source == path and target in self.places]


def anatomy_of(*checkpoints: Checkpoint) -> Anatomy:
    """The anatomy of the first checkpoint's model class, for the tensor names of all; by names where it has none."""
    names = sorted({name for checkpoint in checkpoints for name in checkpoint.names()})
    model = _skeleton(checkpoints[0].config)
    if model is None:
        return _by_names(names, {n: c.shape(n) for c in reversed(checkpoints) for n in c.names()})
    places, refused = {}, {}
    for module, layer in model.named_modules():
        found = _place(module, layer)
        if isinstance(found, Place):
            places[f"{module}.weight"] = found
        elif found:
            refused[f"{module}.weight"] = found
    paths, fused = _paths(model, names)
    modules = frozenset(module for module, _ in model.named_modules() if module)
    return Anatomy(type(model).__name__, places, refused | fused, dict(model.all_tied_weights_keys), paths, modules)


def _skeleton(config: Mapping[str, Any]) -> Any | None:
    """The model without weights, or None where transformers does not know it; remote code is never run."""
    import transformers

    architecture = next(iter(config.get("architectures") or []), "")
    model_class = getattr(transformers, str(architecture), None)
    if not config.get("model_type") or model_class is None:
        return None
    try:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        with torch.device("meta"):
            return model_class(transformers.AutoConfig.for_model(config["model_type"], **settings))
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError):
        return None  # a class that needs more than transformers, or does more than declare its layers


def _place(module: str, layer: nn.Module) -> Place | str | None:
    """Where the layer's weight can be changed; a sentence if PEFT cannot; None for a layer of another kind."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Linear):
        return Place(module, Kind.LINEAR)
    if isinstance(layer, Conv1D):
        return Place(module, Kind.TRANSPOSED)
    if isinstance(layer, nn.Embedding):
        return Place(module, Kind.EMBEDDING)
    if not isinstance(layer, _CONVOLUTIONS):
        return None
    if layer.groups > 1:
        return "a grouped convolution, whose adapter would be larger than its weight"
    if set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        return "a convolution with dilation or padding of another kind than zeros, which PEFT leaves out of its factors"
    return Place(module, Kind.CONVOLUTION)


def _paths(model: Any, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The class's names of the tensors where they differ, and a reason for those that the class fuses with others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    paths, fused = {}, {}
    for name in names:
        path, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converter is not None:
            fused[name] = "it is one part of a larger tensor of the model class"
        elif path != name and path in known and name not in known:
            paths[name] = path
    return paths, fused


def _by_names(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    weights = [name for name in names if name.endswith(".weight") and 2 <= len(shapes[name]) <= 5]
    places = {name: Place(name.removesuffix(".weight"), _kind_by_name(name, len(shapes[name]))) for name in weights}
    modules = frozenset(name.rsplit(".", 1)[0] for name in names if "." in name)
    return Anatomy("", places, modules=modules)


def _kind_by_name(name: str, num_dims: int) -> Kind:
    if num_dims > 2:
        return Kind.CONVOLUTION
    return Kind.EMBEDDING if _EMBEDDING_NAME.fullmatch(name.removesuffix(".weight")) else Kind.LINEAR
