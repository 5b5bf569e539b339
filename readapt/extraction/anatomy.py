"""Finds the tensors of a checkpoint that a LoRA adapter can change, and the module that each belongs to.

The model class itself answers: it is built without weights on torch's meta device. If transformers does not know the
class, names and shapes decide. Nothing here assumes a language model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from cluster.storage.checkpoints import Checkpoint

_EMBEDDING_NAME = re.compile(r"(?:.*[._])?(?:embed|embeds|embedding|embeddings|embed_tokens|embed_positions|wte|wpe)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Kind(StrEnum):
    """How a module uses its weight. PEFT lays out the factors of each kind differently."""

    LINEAR = "linear"
    TRANSPOSED = "transposed linear"  # `Conv1D` of transformers, as in GPT-2: its weight is (in, out)
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Place:
    """A module whose weight an adapter can change."""

    module: str
    kind: Kind


@dataclass(frozen=True)
class Anatomy:
    """What a model class says about its tensors. Keys are the names that the class uses (see `path`).

    `places` has every weight that an adapter can change. `refused` says why an adapter cannot change the others.
    `tied` maps each tied parameter to the parameter that it shares. `modules` are all module paths.
    """

    architecture: str
    places: Mapping[str, Place]
    refused: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()

    def path(self, name: str) -> str:
        """Return the class's name for a stored tensor."""
        return self.paths.get(name, name)

    def tied_places(self, path: str) -> list[Place]:
        """Return the other modules that use the same weight."""
        return [self.places[target] for target, source in self.tied.items() if source == path and target in self.places]


def anatomy_of(*checkpoints: Checkpoint) -> Anatomy:
    """Return the anatomy of the first checkpoint's model class, for the tensor names of all checkpoints.

    Names and shapes decide if transformers does not know the class.
    """
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
    """Return the model without weights, or None if transformers does not know it. Remote code never runs."""
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
        return None  # the class needs another package, or computes while it is built


def _place(module: str, layer: nn.Module) -> Place | str | None:
    """Return the place of the layer's weight, the reason why PEFT cannot change it, or None for other layers."""
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
        return "it is a grouped convolution, whose adapter would be larger than its weight"
    if set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        return "it is a convolution with dilation or non-zero padding, which PEFT ignores in its factors"
    return Place(module, Kind.CONVOLUTION)


def _paths(model: Any, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the class's names of renamed tensors, and the reasons why fused tensors cannot be paired."""
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
            fused[name] = "the model class fuses it into a larger tensor"
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
