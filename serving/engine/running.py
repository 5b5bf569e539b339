"""The running sequences as columns, so that a step asks all of them at once instead of one object at a time.

With 1,024 running sequences, looking at each object took a third of the engine's own time (see
docs/experiments/serving.md).

Shape letter beside the usual ones: B2 rows of the table, one for each sequence that may run at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from serving.engine.sampler import PLAIN_ROW, SAMPLE_ROW, SampleArray, sample_array
from serving.engine.sequence import SequenceState

IntArray = NDArray[np.int64]
TableArray = NDArray[np.int32]

BASE_ONLY = np.iinfo(np.int64).max  # adapter number of the bare base model: sorts after every adapter
_NEVER_CACHED = np.iinfo(np.int64).max  # `num_cached` of a sequence that does not cache: never below its full pages
_MIN_BLOCKS = 16


@dataclass(frozen=True, eq=False)
class SchedulerOutput:
    """What the scheduler picked for one step: tokens `starts_B[i]` to `ends_B[i] - 1` of sequence i.

    Sequences of one adapter are side by side, those of the bare base model last.

    does_sample_B:   whether the sequence has no pending tokens after these, so that its next token is sampled
    adapters_B:      `ResidentAdapter.number`, or BASE_ONLY
    last_tokens_B:   the last token that each sequence has so far
    block_tables_BW: each sequence's pages in order, padded with 0
    sample_rows_B:   how each sequence's next token is chosen
    score_starts_B:  the first position whose logits give the log-probability of the prompt token after it
    num_scores_B:    the number of such positions from there on, mostly 0
    """

    sequences: Sequence[SequenceState]
    rows_B: IntArray  # in the RunningTable
    starts_B: IntArray
    ends_B: IntArray
    does_sample_B: NDArray[np.bool_]
    adapters_B: IntArray
    last_tokens_B: IntArray
    block_tables_BW: TableArray
    sample_rows_B: SampleArray
    score_starts_B: IntArray
    num_scores_B: IntArray

    @cached_property
    def logit_starts(self) -> IntArray:
        """Where each sequence's logits begin, and where the last end: [B + 1]. Its next token's are its last."""
        return np.concatenate([[0], (self.num_scores_B + self.does_sample_B).cumsum()])

    @cached_property
    def sampling(self) -> list[SequenceState]:
        """The sequences that sample, in order."""
        return list(compress(self.sequences, self.does_sample_B.tolist()))

    def without(self, sequences: Collection[SequenceState]) -> "SchedulerOutput":
        """Return the same output without some sequences."""
        is_kept_B = np.array([sequence not in sequences for sequence in self.sequences])
        columns = {field.name: getattr(self, field.name)[is_kept_B] for field in fields(self)[1:]}
        return SchedulerOutput(list(compress(self.sequences, is_kept_B.tolist())), **columns)


class RunningTable:
    """Owns what changes in every step: one row for each running sequence. A free row is all zeros.

    The KV of a sequence's first `num_stored` tokens is stored. Its pages have room for `capacity` tokens, and the
    prefix cache knows the first `num_cached` of them.
    """

    def __init__(self, num_rows: int, page_tokens: int):
        self._page_tokens = page_tokens
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._sequences: dict[int, SequenceState] = {}  # by row
        self._columns = np.zeros((8, num_rows), np.int64)
        self._num_tokens_B2, self._num_stored_B2, self._capacity_B2 = self._columns[:3]
        self._num_cached_B2, self._last_tokens_B2, self._adapters_B2 = self._columns[3:6]
        self._num_scored_B2, self._num_to_score_B2 = self._columns[6:]
        self._block_tables_B2W = np.zeros((num_rows, _MIN_BLOCKS), np.int32)
        self._special_rows: set[int] = set()  # of sequences that do not just take their likeliest token
        self._plain_rows_B2 = sample_array([PLAIN_ROW]).repeat(num_rows)
        self._sample_rows_B2 = np.zeros(num_rows, SAMPLE_ROW)  # without positions; meaningless for free rows

    # One sequence.

    def add(self, sequence: SequenceState, pages: Sequence[int], num_stored: int, num_cached: int) -> None:
        """Give a sequence a row."""
        row = sequence.row = self._free_rows.pop()
        self._sequences[row] = sequence
        self._columns[:, row] = (
            len(sequence.tokens),
            num_stored,
            len(pages) * self._page_tokens,
            num_cached if sequence.prefix_keys is not None else _NEVER_CACHED,
            sequence.tokens[-1],
            BASE_ONLY if sequence.resident is None else sequence.resident.number,
            sequence.num_scored,
            sequence.num_to_score,
        )
        sample_row = sequence.sample_row()
        self._sample_rows_B2[row] = sample_row.record()
        if not sample_row.is_plain or sequence.num_scored < sequence.num_to_score:
            self._special_rows.add(row)
        while len(pages) > self._block_tables_B2W.shape[1]:
            self._widen()
        self._block_tables_B2W[row, : len(pages)] = pages

    def remove(self, sequence: SequenceState) -> None:
        """Free a sequence's row."""
        row = _row(sequence)
        self._columns[:, row] = 0
        self._special_rows.discard(row)
        self._block_tables_B2W[row] = 0
        del self._sequences[row]
        self._free_rows.append(row)
        sequence.row = None

    def pages(self, sequence: SequenceState) -> list[int]:
        """Return a sequence's pages in order."""
        row = _row(sequence)
        return self._block_tables_B2W[row, : self._capacity_B2[row] // self._page_tokens].tolist()

    def num_stored(self, sequence: SequenceState) -> int:
        """Return how many of a sequence's tokens have their KV stored."""
        return int(self._num_stored_B2[_row(sequence)])

    def num_pending(self, sequence: SequenceState) -> int:
        """Return how many of a sequence's tokens have no KV yet: 1 while it decodes."""
        return len(sequence.tokens) - self.num_stored(sequence)

    def num_cached(self, sequence: SequenceState) -> int:
        """Return how many of a sequence's first pages the prefix cache may know."""
        return int(self._num_cached_B2[_row(sequence)])

    def cache_pages(self, sequence: SequenceState, first: int, pages: Sequence[int]) -> None:
        """Replace a sequence's pages from index `first` on by the pages that the prefix cache has for them."""
        row, last = _row(sequence), first + len(pages)
        self._block_tables_B2W[row, first:last] = pages
        self._num_cached_B2[row] = last

    # All sequences.

    def short_of_pages(self) -> list[SequenceState]:
        """Return the decoding sequences without a page for their next token's KV, in no particular order."""
        return self._at(self._does_decode() & (self._num_tokens_B2 > self._capacity_B2))

    def append_pages(self, sequences: Sequence[SequenceState], pages: Sequence[int]) -> None:
        """Give each of some sequences one more page."""
        rows_B = np.array([_row(sequence) for sequence in sequences], np.int64)
        num_pages_B = self._capacity_B2[rows_B] // self._page_tokens
        if num_pages_B.max() == self._block_tables_B2W.shape[1]:
            self._widen()
        self._block_tables_B2W[rows_B, num_pages_B] = pages
        self._capacity_B2[rows_B] += self._page_tokens

    def decodes(self) -> IntArray:
        """Return the rows of the decoding sequences that have a page for their next token."""
        return (self._does_decode() & (self._num_tokens_B2 <= self._capacity_B2)).nonzero()[0]

    def prefills(self) -> list[SequenceState]:
        """Return the sequences with more than one pending token, in no particular order."""
        return self._at(self._num_tokens_B2 - self._num_stored_B2 > 1)

    def output(self, decodes: IntArray, prefills: Sequence[tuple[SequenceState, int]]) -> SchedulerOutput:
        """Return the step in which these rows decode, and each of `prefills` computes that many pending tokens."""
        rows_B, lengths_B = decodes, np.ones(len(decodes) + len(prefills), np.int64)
        if prefills:
            rows_B = np.concatenate([decodes, [_row(sequence) for sequence, _ in prefills]])
            lengths_B[len(decodes) :] = [num_tokens for _, num_tokens in prefills]
        order_B = self._adapters_B2[rows_B].argsort(kind="stable")
        rows_B = rows_B[order_B]
        num_tokens_B, starts_B, _, _, last_tokens_B, adapters_B = self._columns[:6, rows_B]
        ends_B = starts_B + lengths_B[order_B]
        sample_rows_B, score_starts_B = self._plain_rows_B2[: len(rows_B)], starts_B
        num_scores_B = np.zeros_like(starts_B)
        if self._special_rows:  # most steps have none, and each NumPy call takes a microsecond or more
            sample_rows_B = self._sample_rows_B2[rows_B]
            sample_rows_B["position"] = num_tokens_B
            score_starts_B = np.maximum(starts_B, self._num_scored_B2[rows_B])
            num_scores_B = np.maximum(np.minimum(ends_B, self._num_to_score_B2[rows_B]) - score_starts_B, 0)
        num_blocks = -(-int(ends_B.max(initial=0)) // self._page_tokens)
        return SchedulerOutput(
            sequences=[self._sequences[row] for row in rows_B.tolist()],
            rows_B=rows_B,
            starts_B=starts_B,
            ends_B=ends_B,
            does_sample_B=ends_B == num_tokens_B,
            adapters_B=adapters_B,
            last_tokens_B=last_tokens_B,
            block_tables_BW=self._block_tables_B2W[rows_B, :num_blocks],
            sample_rows_B=sample_rows_B,
            score_starts_B=score_starts_B,
            num_scores_B=num_scores_B,
        )

    def commit(self, scheduled: SchedulerOutput, tokens: Sequence[int]) -> None:
        """Record a step whose KV is stored, and append the sampled tokens."""
        sampled_B = scheduled.rows_B[scheduled.does_sample_B]
        self._num_stored_B2[scheduled.rows_B] = scheduled.ends_B
        self._num_tokens_B2[sampled_B] += 1
        self._last_tokens_B2[sampled_B] = tokens
        for i in np.flatnonzero(scheduled.num_scores_B).tolist():
            scheduled.sequences[i].num_scored += int(scheduled.num_scores_B[i])
            self._num_scored_B2[scheduled.rows_B[i]] = scheduled.sequences[i].num_scored
        for sequence, token in zip(scheduled.sampling, tokens, strict=True):
            sequence.tokens.append(token)

    def uncached(self) -> list[tuple[SequenceState, int, int]]:
        """Return the sequences with full pages that are not cached yet: index of the first, and one past the last."""
        num_full_B2 = self._num_stored_B2 // self._page_tokens
        rows = (num_full_B2 > self._num_cached_B2).nonzero()[0].tolist()
        return [(self._sequences[row], int(self._num_cached_B2[row]), int(num_full_B2[row])) for row in rows]

    def check_integrity(self, running: Sequence[SequenceState]) -> None:
        """Assert that exactly these sequences have rows, and that the rows agree with them."""
        rows = [_row(sequence) for sequence in running]
        num_rows = len(self._block_tables_B2W)
        assert sorted([*rows, *self._free_rows]) == list(range(num_rows)), "a row is lost, or has two owners"
        assert self._sequences == dict(zip(rows, running, strict=True)), "a row belongs to another sequence"
        assert self._num_tokens_B2[rows].tolist() == [len(s.tokens) for s in running], "numbers of tokens differ"
        assert self._last_tokens_B2[rows].tolist() == [s.tokens[-1] for s in running], "last tokens differ"
        numbers = [s.resident.number if s.resident is not None else BASE_ONLY for s in running]
        assert self._adapters_B2[rows].tolist() == numbers, "a sequence has another adapter"
        assert (self._num_stored_B2 <= self._capacity_B2).all(), "KV is stored outside the pages"
        assert not self._columns[:, self._free_rows].any(), "a free row is in use"
        assert not self._block_tables_B2W[self._free_rows].any(), "a free row has pages"

    def _does_decode(self) -> NDArray[np.bool_]:
        return self._num_tokens_B2 - self._num_stored_B2 == 1

    def _widen(self) -> None:
        self._block_tables_B2W = np.concatenate([self._block_tables_B2W, np.zeros_like(self._block_tables_B2W)], axis=1)

    def _at(self, is_wanted_B2: NDArray[np.bool_]) -> list[SequenceState]:
        return [self._sequences[row] for row in is_wanted_B2.nonzero()[0].tolist()]


def _row(sequence: SequenceState) -> int:
    assert sequence.row is not None, "the sequence is not running"
    return sequence.row
