"""The adapter cache: packed adapters come back bit for bit, pins and holds are exact, all memory is freed."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.adapters.files import Adapter, LoraFactors
from cluster.errors import InvalidAdapterError, NotFoundError, OverloadedError
from serving.adapters.packing import PackedAdapter, dora_factors, pack_adapter, piece_width
from serving.memory.pages import OutOfPages
from tests.worlds.adapters import MODULES, PAGE_ELEMENTS, SHAPES, AdapterMemory, make_factors


def make_packed(rank: int = 4, seed: int = 0) -> PackedAdapter:
    return pack_adapter(
        make_factors({"a.q_proj": rank, "a.down_proj": rank}, seed), MODULES, PAGE_ELEMENTS, torch.float32
    )


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 17)), st.integers(92, 700))
def test_packed_rows_never_cross_pages_or_overlap(ranks: dict[str, int], page_elements: int) -> None:
    packed = pack_adapter(make_factors(ranks), MODULES, page_elements, torch.float32)
    taken = torch.zeros(packed.pages_PE.numel(), dtype=torch.int32)
    for m, module in enumerate(MODULES):
        table = slice(packed.table_starts[m], packed.table_starts[m] + packed.ranks[m])
        for width, rows in zip(SHAPES[module], (packed.b_rows_I[table], packed.a_rows_I[table]), strict=True):
            for offset in rows.tolist():
                assert offset // page_elements == (offset + width - 1) // page_elements
                taken[offset : offset + width] += 1
        last = int(max(packed.a_rows_I[table].max(), packed.b_rows_I[table].max())) if packed.ranks[m] else -1
        assert packed.page_ends[m] == last // page_elements + 1
    assert packed.ranks == tuple(ranks.get(module, 0) for module in MODULES)
    assert all(count <= 1 for count in taken.tolist())


@pytest.mark.parametrize("rank", [2, 4, 8, 16, 32, 64])
def test_packing_wastes_little(rank: int) -> None:
    """A small version of a Llama of width 4096: rows of four widths, and pages that hold several of the widest."""
    shapes = {"q": (32, 32), "k": (8, 32), "v": (8, 32), "o": (32, 32), "gate": (112, 32), "down": (32, 112)}
    modules = [f"{layer}.{name}" for layer in range(16) for name in shapes]
    factors = {
        m: LoraFactors(torch.ones(rank, d), torch.ones(f, rank), 1.0)
        for m in modules
        for f, d in [shapes[m.split(".")[1]]]
    }
    packed = pack_adapter(Adapter(factors), modules, 1024, torch.float32)
    num_elements = sum(rank * (f + d) for f, d in shapes.values()) * 16
    assert packed.num_pages <= -(-num_elements // 1024) * 1.04
    ends = pairwise(packed.page_ends)
    assert all(later >= earlier - 1 for earlier, later in ends), "layers are in order, except where rows fill gaps"


def test_small_pages_waste_little() -> None:
    packed = make_packed(rank=16)
    num_elements = 16 * (60 + 36 + 36 + 92)
    assert packed.num_pages <= 1.15 * num_elements / PAGE_ELEMENTS


def test_rows_of_one_module_are_side_by_side() -> None:
    packed = pack_adapter(make_factors({"a.q_proj": 5}), MODULES, PAGE_ELEMENTS, torch.float32)
    assert packed.a_rows_I.diff().tolist() == [36] * 4


def test_resident_rows_equal_the_adapter() -> None:
    memory, adapter = AdapterMemory(40), make_factors({"a.q_proj": 3, "a.down_proj": 9})
    scattered = memory.allocator.allocate(40)
    memory.allocator.free(scattered[1::2])
    memory.cache.add("k", pack_adapter(adapter, MODULES, PAGE_ELEMENTS, torch.float32))
    resident = memory.use("k")
    for module, factors in adapter.factors.items():
        a_RD, b_FR = memory.rows(resident, module)
        assert torch.equal(a_RD, factors.a_RD)
        assert torch.equal(b_FR, factors.b_FR)
    assert resident.ranks_M.tolist() == [3, 0, 9]
    assert resident.scalings_M.tolist() == [2.0, 0.0, 2.0]
    memory.check(scattered[0::2])


@pytest.mark.parametrize("page_elements", [41, 60, 200])
def test_rows_longer_than_a_page_are_cut_into_pieces(page_elements: int) -> None:
    """A head with 130 outputs and an embedding with 130 inputs, both DoRA of rank 3."""
    generator = torch.Generator().manual_seed(1)
    tall = LoraFactors(torch.randn(3, 36, generator=generator), torch.randn(130, 3, generator=generator), 2.0)
    wide = LoraFactors(torch.randn(3, 130, generator=generator), torch.randn(36, 3, generator=generator), 0.5)
    dora = {"head": torch.rand(130, generator=generator), "embedding": torch.rand(36, generator=generator)}
    adapter = Adapter({"head": tall, "embedding": wide})
    packed = pack_adapter(adapter, ("embedding", "head"), page_elements, torch.float32, dora)
    width = piece_width(130, page_elements)
    assert width <= page_elements
    long_rows = {0: (wide.a_RD, packed.a_rows_I), 1: (tall.b_FR.T * dora["head"], packed.b_rows_I)}
    for m, (rows, table) in long_rows.items():
        for i, row in enumerate(rows):
            entries = [packed.table_starts[m] + k * 3 + i for k in range(-(-130 // width))]
            assert torch.equal(read(packed, table[entries], 130, width), row)
    gains = packed.b_rows_I[packed.table_starts[1] + 3 * -(-130 // width) :]
    torch.testing.assert_close(read(packed, gains, 130, width), dora["head"] - 1.0)
    short_gains = packed.b_rows_I[packed.table_starts[0] + 3 : packed.table_starts[0] + 4]
    torch.testing.assert_close(read(packed, short_gains, 36, 36), dora["embedding"] - 1.0)
    assert packed.is_dora == (True, True)


def read(packed: PackedAdapter, offsets: Tensor, num_elements: int, width: int) -> Tensor:
    """Join a row from its pieces, and check that each piece lies in one page."""
    pieces = []
    for start, offset in zip(range(0, num_elements, width), offsets.tolist(), strict=False):
        length, page = min(width, num_elements - start), packed.pages_PE.shape[1]
        assert offset // page == (offset + length - 1) // page
        pieces.append(packed.pages_PE.view(-1)[offset : offset + length])
    return torch.cat(pieces)


def test_a_plain_adapter_has_no_room_for_gains() -> None:
    packed = make_packed(rank=4)
    assert packed.is_dora == (False,) * 3
    assert len(packed.a_rows_I) == len(packed.b_rows_I) == 8


def test_dora_on_a_zero_row_is_refused() -> None:
    factors = LoraFactors(torch.zeros(2, 36), torch.zeros(20, 2), 1.0, torch.ones(20))
    adapter = Adapter({"a.v_proj": factors})
    factor = dora_factors(adapter, {"a.v_proj": torch.zeros(20, 36)})
    with pytest.raises(InvalidAdapterError, match="float32"):
        pack_adapter(adapter, MODULES, PAGE_ELEMENTS, torch.float32, factor)


def test_values_that_overflow_the_dtype_are_refused() -> None:
    adapter = make_factors({"a.q_proj": 2})
    adapter.factors["a.q_proj"].a_RD[0, 0] = 1e6
    with pytest.raises(InvalidAdapterError, match="float16"):
        pack_adapter(adapter, MODULES, PAGE_ELEMENTS, torch.float16)


def test_two_sequences_share_one_copy() -> None:
    memory = AdapterMemory(30)
    memory.cache.add("k", make_packed())
    assert memory.use("k") is memory.use("k")
    assert memory.cache.num_resident == 1
    memory.check()


def test_idle_adapter_stays_until_its_pages_are_needed() -> None:
    memory = AdapterMemory(make_packed().num_pages)
    memory.cache.add("k", make_packed())
    memory.use("k")
    assert not memory.evictions.make_room(1)
    memory.unuse("k")
    assert memory.allocator.num_free == 0
    assert memory.evictions.make_room(1)
    assert memory.allocator.num_free == memory.allocator.num_pages
    assert memory.cache.num_evictions == 1
    memory.check()


def test_least_recently_used_goes_first() -> None:
    memory = AdapterMemory(3 * make_packed().num_pages)
    for key in "abc":
        memory.cache.add(key, make_packed())
        memory.use(key)
    for key in "bac":
        memory.unuse(key)
    memory.use("b")
    memory.unuse("b")
    assert memory.evictions.make_room(1)
    assert memory.cache.num_pages_missing("a") > 0
    assert memory.cache.num_pages_missing("b") == memory.cache.num_pages_missing("c") == 0


def test_make_room_evicts_nothing_if_it_cannot_free_enough() -> None:
    memory = AdapterMemory(2 * make_packed().num_pages)
    for key in "ab":
        memory.cache.add(key, make_packed())
        memory.use(key)
    memory.unuse("a")
    assert not memory.evictions.make_room(make_packed().num_pages + 1)
    assert not memory.evictions.make_room(1, keep=("a",))
    assert memory.cache.num_resident == 2


def test_evicted_adapter_comes_back_the_same() -> None:
    memory, adapter = AdapterMemory(30), make_factors({"a.v_proj": 4}, seed=3)
    memory.cache.add("k", pack_adapter(adapter, MODULES, PAGE_ELEMENTS, torch.float32))
    memory.use("k")
    memory.unuse("k")
    assert memory.evictions.make_room(30)
    taken = memory.allocator.allocate(7)
    a_RD, b_FR = memory.rows(memory.use("k"), "a.v_proj")
    assert torch.equal(a_RD, adapter.factors["a.v_proj"].a_RD)
    assert torch.equal(b_FR, adapter.factors["a.v_proj"].b_FR)
    memory.check(taken)


def test_acquire_without_room_changes_nothing() -> None:
    memory = AdapterMemory(make_packed().num_pages)
    memory.cache.add("k", make_packed())
    taken = memory.allocator.allocate(1)
    memory.cache.hold("k")
    with pytest.raises(OutOfPages):
        memory.cache.acquire("k")
    memory.check(taken)
    memory.allocator.free(taken)
    assert memory.cache.acquire("k").pages


@pytest.mark.parametrize("end", ["release", "drop"])
def test_unbalanced_release_or_drop_is_our_bug(end: str) -> None:
    memory = AdapterMemory(30)
    memory.cache.add("k", make_packed())
    with pytest.raises(AssertionError, match="more often"):
        getattr(memory.cache, end)("k")


def test_removed_adapter_serves_accepted_requests() -> None:
    memory = AdapterMemory(30)
    memory.cache.add("k", make_packed())
    memory.use("k")
    memory.cache.remove("k")
    assert not memory.cache.has("k")
    with pytest.raises(NotFoundError):
        memory.cache.hold("k")
    assert memory.cache.num_resident == 1
    memory.unuse("k")
    assert (memory.allocator.num_free, memory.cache.num_host_bytes) == (30, 0)
    memory.check()


def test_removed_and_added_again_stays() -> None:
    memory = AdapterMemory(30)
    memory.cache.add("k", make_packed())
    memory.use("k")
    memory.cache.remove("k")
    memory.cache.add("k", make_packed())
    memory.unuse("k")
    assert memory.cache.has("k")
    assert memory.cache.num_on_host == 1


def test_removing_an_unknown_adapter_does_nothing() -> None:
    memory = AdapterMemory(3)
    memory.cache.remove("k")
    assert not memory.cache.has("k")


def test_host_keeps_its_budget_and_forgets_the_least_recent() -> None:
    memory = AdapterMemory(30, host_cache_bytes=2 * make_packed().num_bytes)
    for key in "ab":
        memory.cache.add(key, make_packed())
    memory.use("a")
    memory.unuse("a")
    memory.cache.add("c", make_packed())
    assert [memory.cache.has(key) for key in "abc"] == [True, False, True]
    memory.check()


def test_adapters_in_use_are_not_forgotten() -> None:
    memory = AdapterMemory(30, host_cache_bytes=make_packed().num_bytes)
    memory.cache.add("a", make_packed())
    memory.cache.hold("a")
    with pytest.raises(OverloadedError, match="host_cache_bytes"):
        memory.cache.add("b", make_packed())
    memory.cache.drop("a")
    memory.cache.add("b", make_packed())
    assert (memory.cache.has("a"), memory.cache.has("b")) == (False, True)


def test_adapter_larger_than_any_budget_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="memory_bytes"):
        AdapterMemory(make_packed().num_pages - 1).cache.add("k", make_packed())
    with pytest.raises(InvalidAdapterError, match="host_cache_bytes"):
        AdapterMemory(30, host_cache_bytes=make_packed().num_bytes - 1).cache.add("k", make_packed())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "map", "use", "unuse", "remove", "kv", "free"]), st.integers(0, 4)),
        max_size=60,
    )
)
def test_random_operations_keep_exact_counts(operations: list[tuple[str, int]]) -> None:
    memory = AdapterMemory(25, host_cache_bytes=4 * make_packed(6).num_bytes)
    adapters = [make_packed(rank, seed=rank) for rank in (1, 2, 3, 4, 6)]
    used: list[str] = []
    kv: list[list[int]] = []
    for operation, i in operations:
        key = f"k{i}"
        if operation == "add":
            try:
                memory.cache.add(key, adapters[i])
            except OverloadedError:
                assert used
        elif operation == "map":
            memory.cache.replace(key, replace(adapters[i], is_mapped=True))
        elif operation == "use" and memory.cache.has(key):
            if memory.evictions.make_room(memory.cache.num_pages_missing(key), keep=(key,)):
                memory.use(key)
                used.append(key)
        elif operation == "unuse" and used:
            memory.unuse(used.pop(i % len(used)))
        elif operation == "remove":
            memory.cache.remove(key)
        elif operation == "kv" and memory.evictions.make_room(i):
            kv.append(memory.allocator.allocate(i))
        elif operation == "free" and kv:
            memory.allocator.free(kv.pop())
        memory.check(*kv)
        assert memory.cache.num_host_bytes <= 4 * make_packed(6).num_bytes
    for key in used:
        memory.unuse(key)
    for i in range(5):
        memory.cache.remove(f"k{i}")
    assert memory.allocator.num_free == 25 - sum(map(len, kv))
    assert memory.cache.num_host_bytes == 0
