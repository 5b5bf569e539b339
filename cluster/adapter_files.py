"""LoRA adapters in PEFT's file format, read and written without importing PEFT.

Shape letters: R rank, D in, F out. An adapter adds `scaling * b_FR @ a_RD` to the weight of each module it adapts.
The scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (rank-stabilised LoRA, arXiv 2312.03732);
`rank_pattern` and `alpha_pattern` override `r` and `lora_alpha` for the modules that their keys match.
"""

import json
import math
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.errors import InvalidAdapterError, StorageError

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that make an adapter more than `scaling * B @ A` on linear modules: (key, what to call it).
_UNSUPPORTED_SETTINGS = (
    ("use_dora", "DoRA"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("lora_bias", "lora_bias"),
    ("modules_to_save", "modules_to_save"),
    ("trainable_token_indices", "trainable tokens (trainable_token_indices)"),
    ("target_parameters", "target_parameters"),
    ("layer_replication", "layer_replication"),
    ("alora_invocation_tokens", "activated LoRA (alora_invocation_tokens)"),
    ("arrow_config", "Arrow"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
)
# Initialisations that also change the base's weights: the files alone do not say what the adapter adds to the base.
_UNSUPPORTED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Tensors by which an unsupported kind shows even when its configuration keeps silent: (part of the name, the kind).
_UNSUPPORTED_TENSORS = (
    ("lora_embedding_", "LoRA of embeddings"),
    ("lora_magnitude_vector", "DoRA"),
    ("lora_B.bias", "lora_bias"),
    ("modules_to_save", "modules_to_save"),
    ("embed_tokens", "retrained embeddings"),
    ("lm_head", "a retrained lm_head"),
)


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """What an adapter adds to one linear module: `scaling * b_FR @ a_RD`. The rank is at least 1."""

    a_RD: Tensor
    b_FR: Tensor
    scaling: float

    def __post_init__(self) -> None:
        assert self.a_RD.ndim == self.b_FR.ndim == 2, "factors are matrices"
        assert self.a_RD.shape[0] == self.b_FR.shape[1] > 0, "both factors have the same rank, at least 1"

    @property
    def rank(self) -> int:
        """The number of rows of A and of columns of B."""
        return self.a_RD.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight that this adds to."""
        return self.b_FR.shape[0], self.a_RD.shape[1]

    def delta(self) -> Tensor:
        """Return the full matrix that is added to the weight, F x D."""
        return self.scaling * (self.b_FR @ self.a_RD)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: factors by base-model module path (`model.layers.0.self_attn.q_proj`), in sorted order."""

    factors: dict[str, LoraFactors]
    is_rslora: bool = False
    base_model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", dict(sorted(self.factors.items())))

    @property
    def max_rank(self) -> int:
        """The largest rank of any module; 0 for an adapter without modules."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """The number of stored values in all factors."""
        return sum(factors.a_RD.numel() + factors.b_FR.numel() for factors in self.factors.values())


def load_adapter(folder: Path, max_rank: int | None = None) -> Adapter:
    """Read a PEFT LoRA adapter as float32 CPU tensors.

    Every fault of the files is an InvalidAdapterError that names the folder and the cause: a missing or corrupt file,
    pickled weights, a kind of adapter that is more than LoRA on linear modules, NaN or infinite values, factors whose
    shapes do not fit together or the configured rank, a rank above `max_rank`. Ranks are checked before data is read.
    """
    try:
        config = _read_config(folder / _CONFIG)
        _check_kind(config)
        return _read_adapter(_weights_file(folder), config, max_rank)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"{folder}: {error}") from error


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter so that PEFT loads exactly these deltas; an adapter that was in `folder` is replaced whole.

    Modules are named by full path, so that PEFT adapts the given layers and no others. StorageError when the disk is
    full or the folder cannot be written; what was there is then untouched.
    """
    assert adapter.factors, "an adapter without modules cannot be saved"
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        aside.mkdir(parents=True)
        save_file(_tensors_of(adapter), aside / _WEIGHTS, metadata={"format": "pt"})
        (aside / _CONFIG).write_text(json.dumps(_config_of(adapter), indent=2) + "\n")
        _replace_folder(aside, folder)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
        raise StorageError(f"{folder}: the adapter cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InvalidAdapterError unless each adapted module exists in a base of these (out, in) shapes and fits it."""
    for module, factors in adapter.factors.items():
        if module not in shapes:
            raise InvalidAdapterError(f"The adapter changes module {module!r}, which the base model does not have.")
        if factors.shape != tuple(shapes[module]):
            raise InvalidAdapterError(
                f"The adapter's module {module!r} has shape (out, in) = {factors.shape}; "
                f"the base model's has {tuple(shapes[module])}."
            )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InvalidAdapterError(f"{_CONFIG} is missing.") from error
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{_CONFIG} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapterError(f"{_CONFIG} is not a JSON object.")
    return config


def _check_kind(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InvalidAdapterError(f"adapters of peft_type {config.get('peft_type')!r} are not supported, only 'LORA'.")
    kinds = [kind for key, kind in _UNSUPPORTED_SETTINGS if config.get(key)]
    if (config.get("bias") or "none") != "none":
        kinds.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_UNSUPPORTED_STARTS):
        kinds.append(f"init_lora_weights={start!r} that was not converted to plain LoRA")
    if kinds:
        raise InvalidAdapterError(f"not supported: {', '.join(kinds)}; only LoRA on linear modules is.")


def _weights_file(folder: Path) -> Path:
    if (folder / _WEIGHTS).is_file():
        return folder / _WEIGHTS
    if (folder / "adapter_model.bin").exists():
        raise InvalidAdapterError(f"adapter_model.bin is pickled, which can run code; save it as {_WEIGHTS}.")
    raise InvalidAdapterError(f"{_WEIGHTS} is missing.")


def _read_adapter(file: Path, config: Mapping[str, Any], max_rank: int | None) -> Adapter:
    try:
        with safe_open(file, framework="pt") as stored:
            pairs = _pair_up(stored.keys())
            for module, names in pairs.items():
                shapes = [tuple(stored.get_slice(name).get_shape()) for name in names]
                _check_shapes(module, shapes[0], shapes[1], _rank_of(module, config), max_rank)
            factors = {
                module: LoraFactors(
                    _float32(stored.get_tensor(a_name), a_name),
                    _float32(stored.get_tensor(b_name), b_name),
                    _scaling_of(module, config),
                )
                for module, (a_name, b_name) in pairs.items()
            }
    except (SafetensorError, OSError) as error:
        raise InvalidAdapterError(f"{_WEIGHTS} is truncated or not a safetensors file: {error}") from error
    return Adapter(factors, bool(config.get("use_rslora")), str(config.get("base_model_name_or_path") or ""))


def _pair_up(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """From tensor names to (name of A, name of B) by module; a name of any other form is an error."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _TENSOR.fullmatch(name)
        if match is None:
            kind = next((kind for part, kind in _UNSUPPORTED_TENSORS if part in name), "a tensor of unknown meaning")
            raise InvalidAdapterError(f"not supported: {kind} (tensor {name!r}).")
        found.setdefault(match["module"], {})[match["side"]] = name
    for module, sides in found.items():
        if len(sides) < 2:
            raise InvalidAdapterError(f"module {module!r} has lora_{next(iter(sides))} without its counterpart.")
    if not found:
        raise InvalidAdapterError(f"{_WEIGHTS} holds no LoRA weights.")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


def _check_shapes(
    module: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...], rank: int, max_rank: int | None
) -> None:
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or 0 in a_shape + b_shape:
        raise InvalidAdapterError(
            f"module {module!r}: lora_A of shape {a_shape} and lora_B of shape {b_shape} do not make a product."
        )
    if a_shape[0] != rank:
        raise InvalidAdapterError(f"module {module!r} has rank {a_shape[0]}, but {_CONFIG} says {rank}.")
    if max_rank is not None and rank > max_rank:
        raise InvalidAdapterError(f"module {module!r} has rank {rank}, above the limit of {max_rank}.")


def _float32(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise InvalidAdapterError(f"tensor {name!r} has dtype {tensor.dtype}; only floating point is supported.")
    tensor = tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidAdapterError(f"tensor {name!r} has NaN or infinite values.")
    return tensor


def _rank_of(module: str, config: Mapping[str, Any]) -> int:
    rank = _setting("r", "rank_pattern", 8, module, config)
    if rank < 1 or rank != int(rank):
        raise InvalidAdapterError(f"{_CONFIG}: the rank of {module!r} is {rank}; expected a whole number above 0.")
    return int(rank)


def _scaling_of(module: str, config: Mapping[str, Any]) -> float:
    alpha = _setting("lora_alpha", "alpha_pattern", 8, module, config)
    return alpha / _scaling_divisor(_rank_of(module, config), bool(config.get("use_rslora")))


def _scaling_divisor(rank: int, is_rslora: bool) -> float:
    return math.sqrt(rank) if is_rslora else rank


def _setting(key: str, pattern_key: str, default: float, module: str, config: Mapping[str, Any]) -> float:
    """The number that PEFT uses for a module: that of the first pattern which matches the end of its path, or `key`."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise InvalidAdapterError(f"{_CONFIG}: {pattern_key} is not a JSON object.")
    try:
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        value = next(matching, config.get(key, default))
    except re.error as error:
        raise InvalidAdapterError(f"{_CONFIG}: {pattern_key} has a bad pattern: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidAdapterError(f"{_CONFIG}: {key} of {module!r} is {value!r}; expected a number.")
    return value


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for module, factors in adapter.factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.a_RD.detach().cpu().contiguous().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.b_FR.detach().cpu().contiguous().clone()
    return tensors


def _config_of(adapter: Adapter) -> dict[str, Any]:
    ranks = {module: factors.rank for module, factors in adapter.factors.items()}
    alphas = {module: _alpha_of(factors, adapter.is_rslora) for module, factors in adapter.factors.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": adapter.is_rslora,
        "target_modules": list(adapter.factors),
        # PEFT reads these keys as regular expressions.
        "rank_pattern": {re.escape(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(module): a for module, a in alphas.items() if a != alpha},
    }


def _alpha_of(factors: LoraFactors, is_rslora: bool) -> float:
    alpha = factors.scaling * _scaling_divisor(factors.rank, is_rslora)
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha  # 16 / sqrt(8) * sqrt(8) is not quite 16


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _replace_folder(aside: Path, folder: Path) -> None:
    """Put `aside` in the place of `folder`, which may hold an older adapter; both lie in the same parent."""
    old = aside.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
