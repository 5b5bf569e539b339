"""LoRA adapters in PEFT's file format, read and written without importing PEFT.

An adapter adds `scaling * b_FR @ a_RD` to the weight of each module it adapts. A DoRA (arXiv 2402.09353) then scales
each row of the sum to the length that its magnitude gives. An embedding is a linear module whose input is one-hot: its
weight is its table transposed, so D is the vocabulary and F the width.
"""

import json
import math
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.adapter_config import CONFIG, check_kind, config_of, rank_of, read_config, scaling_of
from cluster.errors import InvalidAdapterError, StorageError

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    re.escape(_PREFIX) + r"(?P<module>.+)\."
    r"(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<base>base_layer)\.weight)"
)
# Tensors that reveal an unsupported kind even if the configuration does not name it: (part of the name, the kind).
_UNSUPPORTED_TENSORS = (
    ("lora_B.bias", "lora_bias"),
    ("modules_to_save", "modules_to_save"),
    ("embed_tokens", "retrained embeddings"),
    ("lm_head", "a retrained lm_head"),
)
_NORM_ROWS = 1024  # rows whose norms are computed at once, to bound the extra memory for a vocabulary's weight


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The part of an adapter for one module: it adds `scaling * b_FR @ a_RD` to the weight. The rank is at least 1.

    With `magnitude_F` it is a DoRA: each row of the sum is then scaled so that its norm is the row's magnitude.
    `is_embedding` tells how the factors are stored; their meaning is the same (see the module). `kernel` is the window
    of a convolution, whose weight is flattened over it: D is the input channels times the size of the window.
    """

    a_RD: Tensor
    b_FR: Tensor
    scaling: float
    magnitude_F: Tensor | None = None
    is_embedding: bool = False
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.a_RD.ndim == self.b_FR.ndim == 2, "factors are matrices"
        assert self.a_RD.shape[0] == self.b_FR.shape[1] > 0, "both factors have the same rank, at least 1"
        assert self.magnitude_F is None or self.magnitude_F.shape == self.b_FR.shape[:1], "one magnitude per row"
        assert self.a_RD.shape[1] % math.prod(self.kernel) == 0, "the kernel divides the input"

    @property
    def rank(self) -> int:
        """The number of rows of A and columns of B."""
        return self.a_RD.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the module's weight."""
        return self.b_FR.shape[0], self.a_RD.shape[1]

    def delta(self) -> Tensor:
        """Return the matrix [F, D] that is added to the weight; for a DoRA, before the rows are scaled."""
        return self.scaling * (self.b_FR @ self.a_RD)

    def dora_factor(self, weight_FD: Tensor) -> Tensor:
        """Return a DoRA's factor for each row of `weight + delta`: magnitude / norm, float32 [F] on the CPU."""
        assert self.magnitude_F is not None, "not a DoRA"
        a_RD = self.scaling * self.a_RD.to(weight_FD.device)
        parts = zip(weight_FD.split(_NORM_ROWS), self.b_FR.to(weight_FD.device).split(_NORM_ROWS), strict=True)
        norms = [torch.linalg.vector_norm(weight.float() + b_FR @ a_RD, dim=1) for weight, b_FR in parts]
        return self.magnitude_F / torch.cat(norms).cpu()

    def adapted(self, weight_FD: Tensor) -> Tensor:
        """Return the module's weight with the adapter applied, float32 [F, D]."""
        adapted_FD = weight_FD.float() + self.delta()
        return adapted_FD if self.magnitude_F is None else self.dora_factor(weight_FD)[:, None] * adapted_FD


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: its factors by module path in the base model (`model.layers.0.self_attn.q_proj`), sorted.

    `task_type` is PEFT's name for the model's task, or None.

    PEFT stores a copy of the base's weight beside the factors of an embedding or a head. `base_copies` holds these
    copies as stored (an embedding's is its table) for `check_base_copies`. They are never written.
    """

    factors: dict[str, LoraFactors]
    is_rslora: bool = False
    base_model: str = ""
    task_type: str | None = "CAUSAL_LM"
    base_copies: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", dict(sorted(self.factors.items())))

    @property
    def max_rank(self) -> int:
        """The largest rank of any module; 0 for an adapter without modules."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def is_dora(self) -> bool:
        """Whether any module has DoRA magnitudes, so that `delta` is not the adapter's whole effect."""
        return any(factors.magnitude_F is not None for factors in self.factors.values())


def load_adapter(folder: Path, max_rank: int | None = None) -> Adapter:
    """Read a PEFT LoRA adapter as float32 CPU tensors.

    Raises InvalidAdapterError, with the folder and the cause, for a missing or corrupt file, pickled weights, an
    unsupported kind of adapter, NaN or infinite values, shapes that do not match each other or the configured rank, and
    a rank above `max_rank`. Ranks are checked before any data is read.
    """
    try:
        config = read_config(folder / CONFIG)
        check_kind(config)
        return _read_adapter(_weights_file(folder), config, max_rank)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"{folder}: {error}") from error


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter so that PEFT loads exactly these deltas; an older adapter in `folder` is replaced as a whole.

    Modules are named by their full path, so that PEFT adapts these layers and no others. Either all modules are DoRA or
    none is, because PEFT has one switch for all. Raises StorageError if the disk is full or the folder cannot be
    written; the older adapter is then untouched.
    """
    assert adapter.factors, "an adapter without modules cannot be saved"
    assert all((f.magnitude_F is None) != adapter.is_dora for f in adapter.factors.values()), "all DoRA or none"
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        aside.mkdir(parents=True)
        save_file(_tensors_of(adapter), aside / _WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(_config_of(adapter), indent=2) + "\n")
        _replace_folder(aside, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as SafetensorError
        raise StorageError(f"{folder}: the adapter cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InvalidAdapterError unless the base, with modules of these (out, in) shapes, has each adapted module."""
    for module, factors in adapter.factors.items():
        if module not in shapes:
            raise InvalidAdapterError(f"The adapter changes module {module!r}, which the base model does not have.")
        if factors.shape != tuple(shapes[module]):
            raise InvalidAdapterError(
                f"The adapter's module {module!r} has shape (out, in) = {factors.shape}, "
                f"but the base model's has {tuple(shapes[module])}."
            )


def check_base_copies(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Raise InvalidAdapterError if the files hold base weights that are not these (out, in): retrained or resized ones.

    If a copy has another dtype than the base, the two may differ by the rounding to both dtypes.
    """
    for module, copy in adapter.base_copies.items():
        ours = weights[module].T if adapter.factors[module].is_embedding else weights[module]
        is_same_dtype = copy.dtype == ours.dtype
        rtol = 0.0 if is_same_dtype else (torch.finfo(copy.dtype).eps + torch.finfo(ours.dtype).eps) / 2
        copy = copy.to(ours.device)
        if copy.shape != ours.shape or not torch.allclose(copy.float(), ours.float(), rtol=rtol, atol=rtol * 1e-4):
            raise InvalidAdapterError(
                f"not supported: {module!r} was retrained or resized in addition to its LoRA (its base_layer differs)."
            )


def _weights_file(folder: Path) -> Path:
    if (folder / _WEIGHTS).is_file():
        return folder / _WEIGHTS
    if (folder / "adapter_model.bin").exists():
        raise InvalidAdapterError(
            f"adapter_model.bin is pickled, and pickled files can run code; save it as {_WEIGHTS}."
        )
    raise InvalidAdapterError(f"{_WEIGHTS} is missing.")


def _read_adapter(file: Path, config: Mapping[str, Any], max_rank: int | None) -> Adapter:
    try:
        with safe_open(file, framework="pt") as stored:
            modules = _names_by_module(stored.keys(), bool(config.get("use_dora")))
            for module, names in modules.items():
                shapes = {part: tuple(stored.get_slice(name).get_shape()) for part, name in names.items()}
                _check_shapes(module, shapes, rank_of(module, config), max_rank)
            factors = {
                module: _read_factors(stored, names, scaling_of(module, config)) for module, names in modules.items()
            }
            copies = {m: stored.get_tensor(names["base"]) for m, names in modules.items() if "base" in names}
    except (SafetensorError, OSError) as error:
        raise InvalidAdapterError(f"{_WEIGHTS} is truncated or not a safetensors file: {error}") from error
    base_model, task_type = str(config.get("base_model_name_or_path") or ""), config.get("task_type")
    return Adapter(factors, bool(config.get("use_rslora")), base_model, task_type, copies)


def _names_by_module(names: Iterable[str], is_dora: bool) -> dict[str, dict[str, str]]:
    """Return the tensor names of each module by part; InvalidAdapterError for a name that PEFT does not write.

    The parts are A and B, `magnitude` for a DoRA, `base` for a copy of the base's weight, and `embedding` (again the
    name of A or B) for an embedding.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _TENSOR.fullmatch(name)
        if match is None:
            kind = next((kind for part, kind in _UNSUPPORTED_TENSORS if part in name), "a tensor of unknown meaning")
            raise InvalidAdapterError(f"not supported: {kind} (tensor {name!r}).")
        part = match["side"] or match["embedding"] or ("magnitude" if match["magnitude"] else "base")
        found.setdefault(match["module"], {})[part] = name
        if match["embedding"]:
            found[match["module"]]["embedding"] = name
    if not any("A" in parts for parts in found.values()):
        raise InvalidAdapterError(f"{_WEIGHTS} has no LoRA weights.")
    for module, parts in found.items():
        _check_parts(module, parts, is_dora)
    return found


def _check_parts(module: str, parts: Mapping[str, str], is_dora: bool) -> None:
    sides = [side for side in "AB" if side in parts]
    if not sides:
        raise InvalidAdapterError(
            f"not supported: {module!r} was retrained without LoRA (tensor {min(parts.values())!r})."
        )
    if len(sides) < 2:
        raise InvalidAdapterError(f"module {module!r} has lora_{sides[0]} without its counterpart.")
    if is_dora != ("magnitude" in parts):
        state = "without" if is_dora else "with"
        raise InvalidAdapterError(f"module {module!r} is {state} a DoRA magnitude; use_dora in {CONFIG} is {is_dora}.")


def _check_shapes(module: str, shapes: Mapping[str, tuple[int, ...]], rank: int, max_rank: int | None) -> None:
    a_shape, b_shape = shapes["A"], shapes["B"]
    is_pair = len(a_shape) == len(b_shape) >= 2 and a_shape[0] == b_shape[1] and set(b_shape[2:]) <= {1}
    if not is_pair or 0 in a_shape + b_shape:
        raise InvalidAdapterError(
            f"module {module!r}: lora_A of shape {a_shape} and lora_B of shape {b_shape} do not fit together."
        )
    if "magnitude" in shapes and shapes["magnitude"] != b_shape[:1]:
        raise InvalidAdapterError(
            f"module {module!r} has {b_shape[0]} outputs, but its DoRA magnitudes have shape {shapes['magnitude']}."
        )
    if a_shape[0] != rank:
        raise InvalidAdapterError(f"module {module!r} has rank {a_shape[0]}, but {CONFIG} says {rank}.")
    if max_rank is not None and rank > max_rank:
        raise InvalidAdapterError(f"module {module!r} has rank {rank}, above the limit of {max_rank}.")


def _read_factors(stored: Any, names: Mapping[str, str], scaling: float) -> LoraFactors:
    parts = {part: _float32(stored.get_tensor(names[part]), names[part]) for part in names if part != "base"}
    return LoraFactors(
        parts["A"].flatten(1),
        parts["B"].flatten(1),
        scaling,
        magnitude_F=parts.get("magnitude"),
        is_embedding="embedding" in names,
        kernel=tuple(parts["A"].shape[2:]),
    )


def _float32(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise InvalidAdapterError(f"tensor {name!r} has dtype {tensor.dtype}; only floating point is supported.")
    tensor = tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidAdapterError(f"tensor {name!r} has NaN or infinite values.")
    return tensor


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        kind, suffix = ("lora_embedding_", "") if factors.is_embedding else ("lora_", ".weight")
        stored = {
            f"{kind}A{suffix}": factors.a_RD.reshape(factors.rank, -1, *factors.kernel),
            f"{kind}B{suffix}": factors.b_FR.reshape(-1, factors.rank, *(1,) * len(factors.kernel)),
        }
        if factors.magnitude_F is not None:
            stored["lora_magnitude_vector"] = factors.magnitude_F
        tensors |= {f"{_PREFIX}{module}.{name}": t.detach().cpu().contiguous().clone() for name, t in stored.items()}
    return tensors


def _config_of(adapter: Adapter) -> dict[str, Any]:
    about = {"peft_type": "LORA", "task_type": adapter.task_type, "base_model_name_or_path": adapter.base_model}
    layout = {module: (factors.rank, factors.scaling) for module, factors in adapter.factors.items()}
    return about | config_of(layout, is_rslora=adapter.is_rslora, is_dora=adapter.is_dora)


def _replace_folder(aside: Path, folder: Path) -> None:
    """Move `aside` to `folder`, which may hold an older adapter; both have the same parent."""
    old = aside.with_name(f"{aside.name}.old")
    has_older = folder.exists()
    if has_older:
        folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        if has_older:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
