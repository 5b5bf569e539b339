"""Training of the demo's base models: a tokenizer, a tiny Llama from scratch, and its further training."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import corpus
from readapt.training.optimiser import MAX_GRADIENT_NORM

END, PAD = "<|end|>", "<|pad|>"
END_ID, PAD_ID = 0, 1
# A gradient is the mean over this many shards of the batch, one thread each. It does not depend on the number of cores,
# so the sum is the same on every machine. Measured on 4 shared cores, 2026-11: 67 ms per step, 137 ms on one thread.
# torch's own four threads took 58 ms, but 1.5 to 4.8 s while other programs ran, because OpenMP's barriers spin.
_NUM_SHARDS = 4
_WARMUP_STEPS = 20
_FINAL_SHARE = 0.1  # what is left of the learning rate at the end of the cosine


@dataclass(frozen=True)
class BaseShape:
    """The base models' architecture: a Llama with grouped-query attention and tied embeddings."""

    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 1280
    context_tokens: int = 256

    def config(self) -> LlamaConfig:
        """Return the architecture as a transformers config."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.context_tokens,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )


@dataclass(frozen=True)
class Pretraining:
    """One run. A step reads `rows` windows of stories, prose and programs, each of `window_tokens` tokens."""

    steps: int
    learning_rate: float
    rows: tuple[int, int, int]
    window_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Texts:
    """The training text: stories, prose and programs, each as one row of tokens. Every document ends with END."""

    tokenizer: PreTrainedTokenizerFast
    tokens: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def make(cls, vocab_size: int, seed: int, num_chars: int = 1_000_000) -> "Texts":
        """Make `num_chars` characters of each kind, and train the tokenizer on the stories and 5 % of the others."""
        kinds = [make(num_chars, seed) for make in (corpus.stories, corpus.prose, corpus.programs)]
        sample = [text for index, texts in enumerate(kinds) for text in (texts[: len(texts) // 20] if index else texts)]
        tokenizer = _train_tokenizer(sample, vocab_size)
        stories, prose, programs = (_as_tokens(tokenizer, texts) for texts in kinds)
        return cls(tokenizer, (stories, prose, programs))


def _train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def _as_tokens(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    return torch.tensor([token for ids in tokenizer(documents)["input_ids"] for token in [*ids, END_ID]])


def train_base(
    start: Path | None,
    target: Path,
    texts: Texts,
    shape: BaseShape,
    settings: Pretraining,
    progress: Callable[[float], None],
) -> None:
    """Train from `start` (None: from scratch) and write a Hugging Face checkpoint with its tokenizer to `target`."""
    model = _new_model(shape, settings.seed) if start is None else AutoModelForCausalLM.from_pretrained(start)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
    generator = torch.Generator().manual_seed(settings.seed)
    with ThreadPoolExecutor(min(_NUM_SHARDS, os.cpu_count() or 1)) as threads:
        for step in range(settings.steps):
            _set_gradients(model, parameters, _batch(texts, settings, generator), threads)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * _rate_share(step, settings.steps)
            optimizer.step()
            progress((step + 1) / settings.steps)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID)
    model.save_pretrained(target)
    texts.tokenizer.save_pretrained(target)


def _new_model(shape: BaseShape, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape.config())


def _rate_share(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    return warmup * (_FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * step / steps)) / 2)


def _batch(texts: Texts, settings: Pretraining, generator: torch.Generator) -> Tensor:
    pairs = zip(texts.tokens, settings.rows, strict=True)
    windows = [w for tokens, num_rows in pairs for w in _windows(tokens, num_rows, settings.window_tokens, generator)]
    order = torch.randperm(len(windows), generator=generator).tolist()
    return torch.stack([windows[index] for index in order])


def _windows(tokens: Tensor, num_rows: int, window_tokens: int, generator: torch.Generator) -> list[Tensor]:
    starts = torch.randint(len(tokens) - window_tokens, (num_rows,), generator=generator).tolist()
    return [tokens[start : start + window_tokens + 1] for start in starts]


def _set_gradients(model: Any, parameters: list[Tensor], tokens_BT: Tensor, threads: ThreadPoolExecutor) -> None:
    def gradients(shard_BT: Tensor) -> tuple[Tensor, ...]:
        logits_BTV = model(input_ids=shard_BT[:, :-1], use_cache=False).logits
        return torch.autograd.grad(cross_entropy(logits_BTV.flatten(0, 1), shard_BT[:, 1:].flatten()), parameters)

    shards = list(threads.map(gradients, tokens_BT.chunk(_NUM_SHARDS)))
    for parameter, *parts in zip(parameters, *shards, strict=True):
        parameter.grad = torch.stack(parts).mean(0)
