"""The tensor names of PEFT's adapter files: the module and the part that each tensor stands for.

PEFT writes `base_model.model.MODULE.lora_A.weight`. Other programs drop the prefix, or keep the name that the adapter
had in training: `MODULE.lora_A.default.weight`. A file may also hold tensors of the base under their own names, such as
an embedding that was saved with the adapter.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.errors import InvalidAdapterError

PREFIX = "base_model.model."
_FACTOR = re.compile(
    rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\."
    r"(?:lora_(?P<side>[AB])(?:\.(?P<linear>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<table>[^.]+))?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.(?:(?P<dora>[^.]+)\.)?weight)?)"
)
_BASE_TENSOR = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<module>.+?)(?:\.base_layer)?\.(?P<kind>weight|bias)")
# Tensors that reveal an unsupported kind even if the configuration does not name it: (pattern, name for messages).
_UNSUPPORTED = (
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "lora_bias"),
    (r"\.modules_to_save\.|\.original_module\.", "modules_to_save"),
    (r"trainable_tokens_", "trainable tokens (trainable_token_indices)"),
    (r"\.lora_diag", "KaSA"),
    (r"\.lora_velora_", "VeLoRA"),
    (r"\.base_layer\..*lora_", "target_parameters"),
)


@dataclass(frozen=True)
class TensorNames:
    """The names of a file's tensors.

    `modules` has them by module and part. The parts are A and B, `magnitude` for a DoRA, and `embedding` (again the
    name of A or B) for an embedding. `base` has the names of stored base tensors by their name in the base.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)


def sort_names(names: Iterable[str], *, is_dora: bool) -> TensorNames:
    """Sort a file's tensor names. InvalidAdapterError for unknown or contradictory names and for a missing factor."""
    found, adapters = TensorNames(), set()
    for name in names:
        _check_kind(name)
        match = _FACTOR.fullmatch(name)
        if match is None:
            _add_base_tensor(found, name)
            continue
        adapters.add(match["linear"] or match["table"] or match["dora"] or "")
        _add(found.modules.setdefault(match["module"], {}), _part(match), name)
        if match["embedding"]:
            found.modules[match["module"]]["embedding"] = name
    if len(adapters) > 1:
        listed = ", ".join(repr(adapter or "(unnamed)") for adapter in sorted(adapters))
        raise InvalidAdapterError(f"the file holds several adapters: {listed}. Save one adapter per folder.")
    if not adapters:
        raise InvalidAdapterError("the file has no LoRA weights.")
    for module, parts in found.modules.items():
        _check_parts(module, parts, is_dora)
    return found


def _check_kind(name: str) -> None:
    kind = next((kind for pattern, kind in _UNSUPPORTED if re.search(pattern, name)), None)
    if kind is not None:
        raise InvalidAdapterError(f"not supported: {kind} (tensor {name!r}).")


def _part(match: re.Match[str]) -> str:
    return match["side"] or match["embedding"] or "magnitude"


def _add(known: dict[str, str], key: str, name: str) -> None:
    if key in known:
        raise InvalidAdapterError(f"tensors {known[key]!r} and {name!r} are the same part of the adapter.")
    known[key] = name


def _add_base_tensor(found: TensorNames, name: str) -> None:
    match = _BASE_TENSOR.fullmatch(name)
    if match is None or "lora_" in name:
        raise InvalidAdapterError(f"not supported: a tensor of unknown meaning (tensor {name!r}).")
    _add(found.base, f"{match['module']}.{match['kind']}", name)


def _check_parts(module: str, parts: Mapping[str, str], is_dora: bool) -> None:
    sides = [side for side in "AB" if side in parts]
    if len(sides) < 2:
        has = f"lora_{sides[0]}" if sides else "a DoRA magnitude"
        raise InvalidAdapterError(f"module {module!r} has {has} without its counterpart.")
    if is_dora != ("magnitude" in parts):
        state = "without" if is_dora else "with"
        raise InvalidAdapterError(f"module {module!r} is {state} a DoRA magnitude, but use_dora is {is_dora}.")
