"""An adapter's quality row by row, for the report and for paired comparisons."""

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import mean

import torch

from cluster.adapters.files import Adapter
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoder, Row, collate
from readapt.training.evaluate import SPARE_TOKENS, Metric, label_logits
from readapt.training.greedy import greedy
from readapt.training.lora import attached

BATCH_ROWS = 64


def score(
    model: CausalLM, adapter: Adapter | None, encoder: Encoder, rows: Sequence[Row], metric: Metric
) -> tuple[float, list[float]]:
    """Return the quality in points of an adapter (None: of the bare base) on a bare model, in all and for each row.

    Exact match: 0 or 100 per row, and their mean. chrF: sentence chrF per row, and corpus chrF in all.
    """
    with nullcontext() if adapter is None else attached(model, adapter):
        return _exact_match(model, encoder, rows) if metric == "exact_match" else _chrf(model, encoder, rows)


@torch.no_grad()
def _exact_match(model: CausalLM, encoder: Encoder, rows: Sequence[Row]) -> tuple[float, list[float]]:
    encoded = encoder.encode_all(rows)
    order = sorted(range(len(rows)), key=lambda index: len(encoded[index].input_ids))
    points = [100.0] * len(rows)
    for start in range(0, len(rows), BATCH_ROWS):
        indices = order[start : start + BATCH_ROWS]
        logits_YV, labels_Y, rows_Y = label_logits(model, collate([encoded[i] for i in indices]))
        for missed in rows_Y[logits_YV.argmax(-1) != labels_Y].unique().tolist():
            points[indices[missed]] = 0.0
    return mean(points), points


def _chrf(model: CausalLM, encoder: Encoder, rows: Sequence[Row]) -> tuple[float, list[float]]:
    from sacrebleu.metrics.chrf import CHRF

    encoded = encoder.encode_all(rows)
    prompts = [list(row.input_ids[: row.num_prompt_tokens]) for row in encoded]
    longest = max(len(row.input_ids) - row.num_prompt_tokens for row in encoded) + SPARE_TOKENS
    texts = [text.strip() for text in greedy(model, encoder, prompts, longest, BATCH_ROWS)]
    wanted = [row.completion.strip() for row in rows]
    chrf = CHRF()
    points = [round(chrf.sentence_score(t, [w]).score, 2) for t, w in zip(texts, wanted, strict=True)]
    return float(chrf.corpus_score(texts, [wanted]).score), points
