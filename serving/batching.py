"""From the scheduler's chunks to the tensors of one forward pass.

Shape letters as in `serving.batch`: T tokens, N sequences, B blocks of the longest sequence, S adapter segments, M
target modules of the whole model, O rows whose logits are wanted.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from serving.adapters import ResidentAdapter
from serving.batch import Batch, LoraBatch, LoraLayout
from serving.sequence import Chunk


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
        self._lengths: list[tuple[int, int]] = []  # tokens of each, and those of them that sample
        self._last_lora: LoraBatch | None = None

    def build(self, chunks: Seq[Chunk]) -> Batch:
        """The batch of some chunks, those of one adapter side by side and those without one last; never empty."""
        contexts = [chunk.end for chunk in chunks]
        contexts_N = torch.tensor(contexts)
        lengths_N = contexts_N - torch.tensor([chunk.start for chunk in chunks])
        ends_N = lengths_N.cumsum(0)
        sequences_T = torch.repeat_interleave(lengths_N)
        positions_T = torch.arange(len(sequences_T)) - (ends_N - contexts_N)[sequences_T]
        tables_NB, size = self._block_tables(chunks, max(contexts)), self._page_tokens
        slots_T = tables_NB[sequences_T, positions_T // size].long() * size + positions_T % size
        samples_N = torch.tensor([chunk.does_sample for chunk in chunks])
        return Batch(
            tokens_T=self._int64([t for c in chunks for t in c.sequence.tokens[c.start : c.end]]),
            positions_T=positions_T.to(self._device),
            slots_T=slots_T.to(self._device),
            query_starts=torch.cat([ends_N.new_zeros(1), ends_N]).to(self._device, torch.int32),
            context_lens=contexts_N.to(self._device, torch.int32),
            block_tables_NB=tables_NB.to(self._device),
            logit_rows_O=(ends_N[samples_N] - 1).to(self._device),
            max_query_tokens=int(lengths_N.max()),
            max_context_tokens=max(contexts),
            lora=self._lora(chunks),
        )

    def _block_tables(self, chunks: Seq[Chunk], max_context_tokens: int) -> Tensor:
        """Joined as bytes: a list of lists would make an object of every entry of every step."""
        num_blocks = -(-max_context_tokens // self._page_tokens)
        rows = [c.sequence.pages[:num_blocks].tobytes().ljust(num_blocks * 4, b"\0") for c in chunks]
        return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(chunks), num_blocks)

    def _lora(self, chunks: Seq[Chunk]) -> LoraBatch | None:
        adapters, lengths = [], []
        for adapter, members in groupby(chunks, key=lambda chunk: chunk.sequence.resident):
            if adapter is not None:
                adapters.append(adapter)
                pairs = [(chunk.end - chunk.start, chunk.does_sample) for chunk in members]
                lengths.append((sum(length for length, _ in pairs), sum(does_sample for _, does_sample in pairs)))
        if not adapters:
            return None
        return self._lora_of(tuple(adapters), lengths)

    def _lora_of(self, adapters: tuple[ResidentAdapter, ...], lengths: list[tuple[int, int]]) -> LoraBatch:
        # An evicted adapter that comes back is another object, with other rows: identity is the right comparison.
        if self._last_lora is None or self._adapters != adapters:
            self._last_lora = _make_lora(adapters, self._layout, **self._segments(lengths))
        elif self._lengths != lengths:
            self._last_lora = replace(self._last_lora, **self._segments(lengths))
        self._adapters, self._lengths = adapters, lengths
        return self._last_lora

    def _segments(self, lengths: Seq[tuple[int, int]]) -> dict[str, Any]:
        """What of a LoraBatch depends on how many tokens each adapter has in the batch."""
        num_tokens, num_samples = zip(*lengths, strict=True)
        return {
            "token_starts": self._int32(list(accumulate(num_tokens, initial=0))),
            "sample_starts": self._int32(list(accumulate(num_samples, initial=0))),
            "max_tokens": max(num_tokens),
            "max_samples": max(num_samples),
        }

    def _int64(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


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
        **segments,
    )
