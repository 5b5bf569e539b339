"""KV of preempted sequences, kept on the host: copied back, it need not be computed again.

Swapping against recomputing is the choice of vLLM (arXiv 2309.06180, section 4.5). Here it is made by measured cost,
page by page the same for all: a copy out and one back against a prefill of as many tokens. Of a sequence's pages those
at the beginning that others hold too are not copied: they stay where they are, and are taken again by way of the prefix
cache. Pages that only the cache holds beside it are copied like its own, since memory is short and they go next.

On a GPU the host's pages are pinned and copies are queued on the stream of the forward passes, which orders them with
whatever writes to either side later; what is measured then is only the queueing.

Shape letters: P pages, E elements of a page.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.memory.arena import new_arena
from serving.memory.pages import PageAllocator

_WEIGHT = 0.1  # of the last measurement in a moving average


@dataclass(frozen=True)
class Swapped:
    """Where the KV of a sequence's first `num_stored` tokens is, but for that of its pages before `first_page`."""

    first_page: int
    num_stored: int
    slots: tuple[int, ...]


class SwapSpace:
    """The owner of the host's copies. `num_pages_out` and `num_pages_in` count what was copied so far.

    With `swap_bytes` less than a page nothing is ever swapped.
    """

    def __init__(self, arena_PE: Tensor, swap_bytes: int, page_tokens: int):
        self._arena_PE = arena_PE
        self._page_tokens = page_tokens
        num_slots = swap_bytes // (arena_PE.shape[1] * arena_PE.itemsize)
        self._slots_PE = _host_memory(num_slots, arena_PE)
        self._free = PageAllocator(num_slots)
        self._page_s: float | None = None  # to copy a page, one way
        self._token_s: float | None = None  # to compute a token's KV anew
        self.num_pages_out = 0
        self.num_pages_in = 0

    @property
    def num_pages_used(self) -> int:
        """Pages on the host."""
        return self._free.num_pages - self._free.num_free

    def book_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell it of a step with prefills: what it costs to compute anew."""
        self._token_s = _averaged(self._token_s, seconds / num_tokens)

    def save(self, pages: Sequence[int], first_page: int, num_stored: int) -> Swapped | None:
        """Copy a sequence's pages from `first_page` on; None where there is no room, or computing anew costs less."""
        wanted = pages[first_page : -(-num_stored // self._page_tokens)]
        if not wanted or len(wanted) > self._free.num_free:
            return None
        if not self._is_cheaper():
            assert self._page_s is not None, "a cost that nobody measured"
            self._page_s *= 1 - _WEIGHT  # forgets: what one slow copy has said is tried again some time
            return None
        slots = self._free.allocate(len(wanted))
        self._copy(self._slots_PE, slots, self._arena_PE, wanted)
        self.num_pages_out += len(wanted)
        return Swapped(first_page, num_stored, tuple(slots))

    def load(self, swapped: Swapped, first_page: int, pages: Sequence[int]) -> None:
        """Copy a sequence's pages from `first_page` on to these pages of the arena; the copies are kept."""
        slots = swapped.slots[first_page - swapped.first_page :]
        self._copy(self._arena_PE, pages[: len(slots)], self._slots_PE, slots)
        self.num_pages_in += len(slots)

    def drop(self, swapped: Swapped) -> None:
        """Give a sequence's room on the host back."""
        self._free.free(swapped.slots)

    def check_integrity(self, swapped: Iterable[Swapped]) -> None:
        """Assert that exactly these sequences have pages here."""
        self._free.check_integrity([one.slots for one in swapped])

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
