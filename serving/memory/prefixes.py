"""Caches the KV of prompt prefixes, page by page, for later requests with the same tokens and the same weights.

A page's key is a hash of everything its KV depends on: the adapter's content hash, the tenant's salt, and all tokens
from the first on. Each key hashes the key of the page before it (vLLM, arXiv 2309.06180, section 4.4). The base is not
part of the key, since an arena belongs to one engine and so to one base. An adapter reloaded under the same name has
another content hash, and an alias has the same one, so no request reads KV of other weights.

Only full pages are cached. The cache is one of the owners of a cached page. When it is the last one, the page is idle
and can be evicted. A sequence that holds a page holds all pages before it and releases them after it, so the last page
of a prefix is evicted first.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator

# The cost of recomputing a page of KV, relative to copying a page of an adapter again. On an H100 with a model of
# Llama-3-8B's shape, 16 tokens of prefill take about 0.6 ms and 2 MB over PCIe 40 us. On CPUs the ratio is larger.
RECOMPUTE_COST = 16.0


class PrefixKeys:
    """The keys of one sequence's full pages, computed on demand. `owner` is the adapter's content hash."""

    def __init__(self, owner: str | None, salt: tuple[str, ...], page_tokens: int):
        self.owner = owner
        self._page_tokens = page_tokens
        self._keys = [blake2b(repr((owner, salt)).encode(), digest_size=16).digest()]

    def up_to(self, tokens: Sequence[int], num_pages: int) -> list[bytes]:
        """Return the keys of the first `num_pages` pages. `tokens` may only grow from call to call."""
        size = self._page_tokens
        for page in range(len(self._keys) - 1, num_pages):
            content = array("q", tokens[page * size : (page + 1) * size]).tobytes()
            self._keys.append(blake2b(self._keys[-1] + content, digest_size=16).digest())
        return self._keys[1 : num_pages + 1]


@dataclass(eq=False, slots=True)
class _Cached:
    """What the cache knows of one page."""

    key: bytes
    owner: str | None
    num_hits: int = 0


class PrefixCache:
    """Owns the mapping from prefixes to pages. `num_hit_tokens` of `num_asked_tokens` tokens came from the cache."""

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
        """The number of cached pages that no sequence uses: they can be evicted."""
        return len(self._idle)

    def take(self, keys: Iterable[bytes]) -> list[int]:
        """Return the pages of the longest cached prefix. The caller owns them too, until `release`."""
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
        """Count the hits of a sequence of `num_tokens` tokens that took these pages."""
        for page in pages:
            self._cached[page].num_hits += 1
        self.num_hit_tokens += len(pages) * self._page_tokens
        self.num_asked_tokens += num_tokens

    def put(self, key: bytes, page: int, owner: str | None) -> int:
        """Cache a full page of the caller's, and return the page to use from now on.

        That is another page if one with this key is cached already; the caller then owns that one instead.
        """
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
        """End the caller's ownership of pages, whether they are cached or not."""
        self._allocator.free(pages)
        for page in reversed(pages):
            cached = self._cached.get(page)
            if cached is not None and self._allocator.num_owners(page) == 1:
                self._idle.add(page)
                self._evictions.add(page, 1, cached.num_hits * RECOMPUTE_COST, self._evict)

    def forget(self, owner: str | None) -> None:
        """Free all idle pages of an adapter that was removed."""
        for page in [page for page in self._idle if self._cached[page].owner == owner]:
            self._evictions.discard(page)
            self._evict(page)

    def owned_pages(self) -> list[int]:
        """Return all cached pages."""
        return list(self._cached)

    def check_integrity(self) -> None:
        """Assert that keys and pages agree, and that exactly the pages without other owners are idle."""
        assert {cached.key: page for page, cached in self._cached.items()} == self._pages, "keys and pages disagree"
        idle = {page for page in self._cached if self._allocator.num_owners(page) == 1}
        assert idle == self._idle, "the set of idle pages is wrong"

    def _evict(self, page: int) -> None:
        self._idle.remove(page)
        del self._pages[self._cached.pop(page).key]
        self._allocator.free([page])
