"""Recovery: routes after a restart, memory after an unload, and files after damage."""

import gc
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from cluster.config.settings import MIB, ServingConfig
from cluster.registry.registry import Status
from cluster.storage.blobs import BlobStore
from serving.engine.engine import Engine
from serving.engine.loop import EngineLoop
from serving.engine.request import AdapterRef, Request, SamplingParams
from tests.worlds.servers import AdapterServer, serve_bases, wait_until
from tests.worlds.serving import make_adapter, make_checkpoint

CONFIG = ServingConfig(memory_bytes=2 * MIB, max_model_tokens=400, max_rank=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("files") / "base")


def test_a_restart_restores_all_routes(base: Path, tmp_path: Path) -> None:
    """Live versions, older ones by number, two names of one content, an unloaded adapter, and a canary."""
    with serve_bases(base.parent, tmp_path, CONFIG, ("base",)) as server:
        adapters = AdapterServer(server, tmp_path, base)
        old, new, other = (adapters.make(name, seed=seed) for seed, name in enumerate(("old", "new", "other")))
        for name, path in (("mine", old), ("mine", new), ("alias", new), ("gone", other), ("tried", old)):
            assert adapters.load(name, path).status_code == 200
        adapters.server.post("/v1/unload_lora_adapter", lora_name="gone")
        key = adapters.blobs.put_folder(other)
        candidate = server.registry.add_version("tried", "base", Status.PLANNED)
        steps = (Status.PLANNED, Status.ADAPTING, Status.CANDIDATE, Status.READY, Status.CANARY)
        for before, after in pairwise(steps):
            more = {"blob_key": key, "content_hash": key} if after is Status.CANDIDATE else {}
            server.registry.move(candidate.id, before, after, **more)
        names = ("mine", "mine@1", "mine@2", "alias", "gone@1", "tried@1", "tried@2", "base")
        before_restart = {name: adapters.text(name) for name in names}
        assert adapters.ask("gone").status_code == 404
        where = {name: entry["status"] for name, entry in adapters.where().items()}
    shutil.rmtree(tmp_path / "cache")
    with serve_bases(base.parent, tmp_path, CONFIG, ("base",)) as server:
        adapters = AdapterServer(server, tmp_path, base)
        assert {name: adapters.text(name) for name in names} == before_restart
        assert adapters.ask("gone").status_code == 404
        assert {name: entry["status"] for name, entry in adapters.where().items()} == where
        assert adapters.load("mine", old).json()["model"] == "mine@3"
        assert adapters.text("mine") == before_restart["mine@1"] != before_restart["mine"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "other weights": lambda file: file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\x40"),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_local_copy_is_fetched_again(base: Path, tmp_path: Path, damage: str) -> None:
    """An earlier server left the copy on this machine, as before a restart after a power cut."""
    config = ServingConfig(memory_bytes=2 * MIB, max_model_tokens=400, max_rank=16, packed_bytes=0)
    with serve_bases(base.parent, tmp_path, config, ("base",)) as server:
        adapters = AdapterServer(server, tmp_path, base)
        assert adapters.load("mine", adapters.make("mine")).status_code == 200
        expected = adapters.text("mine")
    [cached] = (tmp_path / "cache").glob("[!.]*")
    DAMAGES[damage](cached / "adapter_model.safetensors")
    with serve_bases(base.parent, tmp_path, config, ("base",)) as server:
        assert AdapterServer(server, tmp_path, base).text("mine") == expected


def test_an_adapter_is_served_again_when_its_files_are_back(base: Path, tmp_path: Path) -> None:
    """Files that were deleted from the store and put back are served again, without a restart or a reload."""
    with serve_bases(base.parent, tmp_path, CONFIG, ("base",)) as server:
        adapters = AdapterServer(server, tmp_path, base)
        path = adapters.make("mine")
        adapters.register("mine", path)
        shutil.rmtree(tmp_path / "blobs")
        wait_until(lambda: adapters.ask("mine").status_code != 404)
        for _ in range(3):
            assert adapters.ask("mine").status_code == 503
        BlobStore(str(tmp_path / "blobs"), tmp_path / "unused").put_folder(path)
        wait_until(lambda: adapters.ask("mine").status_code == 200)


async def test_unloading_frees_the_memory_of_the_process(tmp_path: Path) -> None:
    """The process frees the memory of adapters, round after round, without a leak."""
    base = make_checkpoint(tmp_path / "base", hidden_size=240, intermediate_size=1024)
    path = make_adapter(tmp_path / "adapter", base, rank=16, scale=0.01)
    loop = EngineLoop(Engine.open(base, ServingConfig(memory_bytes=16 * MIB, max_rank=16)), packed_dir=None)
    loop.start()
    used, loaded = [], []
    for round_ in range(8):
        refs = [AdapterRef(f"{round_}/{number}", "a", number + 1, "") for number in range(60)]
        for ref in refs:
            await loop.ensure_adapter(ref, path)
        request = Request(f"{round_}", (1, 2), SamplingParams(max_tokens=4), refs[0])
        assert [event async for event in loop.generate(request)]
        loaded.append(loop.stats()["host_bytes"])
        for ref in refs:
            await loop.remove_adapter(ref.key)
        deadline = time.monotonic() + 10
        while loop.stats()["host_bytes"] and time.monotonic() < deadline:
            await loop.residencies()
        gc.collect()
        used.append(psutil.Process().memory_info().rss)
    loop.stop()
    assert loaded[0] > 30 * MIB
    # The C allocator may keep the memory of up to one and a half rounds. A leak would keep eight.
    assert max(used) - used[0] < 3 * loaded[0], [one // MIB for one in used]
