"""Adapters of a model with three small modules, and an arena with a cache of adapters in it."""

import torch
from torch import Tensor

from cluster.adapters.files import Adapter, LoraFactors
from serving.adapters.cache import AdapterCache, ResidentAdapter
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator

SHAPES = {"a.q_proj": (60, 36), "a.v_proj": (20, 36), "a.down_proj": (36, 92)}  # (out, in)
MODULES = tuple(SHAPES)
PAGE_ELEMENTS = 200


def make_factors(ranks: dict[str, int], seed: int = 0, scaling: float = 2.0) -> Adapter:
    """Return an adapter with random factors of the given ranks."""
    generator = torch.Generator().manual_seed(seed)

    def factors(module: str, rank: int) -> LoraFactors:
        num_out, num_in = SHAPES[module]
        a_RD, b_FR = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
        return LoraFactors(a_RD, b_FR, scaling)

    return Adapter({module: factors(module, rank) for module, rank in sorted(ranks.items())})


class AdapterMemory:
    """An arena full of NaN with its allocator, its eviction queue and an adapter cache."""

    def __init__(self, num_pages: int, host_cache_bytes: int = 1 << 40, device: str = "cpu"):
        self.allocator = PageAllocator(num_pages)
        self.evictions = EvictionQueue(self.allocator)
        self.arena_PE = torch.full((num_pages, PAGE_ELEMENTS), float("nan"), device=device)
        self.cache = AdapterCache(self.allocator, self.evictions, self.arena_PE, host_cache_bytes)

    def rows(self, resident: ResidentAdapter, module: str) -> tuple[Tensor, Tensor]:
        """Return lora_a and lora_b of a module as the kernels would read them from the arena."""
        m = MODULES.index(module)
        num_out, num_in = SHAPES[module]
        table = slice(int(resident.table_starts_M[m]), int(resident.table_starts_M[m]) + int(resident.ranks_M[m]))
        flat = self.arena_PE.view(-1)
        a_RD = flat[resident.a_rows_I[table][:, None] + torch.arange(num_in)]
        return a_RD, flat[resident.b_rows_I[table][:, None] + torch.arange(num_out)].T

    def use(self, key: str) -> ResidentAdapter:
        """Hold and acquire an adapter, as a sequence that starts does."""
        self.cache.hold(key)
        return self.cache.acquire(key)

    def unuse(self, key: str) -> None:
        """Release and drop an adapter, as a sequence that ends does."""
        self.cache.release(key)
        self.cache.drop(key)

    def check(self, *other_owners: list[int]) -> None:
        """Assert that every page is free or has exactly its owners."""
        self.allocator.check_integrity([*self.cache.owned_pages(), *other_owners])
        self.cache.check_integrity()
