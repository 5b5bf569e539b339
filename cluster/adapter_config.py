"""PEFT's adapter_config.json: the kind of an adapter, and the rank and scaling of each module.

The scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (rank-stabilised LoRA, arXiv 2312.03732).
`rank_pattern` and `alpha_pattern` override `r` and `lora_alpha` for the modules that their keys match.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InvalidAdapterError

CONFIG = "adapter_config.json"
# Settings that LoRA and DoRA factors alone cannot express: (key, name for messages).
_UNSUPPORTED_SETTINGS = (
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
# Initialisations that also change the base's weights, so that the files alone do not tell what the adapter adds.
_UNSUPPORTED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_config(file: Path) -> dict[str, Any]:
    """Read the file; InvalidAdapterError if it is missing or not a JSON object."""
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InvalidAdapterError(f"{CONFIG} is missing.") from error
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{CONFIG} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapterError(f"{CONFIG} is not a JSON object.")
    return config


def check_kind(config: Mapping[str, Any]) -> None:
    """Raise InvalidAdapterError, with the names of all unsupported settings, if there are any."""
    if config.get("peft_type") != "LORA":
        raise InvalidAdapterError(f"adapters of peft_type {config.get('peft_type')!r} are not supported, only 'LORA'.")
    kinds = [kind for key, kind in _UNSUPPORTED_SETTINGS if config.get(key)]
    if (config.get("bias") or "none") != "none":
        kinds.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_UNSUPPORTED_STARTS):
        kinds.append(f"init_lora_weights={start!r} that was not converted to plain LoRA")
    if kinds:
        raise InvalidAdapterError(f"not supported: {', '.join(kinds)}. Supported are LoRA, rsLoRA and DoRA.")


def rank_of(module: str, config: Mapping[str, Any]) -> int:
    """Return the configured rank of a module."""
    rank = _setting("r", "rank_pattern", 8, module, config)
    if rank < 1 or rank != int(rank):
        raise InvalidAdapterError(f"{CONFIG}: the rank of {module!r} is {rank}; expected a whole number above 0.")
    return int(rank)


def scaling_of(module: str, config: Mapping[str, Any]) -> float:
    """Return the configured factor of a module's `lora_b @ lora_a`."""
    alpha = _setting("lora_alpha", "alpha_pattern", 8, module, config)
    return alpha / _scaling_divisor(rank_of(module, config), bool(config.get("use_rslora")))


def config_of(modules: Mapping[str, tuple[int, float]], *, is_rslora: bool, is_dora: bool) -> dict[str, Any]:
    """Return the settings for an adapter with these (rank, scaling) by module; the commonest become the defaults."""
    ranks = {module: rank for module, (rank, _) in modules.items()}
    alphas = {module: _alpha_of(scaling, rank, is_rslora) for module, (rank, scaling) in modules.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": is_rslora,
        "use_dora": is_dora,
        "target_modules": list(modules),
        # PEFT reads these keys as regular expressions.
        "rank_pattern": {re.escape(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(module): a for module, a in alphas.items() if a != alpha},
    }


def _alpha_of(scaling: float, rank: int, is_rslora: bool) -> float:
    alpha = scaling * _scaling_divisor(rank, is_rslora)
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha  # 16 / sqrt(8) * sqrt(8) is not quite 16


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _scaling_divisor(rank: int, is_rslora: bool) -> float:
    return math.sqrt(rank) if is_rslora else rank


def _setting(key: str, pattern_key: str, default: float, module: str, config: Mapping[str, Any]) -> float:
    """Return PEFT's number for a module: that of the first pattern that matches the end of its path, else `key`."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise InvalidAdapterError(f"{CONFIG}: {pattern_key} is not a JSON object.")
    try:
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        value = next(matching, config.get(key, default))
    except re.error as error:
        raise InvalidAdapterError(f"{CONFIG}: {pattern_key} has a bad pattern: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidAdapterError(f"{CONFIG}: {key} of {module!r} is {value!r}; expected a number.")
    return value
