"""The base updates of the re-adaptation benchmark: one small base, trained further on another mixture of text.

An update is full-parameter continued training of the kit's `stories3m-v1` on books, programs and a few stories, with
fixed seeds. Its strength is the mean of |E| / |W| over the linears (Frobenius norms). The learning rates and lengths
below were chosen for about 0.06, 0.15 and 0.3. The negative control is not an update but a second, independent training
of the same architecture (`babyllama-a`, `babyllama-b`), whose weights have nothing in common with the first's.
"""

import json
import lzma
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench.facts import plain, read_json
from cluster.storage.checkpoints import open_checkpoint
from readapt.training.optimiser import MAX_GRADIENT_NORM

CORPORA = ("books_children", "python_thealgorithms", "tinystories_1000")
CORPUS_CHARS = 4_000_000  # of each corpus; more than the longest update reads
PIECE_CHARS = 2_000  # documents are tokenised in pieces: a tokenizer without word boundaries is slow on a whole book
HELD_OUT_SHARE = 0.05
HELD_OUT_WINDOWS = 32
WARMUP_STEPS = 20


@dataclass(frozen=True)
class UpdateRecipe:
    """One update. `rows` is the number of windows of `window_tokens` per batch, for each corpus of `CORPORA`."""

    name: str
    steps: int
    learning_rate: float
    rows: tuple[int, int, int] = (8, 6, 2)
    window_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Update:
    """An old and a new base on disk. If `is_control`, the two have nothing in common."""

    name: str
    old: Path
    new: Path
    is_control: bool = False


@dataclass(frozen=True)
class UpdateFacts:
    """What an update did: mean |E| / |W| of the linears, held-out perplexity by corpus before and after, and cost."""

    name: str
    relative_change: float
    perplexity_before: dict[str, float]
    perplexity_after: dict[str, float]
    num_tokens: int
    seconds: float


RECIPES = (
    UpdateRecipe("mild", steps=150, learning_rate=2.5e-4),
    UpdateRecipe("medium", steps=300, learning_rate=5e-4),
    UpdateRecipe("severe", steps=500, learning_rate=8e-4),
)


def old_base(kit: Path) -> Path:
    """Return the base that all updates start from."""
    return kit / "models" / "stories3m-v1"


def control(kit: Path) -> Update:
    """Return the negative control."""
    return Update("control", kit / "models" / "babyllama-a", kit / "models" / "babyllama-b", is_control=True)


def make_update(recipe: UpdateRecipe, kit: Path, target: Path) -> tuple[Update, UpdateFacts]:
    """Train the update into `target`, unless it is already there; return it and what it did."""
    update = Update(recipe.name, old_base(kit), target)
    record = target / "facts.json"
    wanted = plain(asdict(recipe))
    if read_json(record).get("recipe") != wanted:
        facts = _train(recipe, update, kit / "corpora")
        record.write_text(json.dumps({"recipe": wanted, "facts": asdict(facts)}, indent=2))
    return update, UpdateFacts(**read_json(record)["facts"])


def relative_change(old: Path, new: Path) -> float:
    """Return the mean of |W2 - W1| / |W1| over the linears of two checkpoints of the same shape."""
    before, after = open_checkpoint(old), open_checkpoint(new)
    ratios = []
    for module in before.linear_shapes():
        w_FD = before.load(f"{module}.weight").float()
        ratios.append(float((after.load(f"{module}.weight").float() - w_FD).norm() / w_FD.norm()))
    return sum(ratios) / len(ratios)


def _train(recipe: UpdateRecipe, update: Update, corpora: Path) -> UpdateFacts:
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(update.old)
    streams = {name: _tokens(tokenizer, corpora / f"{name}.jsonl.xz") for name in CORPORA}
    train = [tokens[: _cut(tokens)] for tokens in streams.values()]
    held_out = {name: tokens[_cut(tokens) :] for name, tokens in streams.items()}
    model: Any = AutoModelForCausalLM.from_pretrained(update.old, dtype=torch.float32)
    before = _perplexities(model, held_out, recipe.window_tokens)
    _continue_training(model, train, recipe)
    after = _perplexities(model, held_out, recipe.window_tokens)
    model.save_pretrained(update.new)
    tokenizer.save_pretrained(update.new)
    num_tokens = recipe.steps * sum(recipe.rows) * recipe.window_tokens
    change = relative_change(update.old, update.new)
    return UpdateFacts(recipe.name, change, before, after, num_tokens, time.perf_counter() - started)


def _continue_training(model: Any, streams: list[Tensor], recipe: UpdateRecipe) -> None:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        pairs = zip(streams, recipe.rows, strict=True)
        tokens_BT = torch.cat([_windows(s, num_rows, recipe.window_tokens, generator) for s, num_rows in pairs])
        optimizer.zero_grad()
        _loss(model, tokens_BT).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * _rate_share(step, recipe.steps)
        optimizer.step()


def _rate_share(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(model: Any, tokens_BT: Tensor) -> Tensor:
    logits = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


@torch.no_grad()
def _perplexities(model: Any, held_out: dict[str, Tensor], window_tokens: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    windows = {name: _windows(s, HELD_OUT_WINDOWS, window_tokens, generator) for name, s in held_out.items()}
    return {name: math.exp(_loss(model, tokens_BT).item()) for name, tokens_BT in windows.items()}


def _windows(tokens: Tensor, num_rows: int, window_tokens: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - window_tokens, (num_rows,), generator=generator).tolist()
    return torch.stack([tokens[start : start + window_tokens + 1] for start in starts])


def _cut(tokens: Tensor) -> int:
    return round(len(tokens) * (1 - HELD_OUT_SHARE))


def _tokens(tokenizer: PreTrainedTokenizerBase, corpus: Path) -> Tensor:
    """Return the first `CORPUS_CHARS` of a corpus as one row of tokens. Each piece has the tokenizer's own start."""
    pieces = list(_pieces(_documents(corpus)))
    return torch.tensor([token for ids in tokenizer(pieces)["input_ids"] for token in ids])


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        yield from (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))


def _documents(corpus: Path) -> Iterator[str]:
    num_chars = 0
    with lzma.open(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"].replace("\r\n", "\n")
            yield text
            num_chars += len(text)
            if num_chars >= CORPUS_CHARS:
                return
