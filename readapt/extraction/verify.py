"""Measures how close base + adapter come to the tuned model: KL of next-token distributions and top-1 agreement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.errors import InvalidDataError
from cluster.storage.jsonl import read_lines, text_field
from readapt.extraction.anatomy import Kind, Place
from readapt.extraction.files import ADAPTER_PREFIX, REMAINDER, WEIGHTS, Extraction, apply_remainder
from readapt.extraction.report import read_report, write_report
from readapt.training.causal_lm import CausalLM
from readapt.training.chats import prompt_and_completion
from readapt.training.data import Encoded, Row, by_length, collate, encoder_for
from readapt.training.lora import load_base

MAX_ROWS, MAX_TOKENS, BATCH_ROWS = 128, 512, 8


@dataclass(frozen=True)
class Likeness:
    """Mean KL(tuned || adapted) in nats over the scored positions, and the share with the same most likely token."""

    kl: float
    top1_agreement: float


def verify(done: Extraction, base: Path, tuned: Path, data: Path) -> dict[str, Any]:
    """Compare the bare base, each adapter, and adapter + remainder with the tuned model on the first rows of `data`.

    The tokens of completions, or of whole texts, are scored. `curve` truncates the largest adapter to its leading
    ranks. If the vocabulary has grown or shrunk, rows with other tokens are skipped and the shared part of the
    distributions is compared. Both models must fit in memory. Raises InvalidDataError for unusable rows, or if the
    model is not a causal language model.
    """
    if not done.anatomy.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise InvalidDataError(
            f"--verify needs a causal language model, but the architecture is {done.anatomy.architecture!r}."
        )
    model, reference = load_base(base), load_base(tuned)
    rows = encode_rows(data, tuned, len(model.get_input_embeddings().weight))
    subject = _Subject(model, done)

    def likeness() -> dict[str, float]:
        return vars(compare(reference, model, rows))

    result: dict[str, Any] = {"data": str(data), "num_rows": len(rows), "base": likeness(), "adapters": {}}
    for label, folder in done.adapters.items():
        subject.merge(folder)
        result["adapters"][label] = likeness()
    result["curve"] = [
        {"max_rank": rank, "parameters": subject.merge(_largest(done), rank), **likeness()}
        for rank in _pruning_ranks(done)
    ]
    if (done.folder / REMAINDER).exists() and not any(part.num_new_rows for part in done.parts):
        subject.merge(_largest(done))
        apply_remainder(model, done.folder / REMAINDER)
        result["largest_with_remainder"] = likeness()
    return result


def verify_into_report(done: Extraction, base: Path, tuned: Path, data: Path) -> None:
    """Verify an extraction and add the result to its report and plot."""
    write_report(done, {**read_report(done.folder), "verify": verify(done, base, tuned, data)})


@torch.no_grad()
def compare(reference: CausalLM, model: CausalLM, rows: Sequence[Encoded]) -> Likeness:
    """Return the likeness of a model to a reference on encoded rows, in batches of similar length."""
    kl, num_same, num_scored = 0.0, 0, 0
    ordered = by_length(rows)
    for start in range(0, len(ordered), BATCH_ROWS):
        batch = collate(ordered[start : start + BATCH_ROWS])
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "use_cache": False}
        is_scored_BT = batch.labels_BT[:, 1:] >= 0
        both = [one(**inputs).logits[:, :-1][is_scored_BT] for one in (model, reference)]
        shared = min(logits_YV.shape[1] for logits_YV in both)
        ours_YV, theirs_YV = (logits_YV[:, :shared].double().log_softmax(-1) for logits_YV in both)
        kl += float((theirs_YV.exp() * (theirs_YV - ours_YV)).sum())
        num_same += int((theirs_YV.argmax(-1) == ours_YV.argmax(-1)).sum())
        num_scored += len(ours_YV)
    return Likeness(kl / num_scored, num_same / num_scored)


class _Subject:
    """A model with the base's weights, into which one adapter at a time is merged."""

    def __init__(self, model: CausalLM, done: Extraction):
        self._places = {place.module: place for part in done.parts for place in part.places}
        self._state = model.state_dict()
        modules = [module for module in self._places if f"{module}.weight" in self._state]
        self._originals = {module: self._state[f"{module}.weight"].clone() for module in modules}

    def merge(self, folder: Path, max_rank: int | None = None) -> int:
        """Set the weights to base + the adapter's leading ranks, and return the number of parameters of these ranks."""
        num_parameters = 0
        for module, original in self._originals.items():
            self._state[f"{module}.weight"].copy_(original)
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            names = set(stored.keys())
            for module, original in self._originals.items():
                factors = _factors(stored, names, self._places[module])
                if factors is not None:
                    a, b = factors[0][:max_rank], factors[1][:, :max_rank]
                    num_parameters += a.numel() + b.numel()
                    self._state[f"{module}.weight"].copy_(original + _weight(a, b, self._places[module], original))
        return num_parameters


def _factors(stored: Any, names: set[str], place: Place) -> tuple[Tensor, Tensor] | None:
    """Return a module's factors as matrices (rank, in) and (out, rank), or None if the adapter lacks it."""
    name = ADAPTER_PREFIX + place.module
    if f"{name}.lora_embedding_A" in names:
        a, b = (stored.get_tensor(f"{name}.lora_embedding_{side}").float().T for side in "BA")
        return a, b
    if f"{name}.lora_A.weight" not in names:
        return None
    a, b = (stored.get_tensor(f"{name}.lora_{side}.weight").float().flatten(1) for side in "AB")
    return a, b


def _weight(a: Tensor, b: Tensor, place: Place, like: Tensor) -> Tensor:
    delta = b @ a
    return (delta.T if place.kind is Kind.TRANSPOSED else delta).reshape(like.shape)


def _largest(done: Extraction) -> Path:
    label = max(done.adapters, key=lambda label: (done.adapters[label] / WEIGHTS).stat().st_size)
    return done.adapters[label]


def _pruning_ranks(done: Extraction) -> list[int]:
    """Return 1, 2, 4, ... up to the largest rank of any adapter."""
    top = max(rank for ranks in done.ranks.values() for rank in ranks.values())
    return [*(1 << power for power in range(top.bit_length()) if 1 << power < top), top]


def encode_rows(data: Path, tuned: Path, vocabulary: int) -> list[Encoded]:
    """Encode the first rows of a JSONL file, without rows that are too long or have tokens beyond the vocabulary."""
    encoder = encoder_for(tuned, MAX_TOKENS)
    rows = []
    for row in read_rows(data):
        if "text" in row:
            tokens = encoder.encode_prompt(str(row["text"]))[:MAX_TOKENS]
            encoded = Encoded(tuple(tokens), 0)
        else:
            pair = Row(*prompt_and_completion(row, f"{data}"))
            if encoder.fault(pair) is not None:
                continue
            encoded = encoder.encode(pair)
        if max(encoded.input_ids) < vocabulary and len(encoded.input_ids) > 1:
            rows.append(encoded)
    if not rows:
        raise InvalidDataError(f"{data}: every row is too long, or has tokens that the base lacks, or fewer than two.")
    return rows


def read_rows(data: Path) -> list[Mapping[str, Any]]:
    """Return the first rows of a JSONL file. Each has `text`, or what a training row has, else InvalidDataError."""
    rows = read_lines(data)[:MAX_ROWS]
    for where, row in rows:
        if "text" in row:
            text_field(row, "text", where)
        else:
            prompt_and_completion(row, where)
    return [row for _, row in rows]
