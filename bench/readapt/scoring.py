"""An adapter's quality row by row, for the report and for paired comparisons.

Shape letters as in `readapt.training.evaluate`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import mean
from typing import Any

import torch

from cluster.adapter_files import Adapter
from readapt.training.data import Encoder, Row, collate
from readapt.training.evaluate import SPARE_TOKENS, Metric, label_logits
from readapt.training.greedy import greedy
from readapt.training.lora import attached

BATCH_ROWS = 64


def score(
    model: Any, adapter: Adapter | None, encoder: Encoder, rows: Sequence[Row], metric: Metric
) -> tuple[float, list[float]]:
    """Quality in points of an adapter (None: the bare base) on a bare model, and of each row in the order of `rows`.

    Exact match: 0 or 100 a row, and their mean. chrF: sentence chrF a row, and corpus chrF for all.
    """
    with nullcontext() if adapter is None else attached(model, adapter):
        return _exact_match(model, encoder, rows) if metric == "exact_match" else _chrf(model, encoder, rows)


@torch.no_grad()
def _exact_match(model: Any, encoder: Encoder, rows: Sequence[Row]) -> tuple[float, list[float]]:
    encoded = encoder.encode_all(rows)
    order = sorted(range(len(rows)), key=lambda index: len(encoded[index].input_ids))
    points = [100.0] * len(rows)
    for start in range(0, len(rows), BATCH_ROWS):
        indices = order[start : start + BATCH_ROWS]
        logits_LV, labels_L, rows_L = label_logits(model, collate([encoded[i] for i in indices]))
        for missed in rows_L[logits_LV.argmax(-1) != labels_L].unique().tolist():
            points[indices[missed]] = 0.0
    return mean(points), points


def _chrf(model: Any, encoder: Encoder, rows: Sequence[Row]) -> tuple[float, list[float]]:
    from sacrebleu.metrics.chrf import CHRF

    encoded = encoder.encode_all(rows)
    prompts = [list(row.input_ids[: row.num_prompt_tokens]) for row in encoded]
    longest = max(len(row.input_ids) - row.num_prompt_tokens for row in encoded) + SPARE_TOKENS
    texts = [text.strip() for text in greedy(model, encoder, prompts, longest, BATCH_ROWS)]
    wanted = [row.completion.strip() for row in rows]
    chrf = CHRF()
    points = [round(chrf.sentence_score(t, [w]).score, 2) for t, w in zip(texts, wanted, strict=True)]
    return float(chrf.corpus_score(texts, [wanted]).score), points
