"""Turn the scheduler's output into the tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import replace
from operator import sub
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import AttentionMetadata
from serving.adapters.cache import ResidentAdapter
from serving.adapters.device_copy import PendingCopy
from serving.engine.running import BASE_ONLY, IntArray, SchedulerOutput
from serving.model.batch import Batch, LoraBatch, LoraLayout


class BatchBuilder:
    """Builds batches on one device.

    Keeps the last batch's LoraBatch, with what the kernels derived from it: while all sequences decode and none comes
    or goes, the next batch has the same one.
    """

    def __init__(self, page_tokens: int, device: torch.device, layout: LoraLayout):
        self._page_tokens = page_tokens
        self._device = device
        self._layout = layout
        self._adapters: tuple[ResidentAdapter, ...] = ()
        self._starts: tuple[list[int], list[int]] = [], []  # of each adapter's tokens, and of those that sample
        self._last_lora: LoraBatch | None = None

    def build(self, scheduled: SchedulerOutput) -> Batch:
        """Return the batch of a step with at least one sequence."""
        lengths_B = scheduled.ends_B - scheduled.starts_B
        query_starts = _starts(lengths_B)
        sequences_T = np.arange(len(lengths_B)).repeat(lengths_B)
        positions_T = np.arange(len(sequences_T)) - (query_starts[1:] - scheduled.ends_B)[sequences_T]
        size = self._page_tokens
        pages_T = scheduled.block_tables_BW[sequences_T, positions_T // size].astype(np.int64)
        return Batch(
            tokens_T=self._tensor(_tokens(scheduled, query_starts)),
            positions_T=self._tensor(positions_T),
            slots_T=self._tensor(pages_T * size + positions_T % size),
            attention=AttentionMetadata(
                query_starts=self._tensor(query_starts.astype(np.int32)),
                context_lens=self._tensor(scheduled.ends_B.astype(np.int32)),
                block_tables_BW=self._tensor(scheduled.block_tables_BW),
                max_query_tokens=int(lengths_B.max()),
                max_context_tokens=int(scheduled.ends_B.max()),
            ),
            logit_rows_O=self._tensor(_logit_rows(scheduled, query_starts)),
            lora=self._lora(scheduled, query_starts, scheduled.logit_starts),
        )

    def _lora(self, scheduled: SchedulerOutput, query_starts: IntArray, sample_starts: IntArray) -> LoraBatch | None:
        # Sequences of one adapter are side by side, those of the base last.
        numbers_B = scheduled.adapters_B
        borders = [0, *((numbers_B[1:] != numbers_B[:-1]).nonzero()[0] + 1).tolist()]
        if numbers_B[-1] != BASE_ONLY:
            borders.append(len(numbers_B))
        adapters = tuple(a for first in borders[:-1] if (a := scheduled.sequences[first].resident) is not None)
        if not adapters:
            return None
        return self._lora_of(adapters, query_starts[borders].tolist(), sample_starts[borders].tolist())

    def _lora_of(
        self, adapters: tuple[ResidentAdapter, ...], token_starts: list[int], sample_starts: list[int]
    ) -> LoraBatch:
        # ResidentAdapters compare by identity: one that was evicted and came back has other rows.
        starts = token_starts, sample_starts
        if self._last_lora is None or self._adapters != adapters:
            self._last_lora = self._new_lora(adapters, **self._segments(*starts))
        elif self._starts != starts:
            self._last_lora = replace(self._last_lora, **self._segments(*starts))
        elif self._last_lora.pending_copies:
            self._last_lora = replace(self._last_lora, pending_copies=_pending_copies(adapters))
        self._adapters = adapters
        self._starts = starts
        return self._last_lora

    def _segments(self, token_starts: Sequence[int], sample_starts: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a LoraBatch that depend on each adapter's number of tokens."""
        return {
            "token_starts": self._int32(token_starts),
            "sample_starts": self._int32(sample_starts),
            "max_tokens": max(map(sub, token_starts[1:], token_starts)),
            "max_samples": max(map(sub, sample_starts[1:], sample_starts)),
        }

    def _new_lora(self, adapters: tuple[ResidentAdapter, ...], **segments: Any) -> LoraBatch:
        # NumPy joins so many small tables in a third of torch's time.
        ranks_SM = _joined([a.ranks_M for a in adapters])
        is_dora_SM = _joined([a.is_dora_M for a in adapters])
        firsts_S = _starts(np.array([len(a.a_rows_I) for a in adapters]))[:-1]
        return LoraBatch(
            layout=self._layout,
            ranks_SM=self._tensor(ranks_SM),
            scalings_SM=self._tensor(_joined([a.scalings_M for a in adapters])),
            table_starts_SM=self._tensor(_joined([a.table_starts_M for a in adapters]) + firsts_S[:, None]),
            is_dora_SM=self._tensor(is_dora_SM),
            a_rows=torch.cat([a.a_rows_I for a in adapters]),
            b_rows=torch.cat([a.b_rows_I for a in adapters]),
            max_ranks=tuple(ranks_SM.max(0).tolist()),
            has_dora=tuple(is_dora_SM.max(0).tolist()),
            pending_copies=_pending_copies(adapters),
            **segments,
        )

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _starts(lengths_B: NDArray[Any]) -> IntArray:
    """Return where each of B runs begins when they lie end to end, and where the last one ends: [B + 1]."""
    return np.concatenate([[0], lengths_B.cumsum()])


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Stack arrays of one length as rows. `np.stack` takes four times as long."""
    return np.concatenate(arrays).reshape(len(arrays), -1)


def _tokens(scheduled: SchedulerOutput, query_starts: IntArray) -> IntArray:
    """Return all scheduled tokens end to end. Most sequences have one: their last."""
    firsts_B, ends_B = query_starts[:-1], query_starts[1:]
    tokens_T = np.empty(query_starts[-1], np.int64)
    tokens_T[ends_B - 1] = scheduled.last_tokens_B
    for i in np.flatnonzero((ends_B - firsts_B > 1) | ~scheduled.does_sample_B).tolist():
        first, end = scheduled.starts_B[i], scheduled.ends_B[i]
        tokens_T[firsts_B[i] : ends_B[i]] = scheduled.sequences[i].tokens[first:end]
    return tokens_T


def _logit_rows(scheduled: SchedulerOutput, query_starts: IntArray) -> IntArray:
    """Return the tokens whose logits are wanted: those before sampled tokens, and those before scored ones."""
    sampled = query_starts[1:][scheduled.does_sample_B] - 1
    scoring = np.flatnonzero(scheduled.num_scores_B).tolist()
    if not scoring:
        return sampled
    firsts_B = query_starts[:-1] + scheduled.score_starts_B - scheduled.starts_B
    scored = [np.arange(firsts_B[i], firsts_B[i] + scheduled.num_scores_B[i]) for i in scoring]
    return np.sort(np.concatenate([sampled, *scored]))


def _pending_copies(adapters: Sequence[ResidentAdapter]) -> tuple[PendingCopy, ...]:
    return tuple(a.pending_copy for a in adapters if a.pending_copy is not None and not a.pending_copy.has_ended)
