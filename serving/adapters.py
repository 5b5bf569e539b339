"""Which adapters are where: on the host, packed and ready to copy; on the device, in pages of the arena.

There is no fixed number of slots and no padding to a largest rank: an adapter takes as many pages as its rows fill, and
idle ones give way, least recently used first, to other adapters and to KV cache alike (S-LoRA, arXiv 2311.03285,
section 5).

Shape letters: M target modules of the whole model, N rows of an adapter over all modules, P pages, E elements of a
page.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import InvalidAdapterError, NotFoundError, OverloadedError
from serving.packing import PackedAdapter
from serving.pages import PageArena


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter in the arena: what a batch needs to know of it. Offsets are in elements of the whole arena.

    ranks_M: int32; scalings_M: float32; table_starts_M, a_rows_N, b_rows_N: int64; all on the arena's device.
    """

    key: str
    pages: tuple[int, ...]
    ranks: tuple[int, ...]
    ranks_M: Tensor
    scalings_M: Tensor
    table_starts_M: Tensor
    a_rows_N: Tensor
    b_rows_N: Tensor


@dataclass(eq=False)
class _Entry:
    """One adapter's books; owned by AdapterCache."""

    packed: PackedAdapter
    num_holds: int = 0  # requests accepted for it: it stays on the host
    num_pins: int = 0  # sequences running with it: it stays on the device
    resident: ResidentAdapter | None = None
    is_removed: bool = False


class AdapterCache:
    """The one owner of what is on the host, what is resident and what is pinned. Keys are content hashes.

    `hold` and `drop` bracket a request's life and keep the adapter on the host; `acquire` and `release` bracket the
    time in which a sequence runs and pin the adapter's pages. What is resident is always on the host as well.
    `num_resident` adapters are on the device and take `num_pages_used` pages there.
    """

    def __init__(self, arena: PageArena, memory_PE: Tensor, host_cache_bytes: int):
        self._arena = arena
        self._memory_PE = memory_PE
        self._host_cache_bytes = host_cache_bytes
        self._host_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._idle: OrderedDict[str, ResidentAdapter] = OrderedDict()  # resident, not pinned, longest idle first
        self.num_resident = 0
        self.num_pages_used = 0
        self.num_evictions = 0

    def add(self, key: str, packed: PackedAdapter) -> None:
        """Put an adapter on the host, or find it there; idle ones leave as the byte budget demands.

        Raises InvalidAdapterError where it can never fit, OverloadedError where all others are in use.
        """
        if key not in self._entries:
            self._make_host_room(packed)
            self._entries[key] = _Entry(packed)
            self._host_bytes += packed.num_bytes
        self._entries[key].is_removed = False
        self._entries.move_to_end(key)

    def has(self, key: str) -> bool:
        """Whether new requests may name it."""
        entry = self._entries.get(key)
        return entry is not None and not entry.is_removed

    def remove(self, key: str) -> None:
        """Refuse new requests; the memory comes back at once, or with the last request that was accepted before."""
        if key in self._entries:
            self._entries[key].is_removed = True
            self._forget_if_unused(key)

    def num_pages(self, key: str) -> int:
        """Pages that the adapter takes when resident."""
        return self._entries[key].packed.num_pages

    def num_pages_missing(self, key: str) -> int:
        """Pages to allocate before it is resident: 0 where it is."""
        return 0 if self._entries[key].resident else self.num_pages(key)

    def hold(self, key: str) -> None:
        """Keep it on the host until `drop`; raises NotFoundError where it is not there."""
        if not self.has(key):
            raise NotFoundError(f"adapter {key} is not loaded")
        self._entries[key].num_holds += 1
        self._entries.move_to_end(key)

    def drop(self, key: str) -> None:
        """End one `hold`."""
        entry = self._entries[key]
        assert entry.num_holds > 0, f"adapter {key} is dropped more often than held"
        entry.num_holds -= 1
        self._forget_if_unused(key)

    def acquire(self, key: str) -> ResidentAdapter:
        """Pin it, copied into the arena if it is not there; the caller holds it. Raises OutOfPages."""
        entry = self._entries[key]
        assert entry.num_holds > entry.num_pins, f"adapter {key} is acquired without a hold"
        if entry.resident is None:
            entry.resident = self._copy_in(key, entry.packed)
        entry.num_pins += 1
        self._idle.pop(key, None)
        return entry.resident

    def release(self, key: str) -> None:
        """End one `acquire`; without pins it stays resident until the room is needed."""
        entry = self._entries[key]
        assert entry.num_pins > 0, f"adapter {key} is released more often than acquired"
        assert entry.resident is not None, f"adapter {key} is pinned but not resident"
        entry.num_pins -= 1
        if entry.num_pins == 0:
            self._idle[key] = entry.resident

    def make_room(self, num_pages: int, keep: str | None = None) -> bool:
        """Evict idle adapters other than `keep` until that many pages are free; False, and none evicted, if in vain."""
        if self._arena.num_free >= num_pages:
            return True
        idle = [key for key in self._idle if key != keep]
        if self._arena.num_free + sum(len(self._idle[key].pages) for key in idle) < num_pages:
            return False
        for key in idle:
            self._evict(key)
            if self._arena.num_free >= num_pages:
                break
        return True

    @property
    def num_holds(self) -> int:
        """`hold` calls without their `drop` yet."""
        return sum(entry.num_holds for entry in self._entries.values())

    @property
    def num_pins(self) -> int:
        """`acquire` calls without their `release` yet."""
        return sum(entry.num_pins for entry in self._entries.values())

    @property
    def num_on_host(self) -> int:
        """Adapters on the host, the resident ones included."""
        return len(self._entries)

    @property
    def num_host_bytes(self) -> int:
        """Host memory that they take."""
        return self._host_bytes

    def owned_pages(self) -> list[tuple[int, ...]]:
        """Pages of each resident adapter."""
        return [entry.resident.pages for entry in self._entries.values() if entry.resident]

    def check_integrity(self) -> None:
        """Assert that pins, holds, the idle list and the byte count agree."""
        for key, entry in self._entries.items():
            assert entry.num_holds >= entry.num_pins >= 0, f"adapter {key} has more pins than holds"
            assert (key in self._idle) == (entry.resident is not None and entry.num_pins == 0), f"{key} is misfiled"
            assert not (entry.is_removed and entry.num_holds == 0), f"removed adapter {key} is still here"
        assert self._idle.keys() <= self._entries.keys(), "an idle adapter is not on the host"
        sizes = [len(pages) for pages in self.owned_pages()]
        assert (self.num_resident, self.num_pages_used) == (len(sizes), sum(sizes)), "counts of residents drifted"
        assert self._host_bytes == sum(entry.packed.num_bytes for entry in self._entries.values()), "host bytes drifted"

    def _make_host_room(self, packed: PackedAdapter) -> None:
        if packed.num_pages > self._arena.num_pages:
            raise InvalidAdapterError(
                f"the adapter needs {packed.num_pages} pages of memory, the arena has {self._arena.num_pages}: "
                "raise serving.memory_bytes"
            )
        limit = self._host_cache_bytes - packed.num_bytes
        if limit < 0:
            raise InvalidAdapterError(
                f"the adapter takes {packed.num_bytes} bytes of host memory, more than serving.host_cache_bytes "
                f"({self._host_cache_bytes})"
            )
        in_use = sum(entry.packed.num_bytes for entry in self._entries.values() if entry.num_holds)
        if in_use > limit:
            raise OverloadedError(f"adapters in use fill serving.host_cache_bytes ({in_use} bytes)")
        for key in [key for key, entry in self._entries.items() if not entry.num_holds]:
            if self._host_bytes <= limit:
                return
            self._forget(key)

    def _copy_in(self, key: str, packed: PackedAdapter) -> ResidentAdapter:
        device, page_elements = self._memory_PE.device, self._memory_PE.shape[1]
        pages = self._arena.allocate(packed.num_pages)
        pages_P = torch.tensor(pages, dtype=torch.int64)
        self._memory_PE[pages_P.to(device)] = packed.blob_PE.to(device)
        self.num_resident += 1
        self.num_pages_used += len(pages)

        def moved(rows_N: Tensor) -> Tensor:
            return (pages_P[rows_N // page_elements] * page_elements + rows_N % page_elements).to(device)

        return ResidentAdapter(
            key=key,
            pages=tuple(pages),
            ranks=packed.ranks,
            ranks_M=torch.tensor(packed.ranks, dtype=torch.int32, device=device),
            scalings_M=torch.tensor(packed.scalings, dtype=torch.float32, device=device),
            table_starts_M=torch.tensor(packed.table_starts, dtype=torch.int64, device=device),
            a_rows_N=moved(packed.a_rows_N),
            b_rows_N=moved(packed.b_rows_N),
        )

    def _evict(self, key: str) -> None:
        self._free_pages(key)
        self.num_evictions += 1

    def _free_pages(self, key: str) -> None:
        pages = self._idle.pop(key).pages
        self._arena.free(pages)
        self._entries[key].resident = None
        self.num_resident -= 1
        self.num_pages_used -= len(pages)

    def _forget_if_unused(self, key: str) -> None:
        if self._entries[key].is_removed and self._entries[key].num_holds == 0:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if key in self._idle:
            self._free_pages(key)
        self._host_bytes -= self._entries.pop(key).packed.num_bytes
