"""Tracks which pages of the arena are free, and how many owners each other page has. Plain integers, no tensors.

KV cache and adapter weights share the arena's pages, so whichever needs more room gets it (S-LoRA, arXiv 2311.03285,
section 5.1). A page number means the same page in every layer. Sequences with a common prefix may own a KV page
together; it is free again when its last owner frees it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfPages(Exception):  # noqa: N818 - a signal between our own parts; users never meet it
    """Fewer pages are free than the caller asked for."""


class PageAllocator:
    """Owns the list of free pages. To free or share a page without an owner is our bug."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack whose top is the lowest number
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """The number of free pages."""
        return len(self._free)

    def num_owners(self, page: int) -> int:
        """Return how many owners a page has."""
        return self._num_owners[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Give `num_pages` pages to one owner; raises OutOfPages, and gives none, if fewer are free."""
        assert num_pages >= 0, num_pages
        if num_pages > len(self._free):
            raise OutOfPages(f"{num_pages} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add an owner to a page that has one."""
        assert self._num_owners[page] > 0, f"page {page} is shared but has no owner"
        self._num_owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Take one owner away from each page; pages without owners become free."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not a page of this arena"
            assert self._num_owners[page] > 0, f"page {page} is freed twice"
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                self._free.append(page)

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that every page is free or has exactly the owners in `owned`, which lists each owner's pages."""
        expected = Counter(page for pages in owned for page in pages)
        counted = {page: count for page, count in enumerate(self._num_owners) if count}
        assert dict(expected) == counted, f"owners per page: expected {dict(expected)}, counted {counted}"
        assert sorted([*expected, *self._free]) == list(range(self.num_pages)), "a page is lost, or owned and free"
