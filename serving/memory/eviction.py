"""Decides what leaves the arena when room is needed: one eviction order for idle adapters and cached prefixes.

The order is GreedyDual-Size-Frequency (Cherkasova, HP Labs report HPL-98-69R1, 1998). An item's priority is a floor
plus its uses times the cost per page of bringing it back; the lowest priority goes first. The floor is the priority of
the last item evicted, so items that were useful long ago sink below items that are useful now. With equal values
the order is least recently used.
"""

import heapq
from collections.abc import Callable, Collection, Hashable
from typing import Any, NamedTuple

from serving.memory.pages import PageAllocator


class _Idle(NamedTuple):
    number: int  # a new one each time the item is added
    num_pages: int
    evict: Callable[[Any], None]


class EvictionQueue:
    """Owns the eviction order. Owners of items add them when they become idle and discard them when they are used."""

    def __init__(self, allocator: PageAllocator):
        self._allocator = allocator
        self._idle: dict[Hashable, _Idle] = {}
        self._heap: list[tuple[float, int, Hashable]] = []  # may hold entries of items no longer idle
        self._floor = 0.0
        self._num_added = 0
        self.num_pages = 0

    def add(self, item: Hashable, num_pages: int, value: float, evict: Callable[[Any], None]) -> None:
        """Add an idle item. `value` is its uses times its cost per page; `evict(item)` must free its pages."""
        assert item not in self._idle, f"{item} is idle already"
        self._num_added += 1
        self._idle[item] = _Idle(self._num_added, num_pages, evict)
        heapq.heappush(self._heap, (self._floor + value, self._num_added, item))
        self.num_pages += num_pages
        if len(self._heap) > 2 * len(self._idle) + 64:
            self._heap = [entry for entry in self._heap if self._is_idle(entry)]
            heapq.heapify(self._heap)

    def discard(self, item: Hashable) -> None:
        """Remove an item that is used again, if it is here."""
        idle = self._idle.pop(item, None)
        if idle is not None:
            self.num_pages -= idle.num_pages

    def has(self, item: Hashable) -> bool:
        """Whether an item is idle."""
        return item in self._idle

    def make_room(self, num_pages: int, keep: Collection[Hashable] = ()) -> bool:
        """Evict items that are not in `keep` until `num_pages` pages are free.

        Returns False, and evicts nothing, if that many cannot be freed.
        """
        if self._allocator.num_free >= num_pages:
            return True
        num_kept = sum(self._idle[item].num_pages for item in keep if item in self._idle)
        if self._allocator.num_free + self.num_pages - num_kept < num_pages:
            return False
        kept = []
        while self._allocator.num_free < num_pages:
            entry = heapq.heappop(self._heap)
            if self._is_idle(entry):
                if entry[2] in keep:
                    kept.append(entry)
                else:
                    self._evict(entry)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return True

    def check_integrity(self) -> None:
        """Assert that the heap holds every idle item, and that the page count is right."""
        assert self.num_pages == sum(idle.num_pages for idle in self._idle.values()), "the count of idle pages is wrong"
        assert sum(map(self._is_idle, self._heap)) == len(self._idle), "an idle item is missing from the heap"

    def _evict(self, entry: tuple[float, int, Hashable]) -> None:
        priority, _, item = entry
        idle = self._idle.pop(item)
        self.num_pages -= idle.num_pages
        self._floor = max(self._floor, priority)  # an item kept earlier may be lower
        num_free = self._allocator.num_free
        idle.evict(item)
        assert self._allocator.num_free == num_free + idle.num_pages, f"{item} did not free its pages"

    def _is_idle(self, entry: tuple[float, int, Hashable]) -> bool:
        _, number, item = entry
        return item in self._idle and self._idle[item].number == number
