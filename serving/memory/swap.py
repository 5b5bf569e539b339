"""Swaps the KV of preempted sequences to the host, so that it can be copied back instead of recomputed.

vLLM chooses between swapping and recomputing (arXiv 2309.06180, section 4.5). Here measured costs decide: copying a
page out and back against prefilling as many tokens. The first pages of a sequence are not copied if other sequences
hold them too: they stay in the arena, and the sequence takes them again from the prefix cache. Pages that only the
prefix cache holds beside the sequence are copied, since memory is short and they are evicted next.

On a GPU the host's pages are pinned, and copies are queued on the stream of the forward passes. That orders them with
all later reads and writes of either side. Only the queueing is measured then.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.memory.arena import new_arena
from serving.memory.pages import PageAllocator

_WEIGHT = 0.1  # weight of a new measurement in a moving average


@dataclass(frozen=True)
class Swapped:
    """The host slots that hold a sequence's KV up to `num_stored` tokens, from its page `first_page` on."""

    first_page: int
    num_stored: int
    slots: tuple[int, ...]


class SwapSpace:
    """Owns the host's copies of KV pages. `num_pages_out` and `num_pages_in` count the pages copied so far.

    If `swap_bytes` is less than a page, nothing is swapped.
    """

    def __init__(self, arena_PE: Tensor, swap_bytes: int, page_tokens: int):
        self._arena_PE = arena_PE
        self._page_tokens = page_tokens
        num_slots = swap_bytes // (arena_PE.shape[1] * arena_PE.itemsize)
        self._slots_PE = _host_memory(num_slots, arena_PE)
        self._allocator = PageAllocator(num_slots)
        self._page_s: float | None = None  # seconds to copy a page one way
        self._token_s: float | None = None  # seconds to recompute a token's KV
        self.num_pages_out = 0
        self.num_pages_in = 0

    @property
    def num_pages_used(self) -> int:
        """The number of pages on the host."""
        return self._allocator.num_pages - self._allocator.num_free

    def record_prefill(self, num_tokens: int, seconds: float) -> None:
        """Record how long a step with prefills took, to learn what recomputing costs."""
        self._token_s = _averaged(self._token_s, seconds / num_tokens)

    def save(self, pages: Sequence[int], first_page: int, num_stored: int) -> Swapped | None:
        """Copy a sequence's pages from `first_page` on to the host.

        Returns None, and copies nothing, if the host has no room or recomputing costs less.
        """
        wanted = pages[first_page : -(-num_stored // self._page_tokens)]
        if not wanted or len(wanted) > self._allocator.num_free:
            return None
        if not self._is_cheaper():
            assert self._page_s is not None, "no copy was measured"
            self._page_s *= 1 - _WEIGHT  # so that one slow copy does not end swapping for good
            return None
        slots = self._allocator.allocate(len(wanted))
        self._copy(self._slots_PE, slots, self._arena_PE, wanted)
        self.num_pages_out += len(wanted)
        return Swapped(first_page, num_stored, tuple(slots))

    def load(self, swapped: Swapped, first_page: int, pages: Sequence[int]) -> None:
        """Copy a sequence's pages from `first_page` on back to `pages` of the arena. The host keeps its copies."""
        slots = swapped.slots[first_page - swapped.first_page :]
        self._copy(self._arena_PE, pages[: len(slots)], self._slots_PE, slots)
        self.num_pages_in += len(slots)

    def drop(self, swapped: Swapped) -> None:
        """Free a sequence's slots on the host."""
        self._allocator.free(swapped.slots)

    def check_integrity(self, swapped: Iterable[Swapped]) -> None:
        """Assert that exactly these sequences have slots here."""
        self._allocator.check_integrity([one.slots for one in swapped])

    def _is_cheaper(self) -> bool:
        if self._page_s is None or self._token_s is None:
            return True
        return 2 * self._page_s < self._page_tokens * self._token_s

    def _copy(self, to_PE: Tensor, to: Sequence[int], from_PE: Tensor, source: Sequence[int]) -> None:
        started_at = time.perf_counter()
        for target, origin in zip(to, source, strict=True):
            to_PE[target].copy_(from_PE[origin], non_blocking=True)
        if to:
            self._page_s = _averaged(self._page_s, (time.perf_counter() - started_at) / len(to))


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else average + _WEIGHT * (value - average)


def _host_memory(num_pages: int, like_PE: Tensor) -> Tensor:
    if like_PE.device.type == "cpu":
        return new_arena(max(num_pages, 1), like_PE.shape[1], like_PE.dtype, like_PE.device)
    return torch.empty(num_pages, like_PE.shape[1], dtype=like_PE.dtype, pin_memory=True)
