"""adapter_config.json as PEFT writes and reads it: which kind of adapter, and each module's rank and scaling.

The scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (rank-stabilised LoRA, arXiv 2312.03732);
`rank_pattern` and `alpha_pattern` override `r` and `lora_alpha` for the modules that their keys match.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InvalidAdapterError

CONFIG = "adapter_config.json"
# Settings that make an adapter more than LoRA and DoRA factors: (key, what to call it).
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
# Initialisations that also change the base's weights: the files alone do not say what the adapter adds to the base.
_UNSUPPORTED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_config(file: Path) -> dict[str, Any]:
    """The file's content; InvalidAdapterError where it is missing or no JSON object."""
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
    """Raise InvalidAdapterError, with all their names, for settings that the factors alone do not express."""
    if config.get("peft_type") != "LORA":
        raise InvalidAdapterError(f"adapters of peft_type {config.get('peft_type')!r} are not supported, only 'LORA'.")
    kinds = [kind for key, kind in _UNSUPPORTED_SETTINGS if config.get(key)]
    if (config.get("bias") or "none") != "none":
        kinds.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_UNSUPPORTED_STARTS):
        kinds.append(f"init_lora_weights={start!r} that was not converted to plain LoRA")
    if kinds:
        raise InvalidAdapterError(f"not supported: {', '.join(kinds)}; LoRA, rsLoRA and DoRA are.")


def rank_of(module: str, config: Mapping[str, Any]) -> int:
    """The rank that a module has by its configuration."""
    rank = _setting("r", "rank_pattern", 8, module, config)
    if rank < 1 or rank != int(rank):
        raise InvalidAdapterError(f"{CONFIG}: the rank of {module!r} is {rank}; expected a whole number above 0.")
    return int(rank)


def scaling_of(module: str, config: Mapping[str, Any]) -> float:
    """What a module's `lora_b @ lora_a` is multiplied with."""
    alpha = _setting("lora_alpha", "alpha_pattern", 8, module, config)
    return alpha / scaling_divisor(rank_of(module, config), bool(config.get("use_rslora")))


def scaling_divisor(rank: int, is_rslora: bool) -> float:
    """What `lora_alpha` is divided by."""
    return math.sqrt(rank) if is_rslora else rank


def _setting(key: str, pattern_key: str, default: float, module: str, config: Mapping[str, Any]) -> float:
    """The number that PEFT uses for a module: that of the first pattern which matches the end of its path, or `key`."""
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
