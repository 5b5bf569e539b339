"""LoRA adapters in PEFT's file format, read and written without importing PEFT.

An adapter adds `scaling * b_FR @ a_RD` to the weight of each module it adapts. A DoRA (arXiv 2402.09353) then scales
each row of the sum to the length that its magnitude gives. An embedding is a linear module whose input is one-hot: its
weight is its table transposed, so D is the vocabulary and F the width.
"""

import json
import math
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.adapters.config import CONFIG, check_kind, check_targets, config_of, rank_of, read_config, scaling_of
from cluster.adapters.tensors import PREFIX, sort_names
from cluster.errors import InvalidAdapterError, StorageError
from cluster.storage.checkpoints import Checkpoint

_WEIGHTS = "adapter_model.safetensors"
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
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

    `base_copies` holds tensors of the base that the files contain, by their name in the base, for `check_base_copies`.
    PEFT stores the embedding and the head in this way, also if they were not trained. They are never written.
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
            hint = _fusion_hint(module, shapes)
            raise InvalidAdapterError(
                f"The adapter changes module {module!r}, which the base model does not have.{hint}"
            )
        if factors.shape != tuple(shapes[module]):
            raise InvalidAdapterError(
                f"The adapter's module {module!r} has shape (out, in) = {factors.shape}, "
                f"but the base model's has {tuple(shapes[module])}."
            )


def _fusion_hint(module: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    """Return what to say if only one of the adapter and the base has fused projections, as Phi-3 has."""
    parent, _, kind = module.rpartition(".")
    for fused, split in _FUSED.items():
        if kind == fused and f"{parent}.{split[0]}" in shapes:
            return f" It has {', '.join(split)} instead: the adapter was trained on a model that fuses them."
        if kind in split and f"{parent}.{fused}" in shapes:
            return f" It has {fused} instead: the adapter was trained on a model that does not fuse {', '.join(split)}."
    return ""


def check_base(adapter: Adapter, base: Checkpoint) -> None:
    """Raise InvalidAdapterError unless the adapter fits a base's checkpoint and repeats its stored base tensors."""
    check_fits(adapter, base.adaptable_shapes())
    check_base_copies(adapter, base.weight)


def check_base_copies(adapter: Adapter, weight: Callable[[str], Tensor | None]) -> None:
    """Raise InvalidAdapterError if the files hold base tensors that differ from the base's own.

    `weight` returns the base's tensor of a name, or None. If a copy has another dtype than the base, the two may differ
    by the rounding to both dtypes.
    """
    for name, copy in adapter.base_copies.items():
        ours = weight(name)
        if ours is None:
            raise InvalidAdapterError(f"not supported: tensor {name!r}, which the base model does not have.")
        if not _is_copy(copy.to(ours.device), ours):
            raise InvalidAdapterError(
                f"not supported: {name!r} was retrained or resized beside the LoRA, because it differs from the base "
                "model's. It would need modules_to_save or a trained bias."
            )


def _is_copy(copy: Tensor, ours: Tensor) -> bool:
    is_same_dtype = copy.dtype == ours.dtype
    rtol = 0.0 if is_same_dtype else (torch.finfo(copy.dtype).eps + torch.finfo(ours.dtype).eps) / 2
    return copy.shape == ours.shape and torch.allclose(copy.float(), ours.float(), rtol=rtol, atol=rtol * 1e-4)


def _weights_file(folder: Path) -> Path:
    if (folder / _WEIGHTS).is_file():
        return folder / _WEIGHTS
    if (folder / _WEIGHTS).is_symlink():
        raise InvalidAdapterError(f"{_WEIGHTS} is a link to {(folder / _WEIGHTS).readlink()}, which does not exist.")
    if (folder / "adapter_model.bin").exists():
        raise InvalidAdapterError(
            f"adapter_model.bin is pickled, and pickled files can run code; save it as {_WEIGHTS}."
        )
    raise InvalidAdapterError(f"{_WEIGHTS} is missing.")


def _read_adapter(file: Path, config: Mapping[str, Any], max_rank: int | None) -> Adapter:
    try:
        with safe_open(file, framework="pt") as stored:
            names = sort_names(stored.keys(), is_dora=bool(config.get("use_dora")))
            check_targets(names.modules, config)
            for module, parts in names.modules.items():
                shapes = {part: tuple(stored.get_slice(name).get_shape()) for part, name in parts.items()}
                _check_shapes(module, shapes, rank_of(module, config), max_rank)
            factors = {
                module: _read_factors(stored, parts, scaling_of(module, config))
                for module, parts in names.modules.items()
            }
            copies = {tensor: _floating(stored.get_tensor(name), name) for tensor, name in names.base.items()}
    except (SafetensorError, OSError) as error:
        raise InvalidAdapterError(f"{_WEIGHTS} is truncated or not a safetensors file: {error}") from error
    base_model, task_type = str(config.get("base_model_name_or_path") or ""), config.get("task_type")
    return Adapter(factors, bool(config.get("use_rslora")), base_model, task_type, copies)


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
    parts = {part: _float32(stored.get_tensor(name), name) for part, name in names.items()}
    return LoraFactors(
        parts["A"].flatten(1),
        parts["B"].flatten(1),
        scaling,
        magnitude_F=parts.get("magnitude"),
        is_embedding="embedding" in names,
        kernel=tuple(parts["A"].shape[2:]),
    )


def _floating(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise InvalidAdapterError(f"tensor {name!r} has dtype {tensor.dtype}; only floating point is supported.")
    return tensor


def _float32(tensor: Tensor, name: str) -> Tensor:
    tensor = _floating(tensor, name).to(torch.float32)
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
        tensors |= {f"{PREFIX}{module}.{name}": t.detach().cpu().contiguous().clone() for name, t in stored.items()}
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
