"""The sequences that run, as columns: what a step asks of all of them it asks at once, not of one object at a time.

With 1,024 of them a third of the engine's own time was in looking at each for what nearly all have in common
(docs/experiments.md).

Shape letters: R rows, as many as may run; N sequences of one step; B blocks (pages of KV) of the longest context.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from serving.engine.sequence import SequenceState

IntArray = NDArray[np.int64]
TableArray = NDArray[np.int32]

BASE_ONLY = np.iinfo(np.int64).max  # as the number of an adapter: sorts after every other
_NO_MATTER = np.iinfo(np.int64).max  # pages of a sequence that does not cache: never fewer than those that are full
_LEAST_BLOCKS = 16


@dataclass(frozen=True, eq=False)
class SchedulerOutput:
    """One step: of sequence n the tokens from `starts_N[n]` to before `ends_N[n]`; one adapter's are side by side.

    `does_sample_N` where nothing is pending after them. adapters_N: `ResidentAdapter.number`, or BASE_ONLY, which is
    last. last_tokens_N: the last token that a sequence has so far. tables_NB: its pages in order, then zeros.
    """

    sequences: Sequence[SequenceState]
    rows_N: IntArray
    starts_N: IntArray
    ends_N: IntArray
    does_sample_N: NDArray[np.bool_]
    adapters_N: IntArray
    last_tokens_N: IntArray
    tables_NB: TableArray

    @cached_property
    def sampling(self) -> list[SequenceState]:
        """Those that sample, in order."""
        return list(compress(self.sequences, self.does_sample_N.tolist()))

    def without(self, sequences: Collection[SequenceState]) -> "SchedulerOutput":
        """The same without some sequences."""
        kept_N = np.array([sequence not in sequences for sequence in self.sequences])
        columns = {field.name: getattr(self, field.name)[kept_N] for field in fields(self)[1:]}
        return SchedulerOutput(list(compress(self.sequences, kept_N.tolist())), **columns)


class RunningTable:
    """The owner of what changes with every step: a row for each running sequence, which knows its number.

    Of a sequence's tokens the KV of the first `num_stored` is stored, in its pages, which have room for `capacity`. The
    prefix cache knows the first `num_cached` pages; of one that does not cache, any. A row that is free is all zeros.
    """

    def __init__(self, num_rows: int, page_tokens: int):
        self._page_tokens = page_tokens
        self._free = list(range(num_rows - 1, -1, -1))
        self._sequences: dict[int, SequenceState] = {}
        self._columns = np.zeros((6, num_rows), np.int64)
        self._num_tokens_R, self._num_stored_R, self._capacity_R = self._columns[:3]
        self._num_cached_R, self._last_tokens_R, self._adapters_R = self._columns[3:]
        self._tables_RB = np.zeros((num_rows, _LEAST_BLOCKS), np.int32)

    # One sequence.

    def add(self, sequence: SequenceState, pages: Sequence[int], num_stored: int, num_cached: int) -> None:
        """Give a sequence a row."""
        row = sequence.row = self._free.pop()
        self._sequences[row] = sequence
        self._columns[:, row] = (
            len(sequence.tokens),
            num_stored,
            len(pages) * self._page_tokens,
            num_cached if sequence.prefix_keys is not None else _NO_MATTER,
            sequence.tokens[-1],
            BASE_ONLY if sequence.resident is None else sequence.resident.number,
        )
        while len(pages) > self._tables_RB.shape[1]:
            self._widen()
        self._tables_RB[row, : len(pages)] = pages

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence's row back."""
        row = _row(sequence)
        self._columns[:, row] = 0
        self._tables_RB[row] = 0
        del self._sequences[row]
        self._free.append(row)
        sequence.row = None

    def pages(self, sequence: SequenceState) -> list[int]:
        """Its pages in order."""
        row = _row(sequence)
        return self._tables_RB[row, : self._capacity_R[row] // self._page_tokens].tolist()

    def num_stored(self, sequence: SequenceState) -> int:
        """Its tokens whose KV is stored."""
        return int(self._num_stored_R[_row(sequence)])

    def num_pending(self, sequence: SequenceState) -> int:
        """Its tokens whose KV is not stored yet; 1 while it decodes."""
        return len(sequence.tokens) - self.num_stored(sequence)

    def num_cached(self, sequence: SequenceState) -> int:
        """Its first pages that the prefix cache may know."""
        return int(self._num_cached_R[_row(sequence)])

    def cache_pages(self, sequence: SequenceState, first: int, pages: Sequence[int]) -> None:
        """The prefix cache knows its pages from `first` on too, as these."""
        row, last = _row(sequence), first + len(pages)
        self._tables_RB[row, first:last] = pages
        self._num_cached_R[row] = last

    # All of them.

    def short_of_pages(self) -> list[SequenceState]:
        """Those that decode and have no page for their next token's KV, in no particular order."""
        return self._at(self._does_decode() & (self._num_tokens_R > self._capacity_R))

    def append_pages(self, sequences: Sequence[SequenceState], pages: Sequence[int]) -> None:
        """Give each of some sequences one more page."""
        rows_N = np.array([_row(sequence) for sequence in sequences], np.int64)
        num_pages_N = self._capacity_R[rows_N] // self._page_tokens
        if num_pages_N.max() == self._tables_RB.shape[1]:
            self._widen()
        self._tables_RB[rows_N, num_pages_N] = pages
        self._capacity_R[rows_N] += self._page_tokens

    def decodes(self) -> IntArray:
        """Rows of those that decode and have a page to go on with."""
        return (self._does_decode() & (self._num_tokens_R <= self._capacity_R)).nonzero()[0]

    def prefills(self) -> list[SequenceState]:
        """Those with more than their last token pending, in no particular order."""
        return self._at(self._num_tokens_R - self._num_stored_R > 1)

    def plan(self, decodes_N: IntArray, prefills: Sequence[tuple[SequenceState, int]]) -> SchedulerOutput:
        """The step of some rows that decode, and of sequences that prefill so many tokens."""
        rows_N, lengths_N = decodes_N, np.ones(len(decodes_N) + len(prefills), np.int64)
        if prefills:
            rows_N = np.concatenate([decodes_N, [_row(sequence) for sequence, _ in prefills]])
            lengths_N[len(decodes_N) :] = [num_tokens for _, num_tokens in prefills]
        order_N = self._adapters_R[rows_N].argsort(kind="stable")
        rows_N = rows_N[order_N]
        num_tokens_N, starts_N, _, _, last_tokens_N, adapters_N = self._columns[:, rows_N]
        ends_N = starts_N + lengths_N[order_N]
        num_blocks = -(-int(ends_N.max(initial=0)) // self._page_tokens)
        return SchedulerOutput(
            sequences=[self._sequences[row] for row in rows_N.tolist()],
            rows_N=rows_N,
            starts_N=starts_N,
            ends_N=ends_N,
            does_sample_N=ends_N == num_tokens_N,
            adapters_N=adapters_N,
            last_tokens_N=last_tokens_N,
            tables_NB=self._tables_RB[rows_N, :num_blocks],
        )

    def commit(self, plan: SchedulerOutput, tokens: Sequence[int]) -> None:
        """Book a plan's KV, and the tokens of those that sample."""
        sampled_N = plan.rows_N[plan.does_sample_N]
        self._num_stored_R[plan.rows_N] = plan.ends_N
        self._num_tokens_R[sampled_N] += 1
        self._last_tokens_R[sampled_N] = tokens
        for sequence, token in zip(plan.sampling, tokens, strict=True):
            sequence.tokens.append(token)

    def uncached(self) -> list[tuple[SequenceState, int, int]]:
        """Those that cache and have full pages, from the first to before the last, that are not cached yet."""
        num_full_R = self._num_stored_R // self._page_tokens
        rows = (num_full_R > self._num_cached_R).nonzero()[0].tolist()
        return [(self._sequences[row], int(self._num_cached_R[row]), int(num_full_R[row])) for row in rows]

    def check_integrity(self, running: Sequence[SequenceState]) -> None:
        """Assert that exactly these sequences have rows, and that the rows say what the sequences do."""
        rows = [_row(sequence) for sequence in running]
        assert sorted([*rows, *self._free]) == list(range(len(self._tables_RB))), "a row is lost, or has two owners"
        assert self._sequences == dict(zip(rows, running, strict=True)), "a row is another sequence's"
        assert self._num_tokens_R[rows].tolist() == [len(s.tokens) for s in running], "numbers of tokens drifted"
        assert self._last_tokens_R[rows].tolist() == [s.tokens[-1] for s in running], "last tokens drifted"
        numbers = [s.resident.number if s.resident is not None else BASE_ONLY for s in running]
        assert self._adapters_R[rows].tolist() == numbers, "a sequence has another adapter"
        assert (self._num_stored_R <= self._capacity_R).all(), "KV is stored nowhere"
        assert not self._columns[:, self._free].any(), "a free row is in use"
        assert not self._tables_RB[self._free].any(), "a free row has pages"

    def _does_decode(self) -> NDArray[np.bool_]:
        return self._num_tokens_R - self._num_stored_R == 1

    def _widen(self) -> None:
        self._tables_RB = np.concatenate([self._tables_RB, np.zeros_like(self._tables_RB)], axis=1)

    def _at(self, is_wanted_R: NDArray[np.bool_]) -> list[SequenceState]:
        return [self._sequences[row] for row in is_wanted_R.nonzero()[0].tolist()]


def _row(sequence: SequenceState) -> int:
    assert sequence.row is not None, "it does not run"
    return sequence.row
