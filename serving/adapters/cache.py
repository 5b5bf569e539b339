"""Caches adapters in two places: packed on the host, and resident in pages of the arena.

There is no fixed number of slots and no padding to the largest rank: an adapter takes the pages that its rows fill.
Idle adapters give way to other adapters and to KV cache alike (S-LoRA, arXiv 2311.03285, section 5), in the order of
`serving.memory.eviction`.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import InvalidAdapterError, NotFoundError, OverloadedError
from serving.adapters.device_copy import PageCopier, PendingCopy
from serving.adapters.packing import PackedAdapter
from serving.adapters.residency import Residency, Tier
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter in the arena, with what a batch needs to know of it. Offsets are in elements of the whole arena.

    Each copy into the arena has its own `number`. ranks_M (int32), scalings_M (float32), table_starts_M (int64) and
    is_dora_M (bool) are on the host; a_rows_I and b_rows_I (int64) are on the arena's device. `pending_copy` is None if
    the copy had ended before this was made.
    """

    key: str
    number: int
    pages: tuple[int, ...]
    ranks_M: NDArray[np.int32]
    scalings_M: NDArray[np.float32]
    table_starts_M: NDArray[np.int64]
    is_dora_M: NDArray[np.bool_]
    a_rows_I: Tensor
    b_rows_I: Tensor
    pending_copy: PendingCopy | None = None


@dataclass(eq=False)
class _Entry:
    """What the cache knows of one adapter."""

    packed: PackedAdapter
    num_holds: int = 0  # accepted requests; while there are any, the adapter stays on the host
    num_pins: int = 0  # running sequences; while there are any, the adapter stays on the device
    num_uses: int = 0  # sequences that have ever run with it
    num_requests: int = 0  # requests that found it on the host
    load_s: float = 0.0
    resident: ResidentAdapter | None = None
    is_removed: bool = False


class AdapterCache:
    """Owns which adapters are on the host, resident and pinned. Keys are content hashes.

    A request calls `hold` when it is accepted and `drop` when it ends; in between the adapter stays on the host. A
    sequence calls `acquire` when it starts running and `release` when it stops; in between the adapter's pages are
    pinned. A resident adapter is always on the host too. `num_resident` adapters take `num_pages_used` pages.
    """

    def __init__(self, allocator: PageAllocator, evictions: EvictionQueue, arena_PE: Tensor, host_cache_bytes: int):
        self._allocator = allocator
        self._evictions = evictions
        self._arena_PE = arena_PE
        self._copier = PageCopier(arena_PE)
        self._host_cache_bytes = host_cache_bytes
        self._host_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._num_copied = 0
        self.num_resident = 0
        self.num_pages_used = 0
        self.num_evictions = 0

    def add(self, key: str, packed: PackedAdapter, load_s: float = 0.0) -> None:
        """Put an adapter on the host unless it is there.

        Adapters without requests leave the host, least recently used first, until it fits.
        Raises InvalidAdapterError if it can never fit, and OverloadedError if the adapters in use leave no room.
        """
        if key not in self._entries:
            self._make_host_room(packed)
            self._entries[key] = _Entry(packed, load_s=load_s)
            self._host_bytes += packed.num_bytes
        self._entries[key].is_removed = False
        self._entries.move_to_end(key)

    def replace(self, key: str, packed: PackedAdapter) -> None:
        """Replace the host's copy of an adapter, if the adapter is still there."""
        entry = self._entries.get(key)
        if entry is not None:
            self._host_bytes += packed.num_bytes - entry.packed.num_bytes
            entry.packed = packed

    def has(self, key: str) -> bool:
        """Whether new requests may use the adapter."""
        entry = self._entries.get(key)
        return entry is not None and not entry.is_removed

    def remove(self, key: str) -> None:
        """Refuse new requests for an adapter, and free its memory once no accepted request needs it."""
        if key in self._entries:
            self._entries[key].is_removed = True
            self._forget_if_unused(key)

    def is_resident(self, key: str) -> bool:
        """Whether the adapter is in the arena."""
        return self._entries[key].resident is not None

    def mapped(self, key: str) -> PackedAdapter | None:
        """Return the adapter if its next copy into the arena will read a mapped file. Any thread may call this."""
        entry = self._entries.get(key)
        return entry.packed if entry is not None and entry.resident is None and entry.packed.is_mapped else None

    def num_pages(self, key: str) -> int:
        """Return how many pages the adapter takes when resident."""
        return self._entries[key].packed.num_pages

    def num_pages_missing(self, key: str) -> int:
        """Return how many pages must be free to make the adapter resident: 0 if it is."""
        return 0 if self._entries[key].resident else self.num_pages(key)

    def hold(self, key: str) -> None:
        """Keep the adapter on the host until `drop`. Raises NotFoundError if it is not there."""
        if not self.has(key):
            raise NotFoundError(f"adapter {key} is not loaded")
        self._entries[key].num_holds += 1
        self._entries[key].num_requests += 1
        self._entries.move_to_end(key)

    def drop(self, key: str) -> bool:
        """End one `hold`. Returns False if the adapter was removed and this was its last hold."""
        entry = self._entries[key]
        assert entry.num_holds > 0, f"adapter {key} is dropped more often than held"
        entry.num_holds -= 1
        self._forget_if_unused(key)
        return key in self._entries

    def acquire(self, key: str) -> ResidentAdapter:
        """Pin the adapter in the arena, and copy it there if it is not resident. Raises OutOfPages.

        The caller must have called `hold`.
        """
        entry = self._entries[key]
        assert entry.num_holds > entry.num_pins, f"adapter {key} is acquired without a hold"
        if entry.resident is None:
            entry.resident = self._copy_in(key, entry.packed)
        entry.num_pins += 1
        entry.num_uses += 1
        self._evictions.discard(key)
        return entry.resident

    def prefetch(self, key: str) -> None:
        """Copy the adapter into the arena for a later request. It is idle until then. Raises OutOfPages."""
        entry = self._entries[key]
        assert entry.resident is None, f"adapter {key} is resident already"
        entry.resident = self._copy_in(key, entry.packed)
        self._evictions.add(key, entry.packed.num_pages, float(entry.num_uses), self._evict)

    def release(self, key: str) -> None:
        """End one `acquire`. Without pins the adapter stays resident until its pages are needed."""
        entry = self._entries[key]
        assert entry.num_pins > 0, f"adapter {key} is released more often than acquired"
        assert entry.resident is not None, f"adapter {key} is pinned but not resident"
        entry.num_pins -= 1
        if entry.num_pins == 0:
            self._evictions.add(key, len(entry.resident.pages), float(entry.num_uses), self._evict)

    @property
    def num_holds(self) -> int:
        """The number of `hold` calls not yet ended by `drop`."""
        return sum(entry.num_holds for entry in self._entries.values())

    @property
    def num_pins(self) -> int:
        """The number of `acquire` calls not yet ended by `release`."""
        return sum(entry.num_pins for entry in self._entries.values())

    @property
    def num_on_host(self) -> int:
        """The number of adapters on the host, including the resident ones."""
        return len(self._entries)

    @property
    def num_host_bytes(self) -> int:
        """The host memory that the adapters take."""
        return self._host_bytes

    def residencies(self) -> list[Residency]:
        """Report where each adapter is and how much it is used."""
        return [
            Residency(
                key,
                Tier.DEVICE if entry.resident else Tier.HOST,
                num_bytes=entry.packed.num_bytes,
                num_hits=entry.num_requests,
                num_running=entry.num_pins,
                load_s=entry.load_s,
            )
            for key, entry in self._entries.items()
        ]

    def residents(self) -> list[ResidentAdapter]:
        """Return the adapters in the arena."""
        return [entry.resident for entry in self._entries.values() if entry.resident]

    def owned_pages(self) -> list[tuple[int, ...]]:
        """Return the pages of each resident adapter."""
        return [resident.pages for resident in self.residents()]

    def check_integrity(self) -> None:
        """Assert that pins, holds, the eviction queue and the byte count agree."""
        for key, entry in self._entries.items():
            assert entry.num_holds >= entry.num_pins >= 0, f"adapter {key} has more pins than holds"
            is_idle = entry.resident is not None and entry.num_pins == 0
            assert is_idle == self._evictions.has(key), f"adapter {key} and the eviction queue disagree"
            assert not (entry.is_removed and entry.num_holds == 0), f"removed adapter {key} is still here"
        sizes = [len(pages) for pages in self.owned_pages()]
        assert (self.num_resident, self.num_pages_used) == (len(sizes), sum(sizes)), (
            "the counts of resident adapters are wrong"
        )
        assert self._host_bytes == sum(entry.packed.num_bytes for entry in self._entries.values()), (
            "the count of host bytes is wrong"
        )

    def check_size(self, packed: PackedAdapter) -> None:
        """Raise InvalidAdapterError if an adapter can never fit. Any thread may call this."""
        if packed.num_pages > self._allocator.num_pages:
            raise InvalidAdapterError(
                f"the adapter needs {packed.num_pages} pages of memory, but the arena has {self._allocator.num_pages}: "
                "raise serving.memory_bytes"
            )
        if packed.num_bytes > self._host_cache_bytes:
            raise InvalidAdapterError(
                f"the adapter takes {packed.num_bytes} bytes of host memory, more than serving.host_cache_bytes "
                f"({self._host_cache_bytes})"
            )

    def _make_host_room(self, packed: PackedAdapter) -> None:
        self.check_size(packed)
        limit = self._host_cache_bytes - packed.num_bytes
        in_use = sum(entry.packed.num_bytes for entry in self._entries.values() if entry.num_holds)
        if in_use > limit:
            raise OverloadedError(f"adapters in use fill serving.host_cache_bytes ({in_use} bytes): try again later")
        for key in [key for key, entry in self._entries.items() if not entry.num_holds]:
            if self._host_bytes <= limit:
                return
            self._forget(key)

    def _copy_in(self, key: str, packed: PackedAdapter) -> ResidentAdapter:
        device, page_elements = self._arena_PE.device, self._arena_PE.shape[1]
        pages = sorted(self._allocator.allocate(packed.num_pages))  # pages side by side are copied at once
        pages_P = torch.tensor(pages, dtype=torch.int64)
        pending_copy = self._copier.copy(packed, pages)
        self._num_copied += 1
        self.num_resident += 1
        self.num_pages_used += len(pages)

        def in_arena(rows_I: Tensor) -> Tensor:
            return (pages_P[rows_I // page_elements] * page_elements + rows_I % page_elements).to(device)

        return ResidentAdapter(
            key=key,
            number=self._num_copied,
            pages=tuple(pages),
            ranks_M=np.array(packed.ranks, np.int32),
            scalings_M=np.array(packed.scalings, np.float32),
            table_starts_M=np.array(packed.table_starts, np.int64),
            is_dora_M=np.array(packed.is_dora, np.bool_),
            a_rows_I=in_arena(packed.a_rows_I),
            b_rows_I=in_arena(packed.b_rows_I),
            pending_copy=pending_copy,
        )

    def _evict(self, key: str) -> None:
        self._free_pages(key)
        self.num_evictions += 1

    def _free_pages(self, key: str) -> None:
        entry = self._entries[key]
        assert entry.resident is not None, f"adapter {key} is evicted but not resident"
        assert entry.num_pins == 0, f"adapter {key} is evicted but pinned"
        if entry.resident.pending_copy is not None:
            entry.resident.pending_copy.wait()  # or it would overwrite the next owner's data
        self._allocator.free(entry.resident.pages)
        self.num_resident -= 1
        self.num_pages_used -= len(entry.resident.pages)
        entry.resident = None

    def _forget_if_unused(self, key: str) -> None:
        if self._entries[key].is_removed and self._entries[key].num_holds == 0:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if self._entries[key].resident is not None:
            self._evictions.discard(key)
            self._free_pages(key)
        self._host_bytes -= self._entries.pop(key).packed.num_bytes
