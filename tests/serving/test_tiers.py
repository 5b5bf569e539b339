"""Adapters move from store to disk, host and device. Engines of one machine share what one of them has packed."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cluster.adapters.files import load_adapter
from cluster.config.settings import ServingConfig
from cluster.errors import StorageError
from serving.adapters.cache import ResidentAdapter
from serving.adapters.device_copy import PendingCopy, part_ends
from serving.adapters.packing import PackedAdapter, pack_adapter
from serving.adapters.residency import Tier, summed
from serving.engine.batch_builder import BatchBuilder
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, Request, SamplingParams
from serving.engine.running import RunningTable, SchedulerOutput
from tests.worlds.adapters import MODULES, PAGE_ELEMENTS, AdapterMemory, make_factors
from tests.worlds.serving import make_adapter, make_checkpoint, make_sequence

CONFIG = ServingConfig(memory_bytes=1 << 20, max_rank=16)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
REFS = {name: AdapterRef(f"{i:064x}", name, 1, "blob") for i, name in enumerate(("plain", "dora"))}


@dataclass(frozen=True)
class Files:
    base: Path
    other_base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    base, other = make_checkpoint(folder / "v1"), make_checkpoint(folder / "v2", seed=1)
    adapters = {
        "plain": make_adapter(
            folder / "plain", base, seed=1, modules=("q_proj", "down_proj", "embed_tokens", "lm_head")
        ),
        "dora": make_adapter(folder / "dora", base, seed=2, dora=True),
    }
    return Files(base, other, adapters)


@asynccontextmanager
async def running(base: Path, packed_dir: Path | None, config: ServingConfig = CONFIG) -> AsyncIterator[EngineLoop]:
    loop = EngineLoop(Engine.open(base, config), packed_dir=packed_dir)
    loop.start()
    try:
        yield loop
        assert loop.is_healthy
        loop._engine.check_integrity()
    finally:
        loop.stop()


def gone() -> Path:
    raise StorageError("the store is gone")


async def tokens(loop: EngineLoop, name: str, source: Path | Callable[[], Path] = gone) -> list[int]:
    ref = REFS[name]
    await loop.ensure_adapter(ref, source)
    request = Request(name, tuple(range(5, 12)), GREEDY, ref)
    return list(chain.from_iterable([event.tokens async for event in loop.generate(request)]))


async def expected(files: Files, base: Path | None = None) -> dict[str, list[int]]:
    async with running(base or files.base, None) as loop:
        return {name: await tokens(loop, name, path) for name, path in files.adapters.items()}


async def test_engines_map_what_another_engine_packed(files: Files, tmp_path: Path) -> None:
    truth = await expected(files)
    assert truth["plain"] != truth["dora"]
    async with running(files.base, tmp_path) as first, running(files.base, tmp_path) as second:
        for name in files.adapters:
            await load(first, files, name)
        assert {name: await tokens(first, name) for name in files.adapters} == truth
        assert {name: await tokens(second, name) for name in files.adapters} == truth, "without the store"
        loads = [(loop.stats()["adapter_loads"], loop.stats()["adapter_fetches"]) for loop in (first, second)]
        assert loads == [(2, 2), (2, 0)]
    async with running(files.base, tmp_path) as restarted:
        assert {name: await tokens(restarted, name) for name in files.adapters} == truth


async def test_another_base_dtype_or_rank_limit_packs_again(files: Files, tmp_path: Path) -> None:
    """DoRA factors depend on the base's weights, not only on its shapes."""
    await fill(files, tmp_path)
    bfloat16 = replace(CONFIG, dtype="bfloat16")
    for base, config in ((files.other_base, CONFIG), (files.base, bfloat16), (files.base, replace(CONFIG, max_rank=7))):
        async with running(base, tmp_path, config) as loop:
            with pytest.raises(StorageError, match="gone"):
                await tokens(loop, "dora")
    async with running(files.other_base, tmp_path) as loop:
        assert await tokens(loop, "dora", files.adapters["dora"]) == (await expected(files, files.other_base))["dora"]


async def fill(files: Files, folder: Path) -> None:
    async with running(files.base, folder) as loop:
        for name in files.adapters:
            await load(loop, files, name)


async def load(loop: EngineLoop, files: Files, name: str) -> None:
    """Load an adapter and wait until it is on disk and mapped."""
    await loop.ensure_adapter(REFS[name], files.adapters[name])
    await stored(loop)


async def stored(loop: EngineLoop) -> None:
    async with asyncio.timeout(20):
        while loop._loader._writes.num_under_way:
            await asyncio.sleep(0.005)
    await loop.residencies()  # returns after the engine's thread has run all earlier commands


async def test_tiers_are_reported(files: Files, tmp_path: Path) -> None:
    async with running(files.base, tmp_path) as loop:
        assert await loop.residencies() == []
        await load(loop, files, "plain")
        assert await tiers(loop) == {"plain": Tier.HOST}
        await tokens(loop, "plain")
        await load(loop, files, "dora")
        assert await tiers(loop) == {"plain": Tier.DEVICE, "dora": Tier.HOST}
        await loop.remove_adapter(REFS["plain"].key)
        assert await tiers(loop) == {"plain": Tier.DISK, "dora": Tier.HOST}
        assert await tokens(loop, "plain")


async def tiers(loop: EngineLoop) -> dict[str, Tier]:
    known = summed(await loop.residencies())
    return {name: known[ref.key].tier for name, ref in REFS.items() if ref.key in known}


async def test_mapped_adapters_do_not_count_as_host_memory(files: Files, tmp_path: Path) -> None:
    async with running(files.base, None) as loop:
        await load(loop, files, "dora")
        private_bytes = loop._engine.stats()["host_bytes"]
    async with running(files.base, tmp_path) as loop:
        await load(loop, files, "dora")
        assert 0 < loop._engine.stats()["host_bytes"] <= private_bytes
        assert loop._engine.mapped_adapter(REFS["dora"].key) is not None


@pytest.mark.parametrize("how", ["truncated", "zeroed"])
async def test_a_damaged_file_is_packed_again(files: Files, tmp_path: Path, how: str) -> None:
    truth = await expected(files)
    await fill(files, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        size = path.stat().st_size
        if how == "truncated":
            path.write_bytes(path.read_bytes()[: size // 2])
        else:  # a crash may leave a file of which only the size reached the disk
            path.write_bytes(path.read_bytes()[:2000] + bytes(size - 2000))
    async with running(files.base, tmp_path) as loop:
        with pytest.raises(StorageError, match="gone"):
            await tokens(loop, "plain")
        for name in files.adapters:
            await load(loop, files, name)
    async with running(files.base, tmp_path) as loop:
        assert {name: await tokens(loop, name) for name in files.adapters} == truth


async def test_adapters_are_served_from_memory_if_the_disk_is_full(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    truth = await expected(files)
    with monkeypatch.context() as patch:
        patch.setattr("serving.adapters.disk_tier.save_file", no_space)
        async with running(files.base, tmp_path) as loop:
            assert {name: await tokens(loop, name, path) for name, path in files.adapters.items()} == truth
            await stored(loop)
    assert caplog.text.count("No space left") == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_concurrent_loads_of_two_engines_agree(files: Files, tmp_path: Path) -> None:
    truth = await expected(files)
    async with running(files.base, tmp_path) as first, running(files.base, tmp_path) as second:
        for loop in (first, second):
            loads = [loop.ensure_adapter(REFS[name], path) for name, path in files.adapters.items() for _ in range(4)]
            await asyncio.gather(*loads)
            await stored(loop)
        for loop in (first, second):
            assert {name: await tokens(loop, name) for name in files.adapters} == truth
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


async def test_a_request_finds_an_adapter_that_was_announced(files: Files) -> None:
    """Even if the loader's thread pauses between announcing the adapter and posting it."""

    class Slow(set[str]):
        def add(self, key: str) -> None:
            super().add(key)
            time.sleep(0.2)

    async with running(files.base, None) as loop:
        loop._announced = coming = Slow()
        first = asyncio.create_task(tokens(loop, "plain", files.adapters["plain"]))
        while not coming:
            await asyncio.sleep(0.001)
        request = Request("second", tuple(range(5, 12)), GREEDY, REFS["plain"])
        await loop.ensure_adapter(REFS["plain"], gone)
        second = list(chain.from_iterable([event.tokens async for event in loop.generate(request)]))
        assert second == await first


async def test_a_hanging_store_does_not_delay_adapters_on_disk(files: Files, tmp_path: Path) -> None:
    truth, release = await expected(files), threading.Event()
    await fill(files, tmp_path)

    def hanging() -> Path:
        release.wait(20)
        return gone()

    async with running(files.base, tmp_path) as loop:
        refs = [replace(REFS["plain"], key=f"{i:064x}") for i in range(10, 16)]
        hung = [asyncio.create_task(loop.ensure_adapter(ref, hanging)) for ref in refs]
        await asyncio.sleep(0.05)
        assert {name: await tokens(loop, name) for name in files.adapters} == truth
        assert not any(task.done() for task in hung)
        release.set()
        errors = await asyncio.gather(*hung, return_exceptions=True)
        assert all(isinstance(error, StorageError) for error in errors)


async def test_a_mapped_adapter_is_touched_before_it_is_copied(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[int] = []
    monkeypatch.setattr(PackedAdapter, "touch", lambda packed: touched.append(packed.num_pages))
    async with running(files.base, tmp_path) as loop:
        await load(loop, files, "plain")
        assert touched == []
        first = await tokens(loop, "plain")
        assert len(touched) == 1
        assert await tokens(loop, "plain") == first
        assert len(touched) == 1, "the adapter is on the device already"


# The order in which an adapter is copied.


@dataclass
class Event:
    has_happened: bool = False
    num_waits: int = 0

    def wait(self) -> None:
        self.num_waits += 1

    def query(self) -> bool:
        return self.has_happened


def test_each_module_waits_only_for_its_part() -> None:
    events = [Event() for _ in range(3)]
    pending_copy = PendingCopy(page_ends=(0, 1, 2, 3, 5, 6), part_ends=(2, 4, 6), events=events)
    waits = []
    for module in range(6):
        pending_copy.wait_for(module)
        waits.append([event.num_waits for event in events])
    assert waits == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 1, 0], [2, 1, 1], [2, 1, 2]]
    assert not pending_copy.has_ended
    events[-1].has_happened = True
    assert pending_copy.has_ended
    pending_copy.wait()
    assert events[-1].num_waits == 3


@pytest.mark.parametrize(("num_pages", "ends"), [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (10, [3, 6, 9, 10])])
def test_an_adapter_is_copied_in_a_few_parts(num_pages: int, ends: list[int]) -> None:
    assert part_ends(num_pages) == ends


def test_a_forward_pass_waits_only_for_pending_copies(files: Files) -> None:
    """Each module that reads rows waits for them in the order of the pass. After the copy has ended, none waits."""
    engine = Engine.open(files.base, CONFIG)
    engine.add_adapter(REFS["plain"], load_adapter(files.adapters["plain"]))
    cache, order = engine._adapters, engine._layout.order
    event, waited = Event(), []

    class Slow(PendingCopy):
        def wait_for(self, module: int) -> None:
            waited.append(module)

    cache.hold(REFS["plain"].key)
    resident = replace(cache.acquire(REFS["plain"].key), pending_copy=Slow((1,), (1,), (event,)))
    builder = BatchBuilder(CONFIG.page_tokens, torch.device("cpu"), engine._layout)

    def run() -> None:
        batch = builder.build(prefill(resident, engine))
        with torch.inference_mode():
            engine._model.forward(batch, engine._arena_PE.view(-1), CONFIG.page_tokens)

    run()
    num_modules = len(waited)
    assert waited == sorted(waited, key=order.index)
    assert {order[0], 0, 6, 7, order[-1]} <= set(waited)
    run()
    assert len(waited) == 2 * num_modules
    event.has_happened = True
    run()
    assert len(waited) == 2 * num_modules


def prefill(resident: ResidentAdapter, engine: Engine) -> SchedulerOutput:
    sequence = make_sequence(Request("a", (5, 6, 7), GREEDY, REFS["plain"]), limit_tokens=20)
    sequence.resident = resident
    table = RunningTable(1, CONFIG.page_tokens)
    table.add(sequence, engine._allocator.allocate(1), num_stored=0, num_cached=0)
    return table.output(table.decodes(), [(sequence, 3)])


def test_rows_are_laid_out_in_reading_order() -> None:
    packed = pack_adapter(
        make_factors(dict.fromkeys(MODULES, 12)), MODULES, PAGE_ELEMENTS, torch.float32, order=(2, 0, 1)
    )
    ends = [packed.page_ends[module] for module in (2, 0, 1)]
    assert ends == sorted(ends)
    assert ends[0] < ends[1] <= packed.num_pages


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_copies_run_on_their_own_stream() -> None:
    packed = pack_adapter(make_factors(dict.fromkeys(MODULES, 17)), MODULES, PAGE_ELEMENTS, torch.float32).pinned()
    memory = AdapterMemory(packed.num_pages + 7, device="cuda")
    scattered = memory.allocator.allocate(14)
    memory.allocator.free(scattered[1::2])
    memory.cache.add("k", packed)
    resident = memory.use("k")
    assert resident.pending_copy is not None
    for module in range(len(MODULES)):
        resident.pending_copy.wait_for(module)
        table = slice(packed.table_starts[module], packed.table_starts[module] + packed.ranks[module])
        for rows, theirs in ((packed.a_rows_I, resident.a_rows_I), (packed.b_rows_I, resident.b_rows_I)):
            ours = packed.pages_PE.view(-1)[rows[table]]
            torch.testing.assert_close(memory.arena_PE.view(-1)[theirs[table]].cpu(), ours, rtol=0, atol=0)
    torch.cuda.synchronize()
    assert resident.pending_copy.has_ended
    assert torch.equal(memory.arena_PE[list(resident.pages)].cpu(), packed.pages_PE)
    memory.unuse("k")
    assert memory.evictions.make_room(packed.num_pages)
