"""From the scheduler's plan to the tensors of one forward pass.

Shape letters as in `serving.model.batch`: T tokens, N sequences, B blocks of the longest sequence, S adapter segments,
M target modules of the whole model, O rows whose logits are wanted.
"""

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

    Keeps the last batch's adapters, and with them what the kernels have worked out of them: while nobody comes or goes
    and all decode, they are those of the next batch too.
    """

    def __init__(self, page_tokens: int, device: torch.device, layout: LoraLayout):
        self._page_tokens = page_tokens
        self._device = device
        self._layout = layout
        self._adapters: tuple[ResidentAdapter, ...] = ()
        self._starts: tuple[list[int], list[int]] = [], []  # of their tokens, and of those of them that sample
        self._last_lora: LoraBatch | None = None

    def build(self, plan: SchedulerOutput) -> Batch:
        """The batch of a plan; never empty."""
        lengths_N = plan.ends_N - plan.starts_N
        query_starts, sample_starts = _starts(lengths_N), _starts(plan.does_sample_N)
        sequences_T = np.arange(len(lengths_N)).repeat(lengths_N)
        positions_T = np.arange(len(sequences_T)) - (query_starts[1:] - plan.ends_N)[sequences_T]
        size = self._page_tokens
        pages_T = plan.tables_NB[sequences_T, positions_T // size].astype(np.int64)
        return Batch(
            tokens_T=self._tensor(_tokens(plan, query_starts)),
            positions_T=self._tensor(positions_T),
            slots_T=self._tensor(pages_T * size + positions_T % size),
            attention=AttentionMetadata(
                query_starts=self._tensor(query_starts.astype(np.int32)),
                context_lens=self._tensor(plan.ends_N.astype(np.int32)),
                block_tables_BW=self._tensor(plan.tables_NB),
                max_query_tokens=int(lengths_N.max()),
                max_context_tokens=int(plan.ends_N.max()),
            ),
            logit_rows_O=self._tensor(query_starts[1:][plan.does_sample_N] - 1),
            lora=self._lora(plan, query_starts, sample_starts),
        )

    def _lora(self, plan: SchedulerOutput, query_starts: IntArray, sample_starts: IntArray) -> LoraBatch | None:
        # The sequences of each adapter are side by side, those without one last.
        numbers_N = plan.adapters_N
        borders = [0, *((numbers_N[1:] != numbers_N[:-1]).nonzero()[0] + 1).tolist()]
        if numbers_N[-1] != BASE_ONLY:
            borders.append(len(numbers_N))
        adapters = tuple(a for first in borders[:-1] if (a := plan.sequences[first].resident) is not None)
        if not adapters:
            return None
        return self._lora_of(adapters, query_starts[borders].tolist(), sample_starts[borders].tolist())

    def _lora_of(
        self, adapters: tuple[ResidentAdapter, ...], token_starts: list[int], sample_starts: list[int]
    ) -> LoraBatch:
        # An evicted adapter that comes back is another object, with other rows: identity is the right comparison.
        starts = token_starts, sample_starts
        if self._last_lora is None or self._adapters != adapters:
            self._last_lora = self._make_lora(adapters, **self._segments(*starts))
        elif self._starts != starts:
            self._last_lora = replace(self._last_lora, **self._segments(*starts))
        elif self._last_lora.pending_copies:
            self._last_lora = replace(self._last_lora, pending_copies=_under_way(adapters))
        self._adapters, self._starts = adapters, starts
        return self._last_lora

    def _segments(self, token_starts: Sequence[int], sample_starts: Sequence[int]) -> dict[str, Any]:
        """What of a LoraBatch depends on how many tokens each adapter has in the batch."""
        return {
            "token_starts": self._int32(token_starts),
            "sample_starts": self._int32(sample_starts),
            "max_tokens": max(map(sub, token_starts[1:], token_starts)),
            "max_samples": max(map(sub, sample_starts[1:], sample_starts)),
        }

    def _make_lora(self, adapters: tuple[ResidentAdapter, ...], **segments: Any) -> LoraBatch:
        # The tables of modules are put together in NumPy, which takes a third of the time for so many small ones.
        ranks_SM, is_dora_SM = _rows([a.ranks_M for a in adapters]), _rows([a.is_dora_M for a in adapters])
        firsts_S = _starts(np.array([len(a.a_rows_I) for a in adapters]))[:-1]
        return LoraBatch(
            layout=self._layout,
            ranks_SM=self._tensor(ranks_SM),
            scalings_SM=self._tensor(_rows([a.scalings_M for a in adapters])),
            table_starts_SM=self._tensor(_rows([a.table_starts_M for a in adapters]) + firsts_S[:, None]),
            is_dora_SM=self._tensor(is_dora_SM),
            a_rows=torch.cat([a.a_rows_I for a in adapters]),
            b_rows=torch.cat([a.b_rows_I for a in adapters]),
            max_ranks=tuple(ranks_SM.max(0).tolist()),
            has_dora=tuple(is_dora_SM.max(0).tolist()),
            pending_copies=_under_way(adapters),
            **segments,
        )

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _starts(lengths_N: NDArray[Any]) -> IntArray:
    """Where each of some runs side by side begins, and where the last one ends: [N + 1]."""
    return np.concatenate([[0], lengths_N.cumsum()])


def _rows(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of one length as the rows of one: np.stack takes four times as long."""
    return np.concatenate(arrays).reshape(len(arrays), -1)


def _tokens(plan: SchedulerOutput, query_starts: IntArray) -> IntArray:
    """All chunks' tokens, side by side; most are one sequence's last."""
    firsts, ends = query_starts[:-1], query_starts[1:]
    tokens_T = np.empty(query_starts[-1], np.int64)
    tokens_T[ends - 1] = plan.last_tokens_N
    for n in np.flatnonzero((ends - firsts > 1) | ~plan.does_sample_N).tolist():
        tokens_T[firsts[n] : ends[n]] = plan.sequences[n].tokens[plan.starts_N[n] : plan.ends_N[n]]
    return tokens_T


def _under_way(adapters: Sequence[ResidentAdapter]) -> tuple[PendingCopy, ...]:
    return tuple(a.pending_copy for a in adapters if a.pending_copy is not None and not a.pending_copy.has_ended)
