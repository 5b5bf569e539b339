"""Tiny checkpoints and adapters for tests: random weights in real formats.

Sizes avoid powers of two where the architecture allows, so that tests cover masks and tails. The random weights are
spread widely enough that greedy outputs vary from prompt to prompt.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench.models import byte_tokenizer
from cluster.storage.checkpoints import Checkpoint, open_checkpoint
from serving.engine.detokenizer import Detokenizer, Vocabulary
from serving.engine.engine import Engine
from serving.engine.request import Request, TokenEvent
from serving.engine.sequence import SequenceState

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
BOS, EOS, PAD = 256, 257, 258


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer, whose tokens after the bytes are `<s>`, `</s>` and `<pad>`."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_checkpoint(
    folder: Path, architecture: str = "LlamaForCausalLM", *, seed: int = 0, std: float = 0.12, **overrides: Any
) -> Path:
    """Write a random checkpoint with its tokenizer and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 2,
        "hidden_size": 60,
        "intermediate_size": 92,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": std,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(MODEL_TYPES[architecture], **{**settings, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    checkpoint: Path,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    rslora: bool = False,
    dora: bool = False,
    modules: Sequence[str] = KINDS,
    seed: int = 0,
    scale: float = 0.15,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
) -> Path:
    """Write a random PEFT adapter, strong enough to change greedy outputs, and return its folder.

    This function writes PEFT's file format itself, so that a fault of our own writer cannot hide in the tests. The keys
    of `rank_pattern` and `alpha_pattern` are kinds of modules ("q_proj"), which PEFT matches as suffixes. `modules` may
    include "embed_tokens" and "lm_head". With `dora` all modules have magnitudes, up to 40 % off the norms of the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    stored = open_checkpoint(checkpoint)
    for module, (num_out, num_in) in sorted(stored.adaptable_shapes().items()):
        kind = module.rsplit(".", 1)[-1]
        if kind not in modules:
            continue
        r = (rank_pattern or {}).get(kind, rank)
        infix, suffix = ("lora_embedding_", "") if kind == "embed_tokens" else ("lora_", ".weight")
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.{infix}A{suffix}"] = torch.randn(r, num_in, generator=generator) * scale
        tensors[f"{prefix}.{infix}B{suffix}"] = torch.randn(num_out, r, generator=generator) * scale
        if dora:
            factors_F = 0.6 + 0.8 * torch.rand(num_out, generator=generator)
            tensors[f"{prefix}.lora_magnitude_vector"] = factors_F * weight_of(stored, module).norm(dim=1)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": list(modules),
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder


def weight_of(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """Return the weight (out, in) of a module: an embedding is transposed, and a tied head is the embedding."""
    name = "model.embed_tokens" if module == "lm_head" and "lm_head.weight" not in checkpoint.names() else module
    weight = checkpoint.load(f"{name}.weight").float()
    return weight.T if module.endswith("embed_tokens") else weight


def make_sequence(request: Request, limit_tokens: int, **settings: Any) -> SequenceState:
    """Return a sequence for tests that schedule but read no text."""
    no_text = Detokenizer(cast(Vocabulary, None))
    return SequenceState(request, limit_tokens, text=no_text, seed=0, end_ids=frozenset(), **settings)


def set_chat_template(folder: Path, template: str) -> None:
    """Give a checkpoint's tokenizer a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def run_engine(engine: Engine, requests: Iterable[Request]) -> dict[str, list[TokenEvent]]:
    """Submit the requests, step until none is left, and return the events by request. Checks the engine each step."""
    events: dict[str, list[TokenEvent]] = {}
    for request in requests:
        engine.submit(request)
        events[request.id] = []
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check_integrity()
    return events


def tokens_of(events: Iterable[TokenEvent]) -> list[int]:
    """Return the tokens of one request's events."""
    return [token for event in events for token in event.tokens]
