"""How near base + adapter come to the tuned model: KL of the next-token distributions, and the same first choice.

Shape letters: B rows, T tokens, N scored positions, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.errors import InvalidDataError
from readapt.extraction.anatomy import Kind, Place
from readapt.extraction.files import ADAPTER_PREFIX, REMAINDER, WEIGHTS, Extraction, apply_remainder
from readapt.extraction.report import read_report, write_report
from readapt.training.data import Encoded, Row, by_length, collate, encoder_for
from readapt.training.lora import load_base

MAX_ROWS, MAX_TOKENS, BATCH_ROWS = 128, 512, 8


@dataclass(frozen=True)
class Likeness:
    """Over all scored positions: mean KL(tuned || adapted) in nats, and the share with the same most likely token."""

    kl: float
    top1_agreement: float


def verify(done: Extraction, base: Path, tuned: Path, data: Path) -> dict[str, Any]:
    """Compare bare base, every adapter, and adapter + remainder with the tuned model, on the first rows of `data`.

    `curve` is the pruning curve: the largest adapter cut to its leading ranks. Scored are the tokens of completions, or
    of whole texts. Where the vocabulary has grown, rows with new tokens are left out and distributions compared on the
    shared part. Needs both models in memory. InvalidDataError for rows that cannot be used, or no language model.
    """
    if not done.anatomy.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise InvalidDataError(f"--verify needs a causal language model; this is {done.anatomy.architecture!r}.")
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
        {"max_rank": rank, "parameters": subject.merge(_largest(done), rank), **likeness()} for rank in _ladder(done)
    ]
    if (done.folder / REMAINDER).exists() and not any(part.num_new_rows for part in done.parts):
        subject.merge(_largest(done))
        apply_remainder(model, done.folder / REMAINDER)
        result["largest_with_remainder"] = likeness()
    return result


def verify_into_report(done: Extraction, base: Path, tuned: Path, data: Path) -> None:
    """Verify, and put what comes of it into the extraction's report and plot."""
    write_report(done, {**read_report(done.folder), "verify": verify(done, base, tuned, data)})


@torch.no_grad()
def compare(reference: Any, model: Any, rows: Sequence[Encoded]) -> Likeness:
    """Likeness of a model to a reference on encoded rows, in batches of like length."""
    kl, num_same, num_scored = 0.0, 0, 0
    ordered = by_length(rows)
    for start in range(0, len(ordered), BATCH_ROWS):
        batch = collate(ordered[start : start + BATCH_ROWS])
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "use_cache": False}
        is_scored_BT = batch.labels_BT[:, 1:] >= 0
        ours_NV = model(**inputs).logits[:, :-1][is_scored_BT].double().log_softmax(-1)
        theirs_NV = reference(**inputs).logits[:, :-1][is_scored_BT][:, : ours_NV.shape[1]].double().log_softmax(-1)
        kl += float((theirs_NV.exp() * (theirs_NV - ours_NV)).sum())
        num_same += int((theirs_NV.argmax(-1) == ours_NV.argmax(-1)).sum())
        num_scored += len(ours_NV)
    return Likeness(kl / num_scored, num_same / num_scored)


class _Subject:
    """A model in the base's weights that adapters are merged into, one after the other."""

    def __init__(self, model: Any, done: Extraction):
        self._places = {place.module: place for part in done.parts for place in part.places}
        state = model.state_dict()
        self._state = state
        self._originals = {m: state[f"{m}.weight"].clone() for m in self._places if f"{m}.weight" in state}

    def merge(self, folder: Path, max_rank: int | None = None) -> int:
        """Sets the weights to base + adapter, of which only the leading ranks count; returns the adapter's size."""
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
    """Both factors as matrices (rank, in) and (out, rank), of whatever kind the module is."""
    name = ADAPTER_PREFIX + place.module
    if f"{name}.lora_embedding_A" in names:
        return stored.get_tensor(f"{name}.lora_embedding_B").float().T, stored.get_tensor(
            f"{name}.lora_embedding_A"
        ).float().T
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


def _ladder(done: Extraction) -> list[int]:
    """1, 2, 4, ... up to the largest rank of any adapter."""
    top = max(rank for ranks in done.ranks.values() for rank in ranks.values())
    return [*(1 << power for power in range(top.bit_length()) if 1 << power < top), top]


def encode_rows(data: Path, tuned: Path, vocabulary: int) -> list[Encoded]:
    """Encode the first rows of a JSONL file; those with tokens beyond the vocabulary are left out."""
    encoder = encoder_for(tuned, MAX_TOKENS)
    rows = []
    for row in read_rows(data):
        if "text" in row:
            tokens = encoder.encode_prompt(str(row["text"]))[:MAX_TOKENS]
            encoded = Encoded(tuple(tokens), 0)
        else:
            encoded = encoder.encode(Row(str(row["prompt"]), str(row["completion"])))
        if max(encoded.input_ids) < vocabulary and len(encoded.input_ids) > 1:
            rows.append(encoded)
    if not rows:
        raise InvalidDataError(f"{data}: no row is left to verify with.")
    return rows


def read_rows(data: Path) -> list[Mapping[str, Any]]:
    """The first rows of a JSONL file of texts, or prompts and completions; InvalidDataError for any other."""
    try:
        lines = data.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()][:MAX_ROWS]
    except (OSError, ValueError) as error:
        raise InvalidDataError(f"{data}: cannot be read as one JSON object a line: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not ("text" in row or {"prompt", "completion"} <= row.keys()):
            raise InvalidDataError(f"{data}: row {number} has neither `text` nor `prompt` and `completion`.")
    return rows
