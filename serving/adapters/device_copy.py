"""Copies packed adapters into the arena: at once on a CPU, on a separate stream on a GPU.

An adapter is copied in a few parts, in the order in which a forward pass reads it. On a GPU an event follows each part,
and each layer waits only for the part that it reads. So an adapter's first step begins as soon as its first layers are
there.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from serving.adapters.packing import PackedAdapter

_NUM_PARTS = 4


class Event(Protocol):
    """The part of `torch.cuda.Event` that we use."""

    def wait(self) -> None:
        """Make all work queued from now on wait for the event."""
        ...

    def query(self) -> bool:
        """Whether the event has happened."""
        ...


class PendingCopy:
    """A copy of one adapter that is under way. After `events[i]` all pages before `part_ends[i]` are in the arena."""

    def __init__(self, page_ends: Sequence[int], part_ends: Sequence[int], events: Sequence[Event]):
        self._events = tuple(events)
        self._events_M = tuple(
            next((event for last, event in zip(part_ends, events, strict=True) if end <= last), None) if end else None
            for end in page_ends
        )

    @property
    def has_ended(self) -> bool:
        """Whether the whole adapter is in the arena."""
        return self._events[-1].query()

    def wait_for(self, module: int) -> None:
        """Make all work queued from now on wait for a module's rows."""
        event = self._events_M[module]
        if event is not None:
            event.wait()

    def wait(self) -> None:
        """Make all work queued from now on wait for the whole adapter."""
        self._events[-1].wait()


class PageCopier:
    """Copies packed adapters into the pages of an arena."""

    def __init__(self, arena_PE: Tensor):
        self._arena_PE = arena_PE
        self._stream = torch.cuda.Stream(arena_PE.device) if arena_PE.is_cuda else None

    def copy(self, packed: PackedAdapter, pages: Sequence[int]) -> PendingCopy | None:
        """Copy an adapter into these pages, which ascend. Returns None if the copy has ended already."""
        if self._stream is None:
            self._copy_pages(packed.pages_PE, pages, 0, len(pages))
            return None
        ends = part_ends(len(pages))
        # Work queued before may still read the pages' old content.
        self._stream.wait_stream(torch.cuda.current_stream(self._arena_PE.device))
        events: list[Event] = []
        with torch.cuda.stream(self._stream):
            for first, last in pairwise((0, *ends)):
                self._copy_pages(packed.pages_PE, pages, first, last)
                events.append(self._stream.record_event())
        return PendingCopy(packed.page_ends, ends, events)

    def _copy_pages(self, source_PE: Tensor, pages: Sequence[int], first: int, last: int) -> None:
        for start, end in _runs(pages, first, last):
            target_PE = self._arena_PE[pages[start] : pages[start] + end - start]
            target_PE.copy_(source_PE[start:end], non_blocking=True)


def part_ends(num_pages: int) -> list[int]:
    """Return the ends of the parts in which `num_pages` pages are copied."""
    size = max(1, -(-num_pages // _NUM_PARTS))
    return [min(first + size, num_pages) for first in range(0, num_pages, size)]


def _runs(pages: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut [first, last) into ranges [start, end) whose pages are side by side in the arena."""
    start = first
    for i in range(first + 1, last + 1):
        if i == last or pages[i] != pages[i - 1] + 1:
            yield start, i
            start = i
