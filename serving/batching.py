"""From the scheduler's chunks to the tensors of one forward pass.

Shape letters as in `serving.batch`: T tokens, N sequences, B blocks of the longest sequence, S adapter segments, M
target modules of the whole model, O rows whose logits are wanted.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from serving.adapters import ResidentAdapter
from serving.batch import Batch, LoraBatch
from serving.sequence import Chunk


class BatchBuilder:
    """Builds batches on one device.

    Keeps the last batch's adapters, and with them what the kernels have worked out of them: while nobody comes or goes
    and all decode, they are those of the next batch too.
    """

    def __init__(self, page_tokens: int, device: torch.device):
        self._page_tokens = page_tokens
        self._device = device
        self._adapters: tuple[ResidentAdapter, ...] = ()
        self._lengths: tuple[int, ...] = ()  # tokens of each
        self._last_lora: LoraBatch | None = None

    def build(self, chunks: Seq[Chunk]) -> Batch:
        """The batch of some chunks, those of one adapter side by side and those without one last; never empty."""
        lengths = [chunk.end - chunk.start for chunk in chunks]
        ends = list(accumulate(lengths))
        contexts = [chunk.end for chunk in chunks]
        return Batch(
            tokens_T=self._int64([t for c in chunks for t in c.sequence.tokens[c.start : c.end]]),
            positions_T=self._int64([p for c in chunks for p in range(c.start, c.end)]),
            slots_T=self._int64([slot for c in chunks for slot in self._slots(c)]),
            query_starts=self._int32([0, *ends]),
            context_lens=self._int32(contexts),
            block_tables_NB=self._int32(self._block_tables(chunks)),
            logit_rows_O=self._int64([end - 1 for c, end in zip(chunks, ends, strict=True) if c.does_sample]),
            max_query_tokens=max(lengths),
            max_context_tokens=max(contexts),
            lora=self._lora(chunks),
        )

    def _slots(self, chunk: Chunk) -> list[int]:
        size, pages = self._page_tokens, chunk.sequence.pages
        return [pages[position // size] * size + position % size for position in range(chunk.start, chunk.end)]

    def _block_tables(self, chunks: Seq[Chunk]) -> list[list[int]]:
        tables = [c.sequence.pages[: -(-c.end // self._page_tokens)] for c in chunks]
        num_blocks = max(map(len, tables))
        return [table + [0] * (num_blocks - len(table)) for table in tables]

    def _lora(self, chunks: Seq[Chunk]) -> LoraBatch | None:
        adapters, lengths = [], []
        for adapter, members in groupby(chunks, key=lambda chunk: chunk.sequence.resident):
            if adapter is not None:
                adapters.append(adapter)
                lengths.append(sum(chunk.end - chunk.start for chunk in members))
        if not adapters:
            return None
        return self._lora_of(tuple(adapters), tuple(lengths))

    def _lora_of(self, adapters: tuple[ResidentAdapter, ...], lengths: tuple[int, ...]) -> LoraBatch:
        # An evicted adapter that comes back is another object, with other rows: identity is the right comparison.
        if self._last_lora is None or self._adapters != adapters:
            self._last_lora = _make_lora(adapters, self._token_starts(lengths), max(lengths))
        elif self._lengths != lengths:
            self._last_lora = replace(
                self._last_lora, token_starts=self._token_starts(lengths), max_tokens=max(lengths)
            )
        self._adapters, self._lengths = adapters, lengths
        return self._last_lora

    def _token_starts(self, lengths: Seq[int]) -> Tensor:
        return self._int32(list(accumulate(lengths, initial=0)))

    def _int64(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def _make_lora(adapters: tuple[ResidentAdapter, ...], token_starts: Tensor, max_tokens: int) -> LoraBatch:
    firsts = accumulate((len(adapter.a_rows_N) for adapter in adapters[:-1]), initial=0)
    return LoraBatch(
        token_starts=token_starts,
        ranks_SM=torch.stack([adapter.ranks_M for adapter in adapters]),
        scalings_SM=torch.stack([adapter.scalings_M for adapter in adapters]),
        table_starts_SM=torch.stack([a.table_starts_M + first for a, first in zip(adapters, firsts, strict=True)]),
        a_rows=torch.cat([adapter.a_rows_N for adapter in adapters]),
        b_rows=torch.cat([adapter.b_rows_N for adapter in adapters]),
        max_ranks=tuple(map(max, zip(*(adapter.ranks for adapter in adapters), strict=True))),
        max_tokens=max_tokens,
    )
