"""The disk tier: adapters come back bit for bit or not at all, and the folder keeps its budget."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.adapters.disk_tier import DiskTier, packing_id
from serving.adapters.packing import PackedAdapter, pack_adapter
from tests.worlds.adapters import MODULES, PAGE_ELEMENTS, make_factors

BIG = 1 << 30
KEYS = [f"{i:064x}" for i in range(20)]
KEY = KEYS[0]
FIELDS = ("ranks", "scalings", "is_dora", "table_starts", "page_ends")


def make_packed(rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> PackedAdapter:
    adapter = make_factors({"a.q_proj": rank, "a.down_proj": rank}, seed)
    return pack_adapter(adapter, MODULES, PAGE_ELEMENTS, dtype, {"a.q_proj": torch.linspace(0.5, 1.5, 60)})


def is_same(a: PackedAdapter, b: PackedAdapter) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("pages_PE", "a_rows_I", "b_rows_I"))
    return tensors and all(getattr(a, name) == getattr(b, name) for name in FIELDS)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path, "here", BIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_adapters_come_back_mapped(disk: DiskTier, tmp_path: Path, dtype: torch.dtype) -> None:
    assert disk.open(KEY) is None
    original = make_packed(dtype=dtype)
    stored = disk.put(KEY, original)
    opened = DiskTier(tmp_path, "here", BIG).open(KEY)
    assert opened is not None
    assert is_same(stored, original)
    assert is_same(opened, original)
    assert (stored.is_mapped, opened.is_mapped, original.is_mapped) == (True, True, False)
    assert disk.keys() == {KEY}


def test_a_mapped_adapter_takes_little_private_memory(disk: DiskTier) -> None:
    pages_PE = torch.ones(64, 1 << 16)
    original = PackedAdapter(pages_PE, (), (), (), (), (), torch.zeros(0).long(), torch.zeros(0).long())
    stored = disk.put(KEY, original)
    assert stored.num_bytes < original.num_bytes / 100
    stored.touch()
    mode = [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if KEY in line]
    assert set(mode) == {"rw-p"}, "private: writes do not reach the file"


def test_adapters_packed_for_another_engine_are_not_seen(disk: DiskTier, tmp_path: Path) -> None:
    disk.put(KEY, make_packed())
    assert DiskTier(tmp_path, "elsewhere", BIG).open(KEY) is None


def test_the_packing_id_depends_on_everything_that_matters() -> None:
    weights = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}
    ids = [
        packing_id(weights, 100, torch.float32, 16),
        packing_id({**weights, "b": -torch.ones(5)}, 100, torch.float32, 16),
        packing_id({**weights, "a": weights["a"].view(4, 3)}, 100, torch.float32, 16),
        packing_id({**weights, "a": weights["a"].flip(0)}, 100, torch.float32, 16),
        packing_id(weights, 101, torch.float32, 16),
        packing_id(weights, 100, torch.bfloat16, 16),
        packing_id(weights, 100, torch.float32, 17),
    ]
    assert len(set(ids)) == len(ids)
    assert packing_id({name: weight.clone() for name, weight in weights.items()}, 100, torch.float32, 16) == ids[0]


@pytest.mark.parametrize("key", ["hash", "../" + "0" * 61, "0" * 63 + "/", "", "A" * 64])
def test_only_content_hashes_are_keys(disk: DiskTier, tmp_path: Path, key: str) -> None:
    original = make_packed()
    assert disk.put(key, original) is original
    assert disk.open(key) is None
    assert files_below(tmp_path) == []


# Damaged files.


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_file_with_a_changed_byte_is_never_served(
    disk: DiskTier, caplog: pytest.LogCaptureFixture, where: float, value: int
) -> None:
    original = make_packed()
    disk.put(KEY, original)
    path = disk._path(KEY)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= value
    path.write_bytes(content)
    opened = disk.open(KEY)
    assert opened is None or is_same(opened, original), "only padding may change unnoticed"
    if opened is None:
        assert not path.exists()
    assert is_same(disk.put(KEY, original), original)


@pytest.mark.parametrize("size", [0, 1, 100, -1, -8, -4096])
def test_a_truncated_file_is_deleted_and_can_be_written_again(disk: DiskTier, size: int) -> None:
    disk.put(KEY, make_packed())
    path = disk._path(KEY)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert disk.open(KEY) is None
    assert not path.exists()
    assert is_same(disk.put(KEY, make_packed()), make_packed())


@pytest.mark.parametrize("content", [b"x" * 5000, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_foreign_file_is_deleted(disk: DiskTier, content: bytes) -> None:
    disk.put(KEY, make_packed())
    disk._path(KEY).write_bytes(content)
    assert disk.open(KEY) is None
    assert disk.keys() == set()


def test_a_deleted_file_stays_readable_while_mapped(disk: DiskTier, tmp_path: Path) -> None:
    stored = disk.put(KEY, make_packed())
    shutil.rmtree(tmp_path)
    assert is_same(stored, make_packed())
    assert disk.open(KEY) is None


# Full and broken disks.


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_partial_file(disk: DiskTier, tmp_path: Path) -> None:
    """A limit on file sizes makes the write fail half-way, as a full disk does."""
    original = make_packed(rank=60)
    with file_size_limit(4096):
        assert disk.put(KEY, original) is original
    assert files_below(tmp_path) == []
    assert disk.put(KEY, original).is_mapped


def test_a_lack_of_file_descriptors_deletes_no_file(disk: DiskTier, tmp_path: Path) -> None:
    """Other processes may be using the file."""
    original = disk.put(KEY, make_packed())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        opened = disk.open(KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert opened is None
    again = disk.open(KEY)
    assert again is not None
    assert is_same(again, original)


def test_an_unreadable_folder_is_treated_as_empty(disk: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.put(KEY, make_packed())

    def refuse(path: object, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)  # root ignores the folder's mode, so that would not do
    assert (disk.has(KEY), disk.open(KEY)) == (False, None)


def test_without_a_folder_adapters_are_served_from_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    disk, original = DiskTier(tmp_path / "file", "here", BIG), make_packed()
    assert disk.put(KEY, original) is original
    assert (disk.open(KEY), disk.keys()) == (None, set())
    assert "served from memory" in caplog.text


def test_least_recently_used_files_are_deleted_first(tmp_path: Path) -> None:
    size = DiskTier(tmp_path / "one", "here", BIG).put(KEY, make_packed()).pages_PE.nbytes
    size = files_below(tmp_path / "one")[0].stat().st_size
    disk = DiskTier(tmp_path / "all", "here", int(4.5 * size))
    for age, key in enumerate(KEYS[:4]):
        disk.put(key, make_packed())
        os.utime(disk._path(key), (time.time() - 100 + age,) * 2)
    assert disk.open(KEYS[0]) is not None
    disk.put(KEYS[4], make_packed())
    assert disk.keys() == {KEYS[0], KEYS[2], KEYS[3], KEYS[4]}


def test_all_bases_share_the_budget(tmp_path: Path) -> None:
    size = files_size(tmp_path / "one")
    disks = [DiskTier(tmp_path / "all", f"base{i}", 3 * size) for i in range(3)]
    for key in KEYS[:6]:
        for disk in disks:
            disk.put(key, make_packed())
    assert 0 < sum(path.stat().st_size for path in files_below(tmp_path / "all")) <= 3 * size


def files_size(folder: Path) -> int:
    DiskTier(folder, "here", BIG).put(KEY, make_packed())
    return sum(path.stat().st_size for path in files_below(folder))


def test_an_adapter_larger_than_the_budget_stays_in_memory(tmp_path: Path) -> None:
    original = make_packed()
    assert DiskTier(tmp_path, "here", original.pages_PE.nbytes - 1).put(KEY, original) is original
    assert files_below(tmp_path) == []


def test_stale_temporary_files_are_deleted(tmp_path: Path) -> None:
    DiskTier(tmp_path, "here", BIG).put(KEY, make_packed())
    old, new = (tmp_path / "here" / f".{KEY}.{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    DiskTier(tmp_path, "here", BIG).put(KEYS[1], make_packed())
    assert (old.exists(), new.exists()) == (False, True)


def test_concurrent_writers_and_readers_get_the_right_adapter(tmp_path: Path) -> None:
    """Three replicas share a folder too small for all adapters: each gets the right adapter or none."""
    originals = {key: make_packed(seed=seed) for seed, key in enumerate(KEYS)}
    replicas = [DiskTier(tmp_path, "here", 8 * files_size(tmp_path / "one")) for _ in range(3)]

    def use(number: int) -> bool:
        key, disk = KEYS[number * 7 % len(KEYS)], replicas[number % 3]
        got = disk.open(key) or disk.put(key, originals[key])
        return is_same(got, originals[key])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(600)))
    assert [path for path in files_below(tmp_path / "here") if path.name.startswith(".")] == []
