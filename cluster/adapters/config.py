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
_ALL_LINEAR = "all-linear"
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's own for the models that are served here
_TIED = ("embed_tokens", "lm_head")
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
    ("velora_config", "VeLoRA"),
    ("megatron_config", "Megatron layers (megatron_config)"),
    ("enable_lora", "merged linear layers (enable_lora)"),
)
# Settings that this module reads, and those that do not change what a trained adapter computes: PEFT's own of all
# releases, and those that Unsloth and ms-swift add. The last line belongs to initialisations.
_KNOWN_SETTINGS = """
peft_type task_type r lora_alpha use_rslora use_dora rank_pattern alpha_pattern target_modules exclude_modules
layers_to_transform layers_pattern bias ensure_weight_tying init_lora_weights
auto_mapping base_model_name_or_path fan_in_fan_out inference_mode lora_dropout megatron_core merge_weights
peft_version qalora_group_size revision runtime_config unsloth_fixed lora_dtype lorap_lr_ratio lorap_emb_lr
corda_config eva_config lora_ga_config loftq_config
"""
# Initialisations after which the files tell what the adapter adds. Others also change the base's weights.
_STARTS = ("gaussian", "eva", "orthogonal")
_UNSUPPORTED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def read_config(file: Path) -> dict[str, Any]:
    """Read the file; InvalidAdapterError if it is missing or not a JSON object."""
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InvalidAdapterError(f"{CONFIG} is missing.{_found_below(file.parent)}") from error
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(f"{CONFIG} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapterError(f"{CONFIG} is not a JSON object.")
    return config


def _found_below(folder: Path) -> str:
    """Name the subfolders that are adapters: PEFT writes an adapter that is not called "default" into one."""
    found = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    return f" Did you mean one of its subfolders? {', '.join(found)}" if found else ""


def check_kind(config: Mapping[str, Any]) -> None:
    """Raise InvalidAdapterError, with the names of all unsupported settings, if there are any."""
    if config.get("peft_type") != "LORA":
        raise InvalidAdapterError(f"adapters of peft_type {config.get('peft_type')!r} are not supported, only 'LORA'.")
    kinds = [kind for key, kind in _UNSUPPORTED_SETTINGS if config.get(key)]
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        kinds.append(f"bias={config['bias']!r}")
    if config.get("task_type") in _UNSUPPORTED_TASKS:
        kinds.append(f"task_type={config['task_type']!r}, whose answers come from its own head")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        kinds.append(f"init_lora_weights={start!r} that was not converted to plain LoRA")
    known = {*_KNOWN_SETTINGS.split(), *(key for key, _ in _UNSUPPORTED_SETTINGS)}
    kinds += [f"the unknown setting {key}={value!r}" for key, value in config.items() if value and key not in known]
    if kinds:
        raise InvalidAdapterError(f"not supported: {', '.join(kinds)}. Supported are LoRA, rsLoRA and DoRA.")


def check_targets(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InvalidAdapterError if the configuration leaves out a module that has factors: PEFT ignores these."""
    if isinstance(config.get("target_modules"), str) and config.get("layers_to_transform") is not None:
        raise InvalidAdapterError(f"{CONFIG}: layers_to_transform needs a list as target_modules.")
    for module in modules:
        if not _is_target(module, config):
            raise InvalidAdapterError(
                f"{CONFIG} does not select module {module!r}, which has factors. See target_modules, exclude_modules "
                "and layers_to_transform there. PEFT ignores such factors; remove them or correct the file."
            )


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts a module. Lists match the end of its path, strings are regular expressions of all of it."""
    try:
        if _matches(module, config.get("exclude_modules") or ()):
            return False
        targets = config.get("target_modules")
        if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
            return module.rpartition(".")[2] not in _TIED
        is_named = _matches(module, _DEFAULT_TARGETS if targets is None else targets)
        if not is_named and config.get("ensure_weight_tying") and module.rpartition(".")[2] in _TIED:
            return any(_matches(tied, targets or ()) for tied in _TIED)
        return is_named and (isinstance(targets, str) or _is_in_layers(module, config))
    except (re.error, TypeError) as error:
        raise InvalidAdapterError(f"{CONFIG}: the selection of modules cannot be read: {error}") from error


def _matches(module: str, wanted: str | Iterable[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in wanted)


def _is_in_layers(module: str, config: Mapping[str, Any]) -> bool:
    """Whether `layers_to_transform` selects the module's layer: the first number in its path."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    named = config.get("layers_pattern") or []
    starts = [rf"(?:.*?\.)?{pattern}" for pattern in ([named] if isinstance(named, str) else named)]
    found = (re.match(rf"{start}\.(\d+)\.", module) for start in starts or [r".*?\.[^.]*"])
    layer = next((int(match[1]) for match in found if match is not None), None)
    return layer is not None and layer in ([layers] if isinstance(layers, int) else layers)


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
