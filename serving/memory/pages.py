"""Which pages of the arena are free, and how many hold each of the others: plain integers, no tensors.

The arena is one memory of equal pages shared by KV cache and adapter weights, so that whichever is in demand gets the
room (S-LoRA, arXiv 2311.03285, section 5.1). A page number means the same page in every layer. A page of KV may have
several owners, who read the same prefix; it is free when the last of them has let it go.
"""

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfPages(Exception):  # noqa: N818 - a signal between our own parts; users never meet it
    """Fewer pages are free than were asked for."""


class PageAllocator:
    """The one owner of the free list. Freeing a page that nobody holds, or sharing one, is our bug."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack whose top is the lowest number
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def num_owners(self, page: int) -> int:
        """How many hold a page."""
        return self._num_owners[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Hand out pages to one owner, all or none; raises OutOfPages."""
        assert num_pages >= 0, num_pages
        if num_pages > len(self._free):
            raise OutOfPages(f"{num_pages} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Give a page that somebody holds one more owner."""
        assert self._num_owners[page] > 0, f"page {page} is shared but nobody holds it"
        self._num_owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Take pages back from one of their owners."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not of this arena"
            assert self._num_owners[page] > 0, f"page {page} is freed twice"
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                self._free.append(page)

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that every page is free, or held by exactly as many of the given owners as are on its books."""
        held = Counter(page for pages in owned for page in pages)
        books = {page: count for page, count in enumerate(self._num_owners) if count}
        assert dict(held) == books, f"the owners' pages and the books disagree: {dict(held)} against {books}"
        assert sorted([*held, *self._free]) == list(range(self.num_pages)), "a page is lost, or held and free at once"
