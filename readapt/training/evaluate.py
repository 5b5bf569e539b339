"""How good an adapter is: loss, exact match and chrF on held-out rows, the gate, and golden completions."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapters.files import Adapter
from cluster.config.readapt import GateConfig
from cluster.extras import optional_imports
from readapt.training.causal_lm import CausalLM
from readapt.training.chats import Prompt
from readapt.training.data import IGNORED, BatchTensors, Encoded, Encoder, Row, by_length, collate
from readapt.training.greedy import greedy
from readapt.training.lora import attached
from readapt.training.sequential import failing_hits, fewest_hits, likely_rise, looks

Metric = Literal["exact_match", "chrf"]
SPARE_TOKENS = 8  # an answer may be this much longer than the longest reference
ANSWER_ROWS = 64  # generated at once: the fastest of 16, 64 and 200 for a model of 3 M parameters on one core


@dataclass(frozen=True)
class Evaluation:
    """The loss and the quality of an adapter on held-out rows.

    `loss` is nats per completion token (eos included). `quality` is in points from 0 to 100, more is better, over the
    first `num_rows` rows. If these are not all rows (`is_complete` is false), the gate is certain or nearly certain to
    be missed; the quality is then an estimate, and nothing is shipped on it.

    `loss` is over the same rows for exact match, and over the rows up to the first look for chrF. `first_loss` is the
    loss of the rows up to the first look. These are always the same rows, so it compares evaluations that ended at
    different looks. None means `loss` itself.
    """

    loss: float
    quality: float
    num_rows: int = 0
    is_complete: bool = True
    first_loss: float | None = None


@dataclass(frozen=True)
class Gate:
    """What an adapter must reach to ship: at most `tolerance_points` below `reference`.

    `lowered` may reduce the reference, but not below `floor`.
    """

    reference: float
    tolerance_points: float
    floor: float = -math.inf

    @classmethod
    def beside(cls, old_quality: float, config: GateConfig) -> "Gate":
        """Return the gate for the successor of an adapter with quality `old_quality`."""
        return cls(old_quality, config.tolerance_points, old_quality - config.max_drop_points)

    @property
    def least(self) -> float:
        """The lowest quality that passes."""
        return self.reference - self.tolerance_points

    def passes(self, quality: float) -> bool:
        """Return whether a quality, measured on all rows, is good enough to ship."""
        return quality >= self.least

    def lowered(self, scratch_quality: float) -> "Gate":
        """Return the gate after scratch training has reached only `scratch_quality` on the new base.

        The task may have become harder. The reference never rises, and never falls below the floor: an adapter that
        lost more is not shipped, and the old version keeps serving.
        """
        return replace(self, reference=min(self.reference, max(scratch_quality, self.floor)))


class Verdict(StrEnum):
    """What happens to a training run after an evaluation: it continues, is ready to ship, or is dropped as hopeless."""

    GO_ON = "go_on"
    READY = "ready"
    DROP = "drop"


class Watcher:
    """Ends a training run at the second pass of the gate in a row, or at its start if the start passes.

    A run is evaluated many times on the same rows, so a single pass may be luck. The start is evaluated only once.

    With `trial`, a run is dropped if `trial` evaluations after its start have not lowered the loss: training then
    destroyed what the start knew, or the start was of no use. Losses are compared on the same rows (`first_loss`).
    Without `trial` (None) a run gets all its steps.
    """

    def __init__(self, gate: Gate, trial: int | None = None):
        self._gate = gate
        self._trial = trial
        self._losses: list[float] = []
        self._num_passes = 0  # in a row

    def __call__(self, evaluation: Evaluation) -> Verdict:
        """Return what happens to the run next; call it with each evaluation in turn."""
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
    """Return the logits [Y, V] that predict each label, the labels [Y], and each label's row in the batch [Y].

    The head runs only where a label is predicted. With short labels these are few positions of a long prompt.
    """
    device = model.device
    hidden_BTD = model.base_model(
        input_ids=batch.input_ids_BT.to(device), attention_mask=batch.attention_mask_BT.to(device), use_cache=False
    ).last_hidden_state
    labels_BT = batch.labels_BT[:, 1:].to(device)
    is_label_BT = labels_BT != IGNORED
    logits_YV = model.get_output_embeddings()(hidden_BTD[:, :-1][is_label_BT])
    return logits_YV.float(), labels_BT[is_label_BT], is_label_BT.nonzero()[:, 0]


class Evaluator:
    """Evaluates the adapter that is on `model` at the time of the call, always on the same rows in the same order.

    The metric "exact_match" is teacher-forced: greedy decoding writes the target exactly if and only if the target
    token is the argmax at each position. One forward pass therefore replaces the generation. "chrf" generates greedily
    and answers equal prompts once; its loss is over the rows up to the first look.

    With a `gate`, an evaluation ends early once the gate will very probably be missed. Of the adapters that would pass,
    at most 1 - `confidence` are given up by mistake (see `sequential`: exact for exact match, approximate for chrF). An
    adapter passes only on all rows. `complete` always uses all rows: call it before a quality is shipped or compared,
    or a gate is lowered to it. `seed` sets the order of the rows.
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
        self._model = model
        self._encoder = encoder
        rows = list(rows) if gate is None else random.Random(seed).sample(list(rows), len(rows))
        ends = [len(rows)] if gate is None else looks(len(rows))
        encoded = encoder.encode_all(rows)
        self._num_rows = len(rows)
        self._chunks = [_length_sorted_batches(encoded[start:end], batch_rows) for start, end in pairwise([0, *ends])]
        self._given_up: dict[int, int] = {}  # by look: the most hits with which the evaluation ends there
        self._texts: _Texts | None = None
        if metric == "chrf":
            self._texts = _Texts(encoder, rows, encoded, ends, gate, confidence)
        elif gate is not None:
            self._given_up = failing_hits(len(rows), fewest_hits(len(rows), gate.passes), confidence)

    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now, up to the first look at which the gate is out of reach."""
        return self._evaluate(may_stop=True)

    def complete(self) -> Evaluation:
        """Evaluate the model as it is now, on all rows."""
        return self._evaluate(may_stop=False)

    def loss(self) -> float:
        """Return only the loss, on all rows. It needs no generation, whatever the metric."""
        return sum((self._teacher_forced(chunk) for chunk in self._chunks), _Counts()).loss

    def _evaluate(self, *, may_stop: bool) -> Evaluation:
        if self._texts is None:
            return self._exact_match(may_stop=may_stop)
        loss = self._teacher_forced(self._chunks[0]).loss
        quality, num_rows = self._texts.chrf(self._model, may_stop=may_stop)
        return Evaluation(loss, quality, num_rows, num_rows == self._num_rows)

    def _exact_match(self, *, may_stop: bool) -> Evaluation:
        seen = _Counts()
        first_loss = None
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
            logits_YV, labels_Y, rows_Y = label_logits(self._model, batch)
            loss_sum = cross_entropy(logits_YV, labels_Y, reduction="sum").item()
            num_rows = len(batch.input_ids_BT)
            missed_rows = rows_Y[logits_YV.argmax(-1) != labels_Y].unique()
            seen += _Counts(loss_sum, len(labels_Y), num_rows, num_rows - len(missed_rows))
        return seen


class _Texts:
    """Rows that are answered in free text and scored by chrF, look by look."""

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        encoded: Sequence[Encoded],
        ends: Sequence[int],
        gate: Gate | None,
        confidence: float,
    ):
        self._encoder = encoder
        self._ends = ends
        self._prompts = [row.input_ids[: row.num_prompt_tokens] for row in encoded]
        self._references = [row.completion.strip() for row in rows]
        self._max_answer_tokens = max(len(row.input_ids) - row.num_prompt_tokens for row in encoded) + SPARE_TOKENS
        self._asked = -math.inf if gate is None else gate.least
        self._confidence = confidence

    def chrf(self, model: CausalLM, *, may_stop: bool) -> tuple[float, int]:
        """Return the score of the corpus, or of the rows up to the look at which it was given up, and the row count."""
        with optional_imports():
            from sacrebleu.metrics.chrf import CHRF  # only tasks of free text need it

        chrf = CHRF()
        answers: dict[tuple[int, ...], str] = {}
        num_rows = 0
        quality = 0.0
        for num_rows in self._ends:
            self._answer(model, self._prompts[:num_rows], answers)
            texts = [answers[prompt].strip() for prompt in self._prompts[:num_rows]]
            wanted = self._references[:num_rows]
            quality = float(chrf.corpus_score(texts, [wanted]).score)
            if may_stop and num_rows < len(self._prompts):
                by_row = [chrf.sentence_score(t, [w]).score for t, w in zip(texts, wanted, strict=True)]
                if quality + self._margin(by_row) < self._asked:
                    break
        return quality, num_rows

    def _margin(self, by_row: Sequence[float]) -> float:
        return likely_rise(by_row, len(self._prompts), self._confidence, num_looks=len(self._ends) - 1)

    def _answer(self, model: CausalLM, prompts: Sequence[tuple[int, ...]], answers: dict[tuple[int, ...], str]) -> None:
        """Answer the prompts that have no answer yet. Some tasks have several references for one prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in answers]
        texts = greedy(model, self._encoder, new, self._max_answer_tokens, ANSWER_ROWS)
        answers.update(zip(new, texts, strict=True))


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
    """Evaluate one adapter on a bare model, which is bare again afterwards."""
    with attached(model, adapter):
        return Evaluator(model, encoder, rows, metric)()


def golden(model: CausalLM, encoder: Encoder, prompts: Sequence[Prompt], max_tokens: int) -> list[dict[str, Any]]:
    """Return greedy completions as the server answers them: `[{"prompt": ..., "completion": ...}, ...]`.

    A prompt that is a chat is given as its tokens.
    """
    tokens = [encoder.encode_prompt(prompt) for prompt in prompts]
    texts = greedy(model, encoder, tokens, max_tokens, batch_rows=16)
    stored = [prompt if isinstance(prompt, str) else ids for prompt, ids in zip(prompts, tokens, strict=True)]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(stored, texts, strict=True)]
