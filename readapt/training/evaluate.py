"""How good an adapter is: loss, exact match and chrF on held-out rows, the gate, and golden completions.

Shape letters: B rows, T tokens, L label positions, V vocabulary.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapter_files import Adapter
from cluster.config import GateConfig
from readapt.training.causal_lm import CausalLM
from readapt.training.data import IGNORED, BatchTensors, Encoded, Encoder, Row, by_length, collate
from readapt.training.greedy import greedy
from readapt.training.lora import attached
from readapt.training.sequential import failing_hits, fewest_hits, likely_rise, looks

Metric = Literal["exact_match", "chrf"]
SPARE_TOKENS = 8  # an answer may be so much longer than the longest reference
ANSWER_ROWS = 64  # written side by side: the fastest of 16, 64 and 200 for a model of 3 M parameters on one core


@dataclass(frozen=True)
class Evaluation:
    """`loss` is nats per completion token (eos included); `quality` is in points, 0 to 100, more is better.

    `quality` is over the `num_rows` rows that were looked at. Where these are not all (`is_complete` false), the gate
    that was asked is certain or nearly certain not to be passed, and it is an estimate on which nothing is shipped.
    `loss` is over the same rows or, where quality is not read off the same forward, the first of them. `first_loss` is
    that of the rows up to the first look, always the same ones, by which evaluations are compared whatever rows they
    saw; None for `loss` itself.
    """

    loss: float
    quality: float
    num_rows: int = 0
    is_complete: bool = True
    first_loss: float | None = None


@dataclass(frozen=True)
class Gate:
    """Ready means: at most `tolerance_points` below `reference`, which may be lowered as far as `floor`."""

    reference: float
    tolerance_points: float
    floor: float = -math.inf

    @classmethod
    def beside(cls, old_quality: float, config: GateConfig) -> "Gate":
        """The gate of a successor to an adapter of that quality."""
        return cls(old_quality, config.tolerance_points, old_quality - config.max_drop_points)

    @property
    def least(self) -> float:
        """The quality that is asked for."""
        return self.reference - self.tolerance_points

    def passes(self, quality: float) -> bool:
        """Whether a quality, measured on all rows, is good enough to ship."""
        return quality >= self.least

    def lowered(self, scratch_quality: float) -> "Gate":
        """The gate where scratch training reaches only that much: the task has become harder on the new base.

        Never higher than before, and never below the floor: what has lost more is not shipped, and the old version
        serves on.
        """
        return replace(self, reference=min(self.reference, max(scratch_quality, self.floor)))


class Verdict(StrEnum):
    """What becomes of a training run after an evaluation: it goes on, is ready to ship, or is not worth more steps."""

    GO_ON = "go_on"
    READY = "ready"
    DROP = "drop"


class Watcher:
    """Ends a training run at the second pass of the gate in a row, or at its start if that passes already.

    A run is evaluated many times on the same rows, so that a single pass may be luck; its start is evaluated once. One
    that after `trial` further evaluations has not had a lower loss than at its start is dropped: what it began with has
    been thrown away, or was of no use. Losses are those of the same rows each time (`first_loss`). None: it is given
    all its steps.
    """

    def __init__(self, gate: Gate, trial: int | None = None):
        self._gate, self._trial = gate, trial
        self._losses: list[float] = []
        self._num_passes = 0  # in a row

    def __call__(self, evaluation: Evaluation) -> Verdict:
        """Whether the run may end now; called with each evaluation in turn."""
        loss = evaluation.loss if evaluation.first_loss is None else evaluation.first_loss
        self._losses.append(loss if math.isfinite(loss) else math.inf)
        self._num_passes = self._num_passes + 1 if self._gate.passes(evaluation.quality) else 0
        if self._num_passes >= min(2, len(self._losses)):
            return Verdict.READY
        return Verdict.DROP if self._is_hopeless() else Verdict.GO_ON

    def _is_hopeless(self) -> bool:
        start, *later = self._losses
        return self._trial is not None and len(later) >= self._trial and not min(later) < start


def label_logits(model: CausalLM, batch: BatchTensors) -> tuple[Tensor, Tensor, Tensor]:
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
    """Judges whatever adapter is on `model` at the time of the call, always on the same rows in the same order.

    `metric` "exact_match" is teacher-forced: greedy decoding writes the target exactly if and only if the target token
    is the argmax at each of its positions, so one forward replaces the generation. "chrf" generates greedily, and
    answers equal prompts once; its loss is of the rows up to the first look.

    With a `gate`, an evaluation ends early where the gate will not be passed: as soon as that is so probable that of
    the adapters that do pass at most 1 - `confidence` are given up (see `sequential`: exact for exact match, near
    enough for chrF). An adapter passes on all rows only. `complete` looks at all rows in any case: ask it before a
    quality is shipped or compared, or a gate is lowered to it. `seed` decides the order of the rows.
    """

    def __init__(
        self,
        model: CausalLM,
        encoder: Encoder,
        rows: Sequence[Row],
        metric: Metric,
        batch_rows: int = 32,
        *,
        gate: Gate | None = None,
        confidence: float = 0.999,
        seed: int = 0,
    ):
        self._model, self._encoder = model, encoder
        rows = list(rows) if gate is None else random.Random(seed).sample(list(rows), len(rows))
        ends = [len(rows)] if gate is None else looks(len(rows))
        encoded = encoder.encode_all(rows)
        self._num_rows = len(rows)
        self._chunks = [_length_sorted_batches(encoded[start:end], batch_rows) for start, end in pairwise([0, *ends])]
        self._given_up: dict[int, int] = {}  # by look
        self._texts: _Texts | None = None
        if metric == "chrf":
            self._texts = _Texts(encoder, rows, encoded, ends, gate, confidence)
        elif gate is not None:
            self._given_up = failing_hits(len(rows), fewest_hits(len(rows), gate.passes), confidence)

    def __call__(self) -> Evaluation:
        """Evaluates the model as it is now, up to the first look at which the gate is out of reach."""
        return self._evaluate(may_stop=True)

    def complete(self) -> Evaluation:
        """Evaluates the model as it is now, on all rows."""
        return self._evaluate(may_stop=False)

    def loss(self) -> float:
        """The loss alone, on all rows: one forward whatever the metric."""
        return sum((self._teacher_forced(chunk) for chunk in self._chunks), _Counts()).loss

    def _evaluate(self, *, may_stop: bool) -> Evaluation:
        if self._texts is None:
            return self._exact_match(may_stop=may_stop)
        loss = self._teacher_forced(self._chunks[0]).loss
        quality, num_rows = self._texts.chrf(self._model, may_stop=may_stop)
        return Evaluation(loss, quality, num_rows, num_rows == self._num_rows)

    def _exact_match(self, *, may_stop: bool) -> Evaluation:
        seen, first_loss = _Counts(), None
        for chunk in self._chunks:
            seen += self._teacher_forced(chunk)
            first_loss = seen.loss if first_loss is None else first_loss
            if may_stop and seen.num_exact <= self._given_up.get(seen.num_rows, -1):
                break
        quality = 100.0 * seen.num_exact / seen.num_rows
        return Evaluation(seen.loss, quality, seen.num_rows, seen.num_rows == self._num_rows, first_loss)

    @torch.no_grad()
    def _teacher_forced(self, batches: Sequence[BatchTensors]) -> "_Counts":
        seen = _Counts()
        for batch in batches:
            logits_LV, labels_L, rows_L = label_logits(self._model, batch)
            loss_sum = cross_entropy(logits_LV, labels_L, reduction="sum").item()
            num_rows, missed_rows = len(batch.input_ids_BT), rows_L[logits_LV.argmax(-1) != labels_L].unique()
            seen += _Counts(loss_sum, len(labels_L), num_rows, num_rows - len(missed_rows))
        return seen


class _Texts:
    """Rows that are answered in free text and judged by chrF, look by look."""

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        encoded: Sequence[Encoded],
        ends: Sequence[int],
        gate: Gate | None,
        confidence: float,
    ):
        self._encoder, self._ends = encoder, ends
        self._prompts = [row.input_ids[: row.num_prompt_tokens] for row in encoded]
        self._references = [row.completion.strip() for row in rows]
        self._max_answer_tokens = max(len(row.input_ids) - row.num_prompt_tokens for row in encoded) + SPARE_TOKENS
        self._asked = -math.inf if gate is None else gate.least
        self._confidence = confidence

    def chrf(self, model: CausalLM, *, may_stop: bool) -> tuple[float, int]:
        """Of the whole corpus, or of the rows up to the look at which it was given up; and the number of rows."""
        from sacrebleu.metrics.chrf import CHRF  # imported here: only tasks of free text need it

        chrf, found, num_rows, quality = CHRF(), dict[tuple[int, ...], str](), 0, 0.0
        texts: list[str] = []
        for num_rows in self._ends:
            self._answer(model, self._prompts[:num_rows], found)
            texts = [found[prompt].strip() for prompt in self._prompts[:num_rows]]
            wanted = self._references[:num_rows]
            quality = float(chrf.corpus_score(texts, [wanted]).score)
            if may_stop and num_rows < len(self._prompts):
                by_row = [chrf.sentence_score(t, [w]).score for t, w in zip(texts, wanted, strict=True)]
                if quality + self._margin(by_row) < self._asked:
                    break
        return quality, num_rows

    def _margin(self, by_row: Sequence[float]) -> float:
        return likely_rise(by_row, len(self._prompts), self._confidence, num_looks=len(self._ends) - 1)

    def _answer(self, model: CausalLM, prompts: Sequence[tuple[int, ...]], found: dict[tuple[int, ...], str]) -> None:
        """Adds what is missing: many a task has several references for one prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        texts = greedy(model, self._encoder, new, self._max_answer_tokens, ANSWER_ROWS)
        found.update(zip(new, texts, strict=True))


@dataclass(frozen=True)
class _Counts:
    loss_sum: float = 0.0
    num_labels: int = 0
    num_rows: int = 0
    num_exact: int = 0

    @property
    def loss(self) -> float:
        return self.loss_sum / self.num_labels

    def __add__(self, other: "_Counts") -> "_Counts":
        sums = (mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        return _Counts(*sums)


def _length_sorted_batches(rows: Sequence[Encoded], batch_rows: int) -> list[BatchTensors]:
    in_order = by_length(rows)
    return [collate(in_order[start : start + batch_rows]) for start in range(0, len(in_order), batch_rows)]


def judge(model: CausalLM, adapter: Adapter, encoder: Encoder, rows: Sequence[Row], metric: Metric) -> Evaluation:
    """Evaluates one adapter on a bare model, which is bare again afterwards."""
    with attached(model, adapter):
        return Evaluator(model, encoder, rows, metric)()


def golden(model: CausalLM, encoder: Encoder, prompts: Sequence[str], max_tokens: int) -> list[dict[str, str]]:
    """Greedy completions as a server answers them: `[{"prompt": ..., "completion": ...}, ...]`."""
    texts = greedy(model, encoder, [encoder.encode_prompt(prompt) for prompt in prompts], max_tokens, batch_rows=16)
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
