"""The reference of a gate: the old adapter's score on its own rows. A score that says nothing is refused.

An old adapter may score nothing because it is judged wrongly: by rows of another task, without the chat template that
it was trained with, or up to another end token than its own. Nearly anything would pass a gate at such a score.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from cluster.adapters.files import Adapter
from cluster.config.readapt import GateConfig
from cluster.errors import InvalidDataError
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoder, Row, by_length, collate
from readapt.training.evaluate import Evaluation, Evaluator, Metric, label_logits
from readapt.training.lora import attached

FEWEST_ROWS = 5  # fewer rows may all be missed by chance
BATCH_ROWS = 32


def reference(
    model: CausalLM, old: Adapter, encoder: Encoder, rows: Sequence[Row], metric: Metric, config: GateConfig
) -> Evaluation:
    """Evaluate the old adapter on its bare old base, `model`, as the reference of a gate.

    Raises InvalidDataError, with the likely cause, if the score says nothing: it is below
    `config.min_reference_points`, one constant answer would reach it, or the adapter never ends its answers. In free
    text (chrF), if the base alone predicts the rows as well. A minimum of 0 turns these checks off.
    """
    with attached(model, old):
        found = Evaluator(model, encoder, rows, metric)()
        fault = _fault(model, encoder, rows, metric, found, config.min_reference_points)
    if fault is None and metric == "chrf" and config.min_reference_points > 0:
        fault = _no_better_than_bare(model, encoder, rows, found)
    if fault is not None:
        raise InvalidDataError(
            f"the old adapter is no reference for a gate: on {len(rows)} of its own validation rows {fault} "
            "readapt.gate.min_reference_points = 0 turns this check off."
        )
    return found


def _fault(
    model: CausalLM, encoder: Encoder, rows: Sequence[Row], metric: Metric, found: Evaluation, least: float
) -> str | None:
    """Return what is wrong with the score of the adapter on `model`, or None."""
    if least == 0:
        return None
    if found.quality < least:
        return (
            f"it scores {found.quality:.1f} points, and at least {least:g} are needed. {_cause(model, encoder, rows)}"
        )
    if metric == "chrf":
        _, ended = written_and_ended(model, encoder, rows)
        never_ends = ended == 0 and len(rows) >= FEWEST_ROWS
        return f"it never ends its answer. {_end_token(encoder)}" if never_ends else None
    [(commonest, num_common)] = Counter(row.completion for row in rows).most_common(1)
    if found.quality > 100.0 * num_common / len(rows) + 1e-6:  # more is right than the commonest answer
        return None
    others = [row for row in rows if row.completion != commonest]
    if num_common > 1 and len(others) >= FEWEST_ROWS and Evaluator(model, encoder, others, metric)().quality == 0:
        return f"it is right only where the answer is {commonest[:60]!r}, so a constant answer would pass."
    return None


def _no_better_than_bare(model: CausalLM, encoder: Encoder, rows: Sequence[Row], found: Evaluation) -> str | None:
    bare = Evaluator(model, encoder, rows, "exact_match").loss()
    if found.loss < bare:
        return None
    losses = f"{found.loss:.2f} and {bare:.2f} nats per token"
    return f"it predicts the answers no better than its base alone ({losses}). {_other_causes(encoder)}"


def _cause(model: CausalLM, encoder: Encoder, rows: Sequence[Row]) -> str:
    written, ended = written_and_ended(model, encoder, rows)
    if written > ended:
        return f"It writes {written:.0f} % of the answers right, but ends {ended:.0f} % of them. {_end_token(encoder)}"
    return _other_causes(encoder)


def _other_causes(encoder: Encoder) -> str:
    return (
        "Likely causes: the rows are of another task; the prompts lack the chat template that it was trained with; "
        f"or its end token is not {encoder.end_text}."
    )


def _end_token(encoder: Encoder) -> str:
    return (
        f"Answers are read up to {encoder.end_text}. If it was trained with another end token, put the tokenizer files "
        "that it was trained with, or a generation_config.json with its eos_token_id, beside its weights."
    )


@torch.no_grad()
def written_and_ended(model: CausalLM, encoder: Encoder, rows: Sequence[Row]) -> tuple[float, float]:
    """Return two percentages of rows, teacher-forced: the answer without its end token is right; the end token is."""
    num_written = num_ended = 0
    ordered = by_length(encoder.encode_all(rows))
    for start in range(0, len(ordered), BATCH_ROWS):
        batch = ordered[start : start + BATCH_ROWS]
        logits_YV, labels_Y, rows_Y = label_logits(model, collate(batch))
        is_right_Y = logits_YV.argmax(-1) == labels_Y
        is_end_Y = torch.ones_like(is_right_Y)
        is_end_Y[:-1] = rows_Y[1:] != rows_Y[:-1]
        num_written += len(batch) - len(rows_Y[~is_right_Y & ~is_end_Y].unique())
        num_ended += int(is_right_Y[is_end_Y].sum())
    return 100.0 * num_written / len(rows), 100.0 * num_ended / len(rows)
