"""Read and check a model's config.json: architecture, sizes, options.

transformers' own config classes read the file, so defaults, old spellings and rope settings mean the same as there.
Options that our model code does not support are refused by name, never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from cluster.errors import InvalidCheckpointError

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Options of other models or of quantised checkpoints. If any is set, our forward pass would give wrong results.
_REFUSED_OPTIONS = ("quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier")


@dataclass(frozen=True, eq=False)
class ModelConfig:
    """The settings of one Llama-family model. `windows` has each layer's sliding window, None for full attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    windows: tuple[int | None, ...]
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    is_tied: bool
    rope: PretrainedConfig  # for transformers' rope functions, which read the sizes and `rope_parameters` from it


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check the content of a config.json. Raises InvalidCheckpointError naming the first unsupported setting."""
    architecture = _architecture(raw)
    _refuse_options(raw)
    config = _parse(architecture, raw)
    _check_rope(config.rope_parameters)
    if config.hidden_act not in ("silu", "swish"):
        raise InvalidCheckpointError(f"config.json: hidden_act {config.hidden_act!r} is not supported. Use 'silu'.")
    has_bias = bool(getattr(config, "attention_bias", False)) and architecture != "MistralForCausalLM"
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=_num_kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        windows=_windows(architecture, config),
        has_qkv_bias=architecture == "Qwen2ForCausalLM" or has_bias,
        has_o_bias=architecture != "Qwen2ForCausalLM" and has_bias,
        has_mlp_bias=architecture == "LlamaForCausalLM" and config.mlp_bias,
        has_qk_norm=architecture == "Qwen3ForCausalLM",
        is_tied=config.tie_word_embeddings,
        rope=config,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or ["(none)"]
    if len(names) != 1 or names[0] not in _MODEL_TYPES:
        supported = ", ".join(_MODEL_TYPES)
        raise InvalidCheckpointError(
            f"config.json: architecture {names[0]!r} is not supported. Supported are: {supported}."
        )
    return names[0]


def _refuse_options(raw: Mapping[str, Any]) -> None:
    for option in _REFUSED_OPTIONS:
        if raw.get(option) is not None:
            raise InvalidCheckpointError(f"config.json: option {option!r} is not supported.")


def _parse(architecture: str, raw: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return CONFIG_MAPPING[_MODEL_TYPES[architecture]].from_dict(dict(raw))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidCheckpointError(f"config.json: {error}") from error


def _check_rope(parameters: Mapping[str, Any]) -> None:
    rope_type = parameters.get("rope_type")
    if rope_type not in _ROPE_TYPES:
        raise InvalidCheckpointError(
            f"config.json: rope type {rope_type!r} is not supported. Supported are: {', '.join(_ROPE_TYPES)}."
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidCheckpointError("config.json: partial_rotary_factor must be 1; other values are not supported.")


def _num_kv_heads(config: PretrainedConfig) -> int:
    if config.num_attention_heads % config.num_key_value_heads:
        raise InvalidCheckpointError(
            f"config.json: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}."
        )
    return config.num_key_value_heads


def _windows(architecture: str, config: PretrainedConfig) -> tuple[int | None, ...]:
    """Return each layer's window. Llama has none, Mistral one for all layers, Qwen one in some types of layers."""
    window = None if architecture == "LlamaForCausalLM" else config.sliding_window
    if window is not None and window < 1:
        raise InvalidCheckpointError(f"config.json: sliding_window {window} is not positive.")
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        return (window,) * config.num_hidden_layers
    return tuple(_layer_window(layer_type, window) for layer_type in config.layer_types)


def _layer_window(layer_type: str, window: int | None) -> int | None:
    if layer_type == "full_attention":
        return None
    if layer_type != "sliding_attention" or window is None:
        raise InvalidCheckpointError(
            f"config.json: layer type {layer_type!r} with sliding_window {window} is not supported."
        )
    return window
