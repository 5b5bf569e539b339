"""From the scheduler's chunks to the tensors of one forward pass.

Shape letters as in `serving.batch`: T tokens, N sequences, B blocks of the longest sequence, S adapter segments, M
target modules of the whole model, O rows whose logits are wanted.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate, groupby
from operator import sub
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from serving.adapters import ResidentAdapter
from serving.arrival import Arrival
from serving.batch import Batch, LoraBatch, LoraLayout
from serving.sequence import Chunk, Sequence


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

    def build(self, chunks: Seq[Chunk]) -> Batch:
        """The batch of some chunks, those of one adapter side by side and those without one last; never empty."""
        sequences, starts, contexts, does_sample = zip(*chunks, strict=True)
        contexts_N, samples_N = _tensor(contexts), _tensor(does_sample)
        lengths_N = contexts_N - _tensor(starts)
        query_starts, sample_starts = _starts(lengths_N), _starts(samples_N)
        ends_N = query_starts[1:]
        sequences_T = torch.repeat_interleave(lengths_N)
        positions_T = torch.arange(len(sequences_T)) - (ends_N - contexts_N)[sequences_T]
        tables_NB, size = self._block_tables(sequences, max(contexts)), self._page_tokens
        slots_T = tables_NB[sequences_T, positions_T // size].long() * size + positions_T % size
        tokens = [token for sequence, start, end, _ in chunks for token in sequence.tokens[start:end]]
        return Batch(
            tokens_T=_tensor(tokens).to(self._device),
            positions_T=positions_T.to(self._device),
            slots_T=slots_T.to(self._device),
            query_starts=query_starts.to(self._device, torch.int32),
            context_lens=contexts_N.to(self._device, torch.int32),
            block_tables_NB=tables_NB.to(self._device),
            logit_rows_O=(ends_N[samples_N] - 1).to(self._device),
            max_query_tokens=int(lengths_N.max()),
            max_context_tokens=max(contexts),
            lora=self._lora(sequences, query_starts, sample_starts),
        )

    def _block_tables(self, sequences: Seq[Sequence], max_context_tokens: int) -> Tensor:
        """Joined as bytes: a list of lists would make an object of every entry of every step."""
        num_blocks = -(-max_context_tokens // self._page_tokens)
        num_bytes = num_blocks * 4
        rows = [sequence.pages.tobytes()[:num_bytes].ljust(num_bytes, b"\0") for sequence in sequences]
        return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), num_blocks)

    def _lora(self, sequences: Seq[Sequence], query_starts: Tensor, sample_starts: Tensor) -> LoraBatch | None:
        residents = [sequence.resident for sequence in sequences]
        groups = [(adapter, sum(1 for _ in group)) for adapter, group in groupby(residents) if adapter is not None]
        if not groups:
            return None
        adapters, sizes = zip(*groups, strict=True)
        borders = list(accumulate(sizes, initial=0))  # the sequences of each adapter are side by side, first of all
        return self._lora_of(adapters, query_starts[borders].tolist(), sample_starts[borders].tolist())

    def _lora_of(
        self, adapters: tuple[ResidentAdapter, ...], token_starts: list[int], sample_starts: list[int]
    ) -> LoraBatch:
        # An evicted adapter that comes back is another object, with other rows: identity is the right comparison.
        starts = token_starts, sample_starts
        if self._last_lora is None or self._adapters != adapters:
            self._last_lora = _make_lora(adapters, self._layout, **self._segments(*starts))
        elif self._starts != starts:
            self._last_lora = replace(self._last_lora, **self._segments(*starts))
        elif self._last_lora.arrivals:
            self._last_lora = replace(self._last_lora, arrivals=_under_way(adapters))
        self._adapters, self._starts = adapters, starts
        return self._last_lora

    def _segments(self, token_starts: Seq[int], sample_starts: Seq[int]) -> dict[str, Any]:
        """What of a LoraBatch depends on how many tokens each adapter has in the batch."""
        return {
            "token_starts": self._int32(token_starts),
            "sample_starts": self._int32(sample_starts),
            "max_tokens": max(map(sub, token_starts[1:], token_starts)),
            "max_samples": max(map(sub, sample_starts[1:], sample_starts)),
        }

    def _int32(self, values: Seq[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def _tensor(values: Seq[int]) -> Tensor:
    """By way of NumPy, which takes a quarter of the time."""
    return torch.from_numpy(np.array(values))


def _starts(lengths_N: Tensor) -> Tensor:
    """Where each of some runs side by side begins, and where the last one ends: int64 [N + 1]."""
    return pad(lengths_N.cumsum(0), (1, 0))


def _under_way(adapters: Seq[ResidentAdapter]) -> tuple[Arrival, ...]:
    return tuple(a.arrival for a in adapters if a.arrival is not None and not a.arrival.has_ended)


def _make_lora(adapters: tuple[ResidentAdapter, ...], layout: LoraLayout, **segments: Any) -> LoraBatch:
    firsts = accumulate((len(adapter.a_rows_N) for adapter in adapters[:-1]), initial=0)
    return LoraBatch(
        layout=layout,
        ranks_SM=torch.stack([adapter.ranks_M for adapter in adapters]),
        scalings_SM=torch.stack([adapter.scalings_M for adapter in adapters]),
        table_starts_SM=torch.stack([a.table_starts_M + first for a, first in zip(adapters, firsts, strict=True)]),
        is_dora_SM=torch.stack([adapter.is_dora_M for adapter in adapters]),
        a_rows=torch.cat([adapter.a_rows_N for adapter in adapters]),
        b_rows=torch.cat([adapter.b_rows_N for adapter in adapters]),
        max_ranks=tuple(map(max, zip(*(adapter.ranks for adapter in adapters), strict=True))),
        has_dora=tuple(map(any, zip(*(adapter.is_dora for adapter in adapters), strict=True))),
        arrivals=_under_way(adapters),
        **segments,
    )
