"""Which of the idle things in the arena goes first when room is needed: one order for adapters and cached prefixes.

GreedyDual-Size-Frequency (Cherkasova, HP Labs report HPL-98-69R1, 1998): a thing's priority is a floor plus its uses
times what its pages cost to bring back, per page. The floor is the priority of the last thing that was evicted, so
what was useful long ago sinks below what is useful now. With equal values this is least recently used.
"""

import heapq
from collections.abc import Callable, Collection, Hashable
from typing import Any, NamedTuple

from serving.memory.pages import PageAllocator


class _Idle(NamedTuple):
    number: int  # of its coming, which tells it from what it was when it was idle before
    num_pages: int
    evict: Callable[[Any], None]


class EvictionQueue:
    """The owner of the order in which idle things go. Their owners add what nobody uses, and take back what is used."""

    def __init__(self, allocator: PageAllocator):
        self._allocator = allocator
        self._idle: dict[Hashable, _Idle] = {}
        self._heap: list[tuple[float, int, Hashable]] = []  # may hold things that are not idle any more
        self._floor = 0.0
        self._num_added = 0
        self.num_pages = 0

    def add(self, thing: Hashable, num_pages: int, value: float, evict: Callable[[Any], None]) -> None:
        """Offer a thing: uses times the cost of a page of it, and what frees its `num_pages` pages, given it."""
        assert thing not in self._idle, f"{thing} is idle already"
        self._num_added += 1
        self._idle[thing] = _Idle(self._num_added, num_pages, evict)
        heapq.heappush(self._heap, (self._floor + value, self._num_added, thing))
        self.num_pages += num_pages
        if len(self._heap) > 2 * len(self._idle) + 64:
            self._heap = [entry for entry in self._heap if self._is_idle(entry)]
            heapq.heapify(self._heap)

    def discard(self, thing: Hashable) -> None:
        """Take a thing back because it is used again, if it is here."""
        idle = self._idle.pop(thing, None)
        if idle is not None:
            self.num_pages -= idle.num_pages

    def has(self, thing: Hashable) -> bool:
        """Whether a thing is idle."""
        return thing in self._idle

    def make_room(self, num_pages: int, keep: Collection[Hashable] = ()) -> bool:
        """Evict things not in `keep` until that many pages are free; False, and none evicted, if in vain."""
        if self._allocator.num_free >= num_pages:
            return True
        num_kept = sum(self._idle[thing].num_pages for thing in keep if thing in self._idle)
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
        """Assert that the heap holds every idle thing, and that the count of pages is right."""
        assert self.num_pages == sum(idle.num_pages for idle in self._idle.values()), "idle pages drifted"
        assert sum(map(self._is_idle, self._heap)) == len(self._idle), "an idle thing has no place in the order"

    def _evict(self, entry: tuple[float, int, Hashable]) -> None:
        priority, _, thing = entry
        idle = self._idle.pop(thing)
        self.num_pages -= idle.num_pages
        self._floor = max(self._floor, priority)  # what was passed over, because it was kept, may go later
        num_free = self._allocator.num_free
        idle.evict(thing)
        assert self._allocator.num_free == num_free + idle.num_pages, f"{thing} did not free its pages"

    def _is_idle(self, entry: tuple[float, int, Hashable]) -> bool:
        _, number, thing = entry
        return thing in self._idle and self._idle[thing].number == number
