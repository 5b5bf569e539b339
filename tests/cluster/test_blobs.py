import errno
import multiprocessing
import os
import resource
import shutil
import tarfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from moto.server import ThreadedMotoServer

from cluster.errors import NotFoundError, StorageError
from cluster.storage import blobs
from cluster.storage.blobs import _BLOCK_BYTES, BlobStore, content_hash, open_filesystem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 400)
    (folder / "deep/config.json").write_text('{"r": 8}')
    return folder


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Host and port of a server of the S3 protocol."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def s3_url(server: str, bucket: str) -> str:
    return f"s3://{bucket}/fleet/blobs?endpoint_override={server}&scheme=http&region=us-east-1"


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
    elif request.param == "memory":
        yield f"memory://{tmp_path}"
        MemoryFileSystem().rm("/", recursive=True)
    else:
        request.getfixturevalue("s3_credentials")
        server, bucket = request.getfixturevalue("s3_server"), f"bucket-{uuid.uuid4().hex}"
        assert httpx.put(f"http://{server}/{bucket}").status_code == 200
        yield s3_url(server, bucket)


def objects(url: str) -> list[str]:
    filesystem, root = open_filesystem(url)
    return [Path(path).name for path in filesystem.find(root)] if filesystem.exists(root) else []


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_stored_folder_can_be_fetched(url: str, folder: Path, tmp_path: Path):
    store = BlobStore(url, tmp_path / "cache")
    key = store.put_folder(folder)
    assert key == content_hash(folder)
    assert store.exists(key)
    fetched = store.fetch_folder(key)
    assert files(fetched) == files(folder)
    assert store.fetch_folder(key) == fetched
    assert objects(url) == [f"{key}.tar"]
    assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == [key]


def test_a_fetched_folder_is_available_without_the_store(url: str, folder: Path, tmp_path: Path):
    store = BlobStore(url, tmp_path / "cache")
    key = store.put_folder(folder)
    fetched = store.fetch_folder(key)
    filesystem, root = open_filesystem(url)
    filesystem.rm(root, recursive=True)
    assert store.fetch_folder(key) == fetched
    assert not store.exists(key)
    with pytest.raises(NotFoundError, match=key):
        BlobStore(url, tmp_path / "other").fetch_folder(key)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "flipped": flip_a_bit,
    "missing": Path.unlink,
    "grown": lambda file: (file.parent / "more").write_text("x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_fetched_again_or_reported(folder: Path, tmp_path: Path, damage: str):
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    key = store.put_folder(folder)
    cached = store.fetch_folder(key)
    DAMAGES[damage](cached / "weights.bin")
    assert content_hash(store.fetch_folder(key)) == key
    assert sorted(one.name for one in (tmp_path / "cache").iterdir()) == [".lock", key]
    DAMAGES[damage](cached / "weights.bin")
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(NotFoundError):
        store.fetch_folder(key)


def test_two_fetchers_of_a_damaged_cache_never_move_a_good_folder_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    key = store.put_folder(folder)
    flip_a_bit(store.fetch_folder(key) / "weights.bin")
    fetched_by_both, aside = threading.Barrier(2), []
    publish, rename = blobs._publish, os.rename

    def publish_at_once(*arguments: Path) -> None:
        fetched_by_both.wait()
        publish(*arguments)

    def watched_rename(source: Path, target: Path) -> None:
        if source == tmp_path / "cache" / key:
            aside.append(content_hash(source))
        rename(source, target)

    monkeypatch.setattr(blobs, "_publish", publish_at_once)
    monkeypatch.setattr(blobs.os, "rename", watched_rename)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(store.fetch_folder, [key, key]))
    assert [content_hash(one) for one in found] == [key, key]
    assert len(aside) == 1
    assert key not in aside


def test_a_damaged_folder_that_cannot_be_moved_away_is_not_returned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    key = store.put_folder(folder)
    flip_a_bit(store.fetch_folder(key) / "weights.bin")

    def refused(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(source))

    monkeypatch.setattr(blobs.os, "rename", refused)
    with pytest.raises(StorageError, match="not permitted"):
        store.fetch_folder(key)


def test_the_same_content_is_one_blob(url: str, folder: Path, tmp_path: Path):
    store = BlobStore(url, tmp_path / "cache")
    key = store.put_folder(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert store.put_folder(copy) == key
    (copy / "weights.bin").write_bytes(b"other")
    assert store.put_folder(copy) != key
    assert len(objects(url)) == 2


def test_the_hash_covers_names_and_bytes_and_where_they_end(folder: Path):
    seen = {content_hash(folder)}
    (folder / "weights.bin").rename(folder / "weights2.bin")
    seen.add(content_hash(folder))
    (folder / "empty").touch()
    seen.add(content_hash(folder))
    (folder / "deep/config.json").write_text('{"r": 9}')
    seen.add(content_hash(folder))
    (folder / "deep/config.json").rename(folder / "config.json")
    seen.add(content_hash(folder))
    assert len(seen) == 5


def test_links_are_stored_as_the_files_they_point_to(folder: Path, tmp_path: Path):
    linked = tmp_path / "linked"
    (linked / "deep").mkdir(parents=True)
    (linked / "weights.bin").symlink_to(folder / "weights.bin")
    (linked / "deep/config.json").symlink_to(folder / "deep/config.json")
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    key = store.put_folder(linked)
    assert key == content_hash(folder)
    assert files(store.fetch_folder(key)) == files(folder)


@pytest.mark.parametrize("key", ["", "nothing", "../../etc/passwd", "A" * 64, "0" * 64])
def test_an_unknown_or_hostile_key_is_not_found(url: str, tmp_path: Path, key: str):
    store = BlobStore(url, tmp_path / "cache")
    assert not store.exists(key)
    with pytest.raises(NotFoundError):
        store.fetch_folder(key)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "swapped"])
def test_a_damaged_blob_is_never_returned(folder: Path, tmp_path: Path, damage: str):
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    key = store.put_folder(folder)
    blob = tmp_path / "store" / f"{key}.tar"
    if damage == "truncated":
        blob.write_bytes(blob.read_bytes()[:20_000])
    elif damage == "garbage":
        blob.write_bytes(b"no tar at all" * 500)
    else:
        (folder / "weights.bin").write_bytes(b"evil")
        blob.write_bytes((tmp_path / "store" / f"{store.put_folder(folder)}.tar").read_bytes())
    with pytest.raises(StorageError, match=f"{key} is corrupt"):
        store.fetch_folder(key)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_blob_cannot_write_outside_its_folder(tmp_path: Path):
    key = "a" * 64
    (tmp_path / "store").mkdir()
    (tmp_path / "evil").write_text("evil")
    with tarfile.open(tmp_path / "store" / f"{key}.tar", "w") as tar:
        tar.add(tmp_path / "evil", arcname="../../escaped")
    with pytest.raises(StorageError, match="corrupt"):
        BlobStore(str(tmp_path / "store"), tmp_path / "cache").fetch_folder(key)
    assert not list(tmp_path.rglob("escaped"))


class FullFile(MemoryFile):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


class FullFileSystem(MemoryFileSystem):
    protocol = "full"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb":
            return FullFile(self, path)
        return super()._open(path, mode, **options)


def test_a_full_store_is_reported_and_left_clean(folder: Path, tmp_path: Path):
    fsspec.register_implementation("full", FullFileSystem, clobber=True)
    store = BlobStore("full://store", tmp_path / "cache")
    with pytest.raises(StorageError, match="No space left"):
        store.put_folder(folder)
    assert not store.exists(content_hash(folder))
    assert FullFileSystem().find("/") == []


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """The kernel refuses to write more than 30 kB to a file, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_disk_clean(folder: Path, tmp_path: Path, file_size_limit: None):
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    with pytest.raises(StorageError, match="storing"):
        store.put_folder(folder)
    assert objects(str(tmp_path / "store")) == []


def test_a_failed_fetch_leaves_the_disk_clean(folder: Path, tmp_path: Path, request: pytest.FixtureRequest):
    store = BlobStore(str(tmp_path / "store"), tmp_path / "cache")
    key = store.put_folder(folder)
    request.getfixturevalue("file_size_limit")
    with pytest.raises(StorageError, match="fetching"):
        store.fetch_folder(key)
    assert not list((tmp_path / "cache").glob("*"))


def test_an_unreachable_store_is_reported(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="storing"):
        BlobStore(str(tmp_path / "file"), tmp_path / "cache").put_folder(folder)
    with pytest.raises(StorageError, match="nonsense"):
        BlobStore("nonsense://store", tmp_path / "cache")
    with pytest.raises(StorageError, match="no such folder"):
        BlobStore(str(tmp_path / "store"), tmp_path / "cache").put_folder(tmp_path / "absent")


def test_an_unreachable_object_store_is_reported(folder: Path, tmp_path: Path, s3_server: str, s3_credentials: None):
    with pytest.raises(StorageError, match="nowhere"):
        BlobStore(s3_url(s3_server, "nowhere"), tmp_path / "cache").put_folder(folder)
    with pytest.raises(StorageError, match="URL has no bucket"):
        BlobStore("s3://", tmp_path / "cache")
    with pytest.raises(StorageError, match="oops") as refused:
        BlobStore("s3://somebody:secret@bucket/prefix?oops=1", tmp_path / "cache")
    assert "secret" not in str(refused.value)


def test_google_cloud_storage_needs_no_further_packages(tmp_path: Path):
    filesystem, root = open_filesystem("gs://anonymous@bucket/prefix")
    assert (filesystem.fs.type_name, root) == ("gcs", "bucket/prefix")


class CountingFile(MemoryFile):
    num_reads = 0

    def read(self, *size: int) -> bytes:
        CountingFile.num_reads += 1
        return super().read(*size)


def test_a_blob_is_read_in_large_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each read of an object store is a request: with tar's default of 10 kB a small adapter would take hundreds."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "weights.bin").write_bytes(bytes(2 * _BLOCK_BYTES))
    store = BlobStore(f"memory://{tmp_path}", tmp_path / "cache")
    key = store.put_folder(tmp_path / "big")
    blob = CountingFile(MemoryFileSystem(), "", MemoryFileSystem().cat_file(f"{tmp_path}/{key}.tar"))
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda *args, **options: blob)
    store.fetch_folder(key)
    assert CountingFile.num_reads <= 5


def put_and_fetch(url: str, folder: Path, cache: Path) -> dict[str, bytes]:
    store = BlobStore(url, cache)
    return files(store.fetch_folder(store.put_folder(folder)))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_many_processes_can_store_and_fetch_the_same_blob_at_once(folder: Path, tmp_path: Path, kind: str):
    url, expected = str(tmp_path / "store"), files(folder)
    context = multiprocessing.get_context("spawn")
    pool = ThreadPoolExecutor(8) if kind == "threads" else ProcessPoolExecutor(3, mp_context=context)
    with pool:
        tasks = [pool.submit(put_and_fetch, url, folder, tmp_path / "cache") for _ in range(24)]
        assert all(task.result() == expected for task in tasks)
    key = content_hash(folder)
    assert objects(url) == [f"{key}.tar"]
    assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == [key]
