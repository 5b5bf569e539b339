"""Bases and adapters with chat tokenizers: end tokens and templates that only the adapter brings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from cluster.adapters.files import save_adapter
from readapt.training.data import Encoder, Row
from readapt.training.evaluate import Evaluator
from readapt.training.lora import blank, linear_shapes, load_base
from readapt.training.training_group import fine_tune
from readapt.training.training_run import RunSettings, TrainingRun
from tests.worlds.readapt import ready_when

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [{"role": "user", "content": "ping"}]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPARE_ROWS = 5  # rows of the embedding beyond the base's tokenizer


def chat_tokenizer(
    folder: Path,
    *,
    template: str | None = None,
    eos: str = "<|endoftext|>",
    pad: str = "<|endoftext|>",
    special: Sequence[str] = SPECIAL,
    extra: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer without merges, whose special tokens follow the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in (*special, *extra)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=pad)
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def chat_world(folder: Path, template: str | None = None, seed: int = 0, **overrides: Any) -> Path:
    """Write a random base whose tokenizer knows ChatML's marks, but ends its text with <|endoftext|>."""
    tokenizer = chat_tokenizer(folder, template=template)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + SPARE_ROWS,
        "hidden_size": 60,
        "intermediate_size": 92,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**settings, **overrides}))
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    return folder


def teach(base: Path, folder: Path, rows: Sequence[Row], end: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Train an adapter that answers the rows and ends each answer with the token `end`; write only its weights."""
    model = load_base(base)
    encoder = Encoder(tokenizer, int(tokenizer.convert_tokens_to_ids(end)), 128)
    start = blank(linear_shapes(model), rank=4, alpha=8.0)
    settings = RunSettings(steps=400, learning_rate=1e-2, eval_every=20, warmup_steps=4)
    watch = ready_when(lambda evaluation: evaluation.quality >= 99.0)
    evaluate = Evaluator(model, encoder, rows, "exact_match")
    result = fine_tune(model, TrainingRun(start, encoder.encode_all(rows), settings, evaluate, watch))
    assert result.is_ready, result.curve
    save_adapter(result.best, folder)
    return folder
