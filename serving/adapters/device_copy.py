"""Packed adapters on their way into the arena: at once on a CPU, behind the model's back on a GPU.

A blob is copied in a few parts, in the order in which a forward pass reads it. On a GPU the copies go on a stream of
their own, with an event after each part, and a layer waits for the part that it reads and for no more: an adapter's
first step begins when its first layers have come.

Shape letters: M target modules of the whole model, P pages, E elements of a page.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from serving.adapters.packing import PackedAdapter

_NUM_PARTS = 4


class Event(Protocol):
    """What is used of a `torch.cuda.Event`."""

    def wait(self) -> None:
        """Let the work that is queued from now on wait for it."""
        ...

    def query(self) -> bool:
        """Whether it has happened."""
        ...


class PendingCopy:
    """The parts of one adapter that come: `events[i]` says that all pages before `part_ends[i]` are there."""

    def __init__(self, page_ends: Sequence[int], part_ends: Sequence[int], events: Sequence[Event]):
        self._events = tuple(events)
        self._events_M = tuple(
            next((event for last, event in zip(part_ends, events, strict=True) if end <= last), None) if end else None
            for end in page_ends
        )

    @property
    def has_ended(self) -> bool:
        """Whether all of it is there."""
        return self._events[-1].query()

    def wait_for(self, module: int) -> None:
        """Let the work that is queued from now on wait for a module's rows."""
        event = self._events_M[module]
        if event is not None:
            event.wait()

    def wait(self) -> None:
        """Let the work that is queued from now on wait for all of it."""
        self._events[-1].wait()


class PageCopier:
    """Copies packed adapters into the pages of an arena."""

    def __init__(self, arena_PE: Tensor):
        self._arena_PE = arena_PE
        self._stream = torch.cuda.Stream(arena_PE.device) if arena_PE.is_cuda else None

    def copy(self, packed: PackedAdapter, pages: Sequence[int]) -> PendingCopy | None:
        """Copy a blob into so many pages, in ascending order; None if it is there already."""
        if self._stream is None:
            self._copy_pages(packed.blob_PE, pages, 0, len(pages))
            return None
        ends = part_ends(len(pages))
        # What was queued before may still read what was in the pages.
        self._stream.wait_stream(torch.cuda.current_stream(self._arena_PE.device))
        events: list[Event] = []
        with torch.cuda.stream(self._stream):
            for first, last in pairwise((0, *ends)):
                self._copy_pages(packed.blob_PE, pages, first, last)
                events.append(self._stream.record_event())
        return PendingCopy(packed.page_ends, ends, events)

    def _copy_pages(self, blob_PE: Tensor, pages: Sequence[int], first: int, last: int) -> None:
        for start, end in _runs(pages, first, last):
            target = self._arena_PE[pages[start] : pages[start] + end - start]
            target.copy_(blob_PE[start:end], non_blocking=True)


def part_ends(num_pages: int) -> list[int]:
    """Where the parts end that so many pages are copied in."""
    size = max(1, -(-num_pages // _NUM_PARTS))
    return [min(first + size, num_pages) for first in range(0, num_pages, size)]


def _runs(pages: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts [start, end) of [first, last) whose pages are side by side."""
    start = first
    for i in range(first + 1, last + 1):
        if i == last or pages[i] != pages[i - 1] + 1:
            yield start, i
            start = i
