"""Which pages of the arena are free: plain integers, no tensors.

The arena is one memory of equal pages shared by KV cache and adapter weights, so that whichever is in demand gets the
room (S-LoRA, arXiv 2311.03285, section 5.1). A page number means the same page in every layer.
"""

from collections.abc import Iterable, Sequence


class OutOfPages(Exception):  # noqa: N818 - a signal between our own parts; users never meet it
    """Fewer pages are free than were asked for."""


class PageArena:
    """The one owner of the free list. Freeing a page twice, or one that was never given out, is our bug."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack whose top is the lowest number
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Hand out pages, all or none; raises OutOfPages."""
        assert num_pages >= 0, num_pages
        if num_pages > len(self._free):
            raise OutOfPages(f"{num_pages} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not of this arena"
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = 1
            self._free.append(page)

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that every page is either free or held by exactly one of the given owners."""
        held = [page for pages in owned for page in pages]
        assert len(held) == len(set(held)), "a page has two owners"
        assert len(self._free) == sum(self._is_free), "the free list and the free marks disagree"
        assert sorted(held + self._free) == list(range(self.num_pages)), "a page is lost, or held and free at once"
