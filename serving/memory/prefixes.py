"""KV of prefixes that came before, page by page, for whoever comes with the same tokens for the same weights.

A page's key is a hash of everything that its KV depends on: the adapter's content hash, the tenant's salt, and all
tokens from the first on, chained from page to page (vLLM, arXiv 2309.06180, section 4.4, by way of the key's parent).
The base needs no place in it, since an arena belongs to one engine and so to one base. A reload under the same name has
another content hash, an alias or a rename the same: neither can meet KV of other weights.

Only full pages are cached. A cached page has the cache as one of its owners; when that is the last one the page is idle
and gives way on demand. Whoever holds a page holds those before it too, and lets them go after it, so that the
last page of a prefix is evicted first.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator

# What a page of KV costs to compute again against what a page of an adapter costs to copy again: on an H100 with a
# Llama-3-8B-shaped model 16 tokens of prefill are some 0.6 ms, 2 MB over PCIe 40 us; on CPUs the ratio is larger.
RECOMPUTE_COST = 16.0


class PrefixKeys:
    """The keys of one sequence's full pages, computed as they are wanted. `owner` is the adapter's content hash."""

    def __init__(self, owner: str | None, salt: tuple[str, ...], page_tokens: int):
        self.owner = owner
        self._page_tokens = page_tokens
        self._keys = [blake2b(repr((owner, salt)).encode(), digest_size=16).digest()]

    def up_to(self, tokens: Sequence[int], num_pages: int) -> list[bytes]:
        """Keys of the first pages of a sequence whose tokens only ever grow."""
        size = self._page_tokens
        for page in range(len(self._keys) - 1, num_pages):
            content = array("q", tokens[page * size : (page + 1) * size]).tobytes()
            self._keys.append(blake2b(self._keys[-1] + content, digest_size=16).digest())
        return self._keys[1 : num_pages + 1]


@dataclass(eq=False, slots=True)
class _Cached:
    """One page's books; owned by PrefixCache."""

    key: bytes
    owner: str | None
    num_hits: int = 0


class PrefixCache:
    """The owner of which page holds which prefix. `num_hit_tokens` of `num_asked_tokens` needed no computation."""

    def __init__(self, allocator: PageAllocator, evictions: EvictionQueue, page_tokens: int):
        self._allocator = allocator
        self._evictions = evictions
        self._page_tokens = page_tokens
        self._pages: dict[bytes, int] = {}
        self._cached: dict[int, _Cached] = {}
        self._idle: set[int] = set()
        self.num_hit_tokens = 0
        self.num_asked_tokens = 0

    @property
    def num_idle(self) -> int:
        """Cached pages that nobody uses: free on demand."""
        return len(self._idle)

    def take(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix, with the caller as one more owner until `release`."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            self._allocator.share(page)
            self._idle.discard(page)
            self._evictions.discard(page)
            pages.append(page)
        return pages

    def count(self, pages: Sequence[int], num_tokens: int) -> None:
        """Book that pages which were taken spare their computation, for a sequence of so many tokens."""
        for page in pages:
            self._cached[page].num_hits += 1
        self.num_hit_tokens += len(pages) * self._page_tokens
        self.num_asked_tokens += num_tokens

    def put(self, key: bytes, page: int, owner: str | None) -> int:
        """Cache a full page of the caller's; returns the page to go on with: another, if one is known already."""
        known = self._pages.get(key)
        if known is None:
            self._allocator.share(page)
            self._pages[key] = page
            self._cached[page] = _Cached(key, owner)
            return page
        if known != page:
            self.take([key])
            self.release([page])
        return known

    def release(self, pages: Sequence[int]) -> None:
        """End the caller's ownership of pages, cached or not."""
        self._allocator.free(pages)
        for page in reversed(pages):
            cached = self._cached.get(page)
            if cached is not None and self._allocator.num_owners(page) == 1:
                self._idle.add(page)
                self._evictions.add(page, 1, cached.num_hits * RECOMPUTE_COST, self._evict)

    def forget(self, owner: str | None) -> None:
        """Free all idle pages of an adapter that has gone for good."""
        for page in [page for page in self._idle if self._cached[page].owner == owner]:
            self._evictions.discard(page)
            self._evict(page)

    def owned_pages(self) -> list[int]:
        """All cached pages."""
        return list(self._cached)

    def check_integrity(self) -> None:
        """Assert that keys and pages mirror each other and that exactly the pages without other owners are idle."""
        assert {cached.key: page for page, cached in self._cached.items()} == self._pages, "keys and pages disagree"
        idle = {page for page in self._cached if self._allocator.num_owners(page) == 1}
        assert idle == self._idle, "an idle page is misfiled"

    def _evict(self, page: int) -> None:
        self._idle.remove(page)
        del self._pages[self._cached.pop(page).key]
        self._allocator.free([page])
