"""How good an adapter is: loss, exact match and chrF on held-out rows, the gate, and golden completions.

Shape letters: B rows, T tokens, L label positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapter_files import Adapter
from readapt.data import IGNORED, BatchTensors, Encoded, Encoder, Row, collate
from readapt.lora import attach

Metric = Literal["exact_match", "chrf"]


@dataclass(frozen=True)
class Evaluation:
    """`loss` is nats per completion token (eos included); `quality` is in points, 0 to 100, more is better."""

    loss: float
    quality: float


@dataclass(frozen=True)
class Gate:
    """Ready means: at most `tolerance_points` below `reference`."""

    reference: float
    tolerance_points: float

    def passes(self, quality: float) -> bool:
        """Whether a quality is good enough to ship."""
        return quality >= self.reference - self.tolerance_points


class Watcher:
    """Ends a training run at the second pass of the gate in a row, or at its start if that passes already.

    A run is evaluated many times on the same rows, so that a single pass may be luck; its start is evaluated once.
    """

    def __init__(self, gate: Gate):
        self._gate = gate
        self._num_evaluations = 0
        self._num_passes = 0  # in a row

    def __call__(self, evaluation: Evaluation) -> bool:
        """Whether the run may end now; called with each evaluation in turn."""
        self._num_evaluations += 1
        self._num_passes = self._num_passes + 1 if self._gate.passes(evaluation.quality) else 0
        return self._num_passes >= min(2, self._num_evaluations)


def label_logits(model: Any, batch: BatchTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [L, V] that predict each label, the labels [L] and each one's row in the batch [L].

    The head runs on label positions only: on a short label this is a few rows instead of the whole prompt.
    """
    device = model.device
    hidden_BTD = model.base_model(
        input_ids=batch.input_ids_BT.to(device), attention_mask=batch.attention_mask_BT.to(device), use_cache=False
    ).last_hidden_state
    labels_BT = batch.labels_BT[:, 1:].to(device)
    is_label_BT = labels_BT != IGNORED
    logits_LV = model.get_output_embeddings()(hidden_BTD[:, :-1][is_label_BT])
    return logits_LV.float(), labels_BT[is_label_BT], is_label_BT.nonzero()[:, 0]


class Evaluator:
    """Judges whatever adapter is on `model` at the time of the call, always on the same rows.

    `metric` "exact_match" is teacher-forced: greedy decoding writes the target exactly if and only if the target token
    is the argmax at each of its positions, so one forward replaces the generation. "chrf" generates greedily.
    """

    def __init__(self, model: Any, encoder: Encoder, rows: Sequence[Row], metric: Metric, batch_rows: int = 64):
        self._model = model
        self._encoder = encoder
        self._rows = list(rows)
        self._metric = metric
        self._batch_rows = batch_rows
        self._batches = _length_sorted_batches(encoder.encode_all(rows), batch_rows)

    def __call__(self) -> Evaluation:
        """Evaluates the model as it is now."""
        loss, exact_points = self._teacher_forced()
        quality = exact_points if self._metric == "exact_match" else self._chrf()
        return Evaluation(loss, quality)

    def loss(self) -> float:
        """The loss alone: one forward whatever the metric."""
        return self._teacher_forced()[0]

    @torch.no_grad()
    def _teacher_forced(self) -> tuple[float, float]:
        loss_sum, num_labels, num_exact = 0.0, 0, 0
        for batch in self._batches:
            logits_LV, labels_L, rows_L = label_logits(self._model, batch)
            loss_sum += cross_entropy(logits_LV, labels_L, reduction="sum").item()
            num_labels += len(labels_L)
            missed_rows = rows_L[logits_LV.argmax(-1) != labels_L].unique()
            num_exact += len(batch.input_ids_BT) - len(missed_rows)
        return loss_sum / num_labels, 100.0 * num_exact / len(self._rows)

    def _chrf(self) -> float:
        from sacrebleu.metrics.chrf import CHRF  # imported here: only tasks of free text need it

        references = [row.completion for row in self._rows]
        longest = max(int((batch.labels_BT != IGNORED).sum(1).max()) for batch in self._batches)
        prompts = [_prompt_tokens(self._encoder, row) for row in self._rows]
        texts = _greedy(self._model, self._encoder, prompts, longest + 8, self._batch_rows)
        return float(CHRF().corpus_score([t.strip() for t in texts], [[r.strip() for r in references]]).score)


def _length_sorted_batches(rows: Sequence[Encoded], batch_rows: int) -> list[BatchTensors]:
    in_order = sorted(rows, key=lambda row: len(row.input_ids))
    return [collate(in_order[start : start + batch_rows]) for start in range(0, len(in_order), batch_rows)]


def _prompt_tokens(encoder: Encoder, row: Row) -> list[int]:
    encoded = encoder.encode(row)
    return list(encoded.input_ids[: encoded.num_prompt_tokens])


def judge(model: Any, adapter: Adapter, encoder: Encoder, rows: Sequence[Row], metric: Metric) -> Evaluation:
    """Evaluates one adapter on a bare model, which is bare again afterwards."""
    lora = attach(model, adapter)
    try:
        return Evaluator(model, encoder, rows, metric)()
    finally:
        lora.detach()  # whatever happened: workers keep the model for the next adapter


def golden(model: Any, encoder: Encoder, prompts: Sequence[str], max_tokens: int) -> list[dict[str, str]]:
    """Greedy completions as a server answers them: `[{"prompt": ..., "completion": ...}, ...]`."""
    texts = _greedy(model, encoder, [encoder.encode_prompt(prompt) for prompt in prompts], max_tokens, batch_rows=16)
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]


def _greedy(model: Any, encoder: Encoder, prompts: Sequence[list[int]], max_tokens: int, batch_rows: int) -> list[str]:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_rows):
        indices = order[start : start + batch_rows]
        answers = _greedy_batch(model, encoder, [prompts[i] for i in indices], max_tokens)
        for index, answer in zip(indices, answers, strict=True):
            texts[index] = answer
    return texts


@torch.no_grad()
def _greedy_batch(model: Any, encoder: Encoder, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    input_ids_BT = torch.tensor([[encoder.eos_id] * (width - len(p)) + p for p in prompts], device=model.device)
    is_token_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stops = _stop_ids(model, encoder)
    tokens_BT = model.generate(
        input_ids_BT,
        attention_mask=is_token_BT,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=stops,
        pad_token_id=encoder.eos_id,
    )[:, width:]
    return [encoder.decode(_until_stop(tokens, stops)) for tokens in tokens_BT.tolist()]


def _stop_ids(model: Any, encoder: Encoder) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({encoder.eos_id, *(i for i in ids if i is not None)})


def _until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])
