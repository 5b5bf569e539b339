"""Random Llamas and a byte-level tokenizer, for benchmarks that need a model but no trained weights."""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


def random_llama(sizes: Mapping[str, Any], dtype: str = "float32", device: str = "cpu") -> Any:
    """Return a Llama with random weights, made on `device`. `sizes` are arguments of LlamaConfig.

    The seed is fixed: equal sizes on equal devices give equal weights.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=getattr(torch, dtype))


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is byte i of the byte-level alphabet, followed by the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
