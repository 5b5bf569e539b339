"""Adapter files by content, on a local disk or in an object store.

A blob is one folder, stored as one tar file that is named by the hash of the folder's content. So a blob is complete as
soon as it is visible, the same content is stored once, and a fetch can check what arrived.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper

from cluster.errors import NotFoundError, StorageError

_KEY = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}\.part")
_OBJECT_STORES = ("s3://", "gs://", "gcs://")
_BLOCK_BYTES = 4 * 1024**2  # size of one read or write: each read of an object store is an HTTP request


class BlobStore:
    """Folders by content key. Threads and processes can store and fetch at the same time.

    `url` is a local path, `s3://bucket/prefix` or `gs://bucket/prefix` of an existing bucket, or any other URL that
    fsspec opens. pyarrow opens the buckets, and its options may follow, as in `?region=eu-west-1` or
    `?endpoint_override=host:port&scheme=http`. Credentials are found as the provider's own tools find them.
    `cache_dir` keeps fetched folders. The processes of one machine may share it; nothing here ever cleans it.
    """

    def __init__(self, url: str, cache_dir: Path):
        self._url = re.sub("//[^/@]*@", "//***@", url)  # for messages, without credentials
        try:
            filesystem, root = open_filesystem(url)
        except (ImportError, ValueError, OSError) as error:
            raise StorageError(f"Blob store {self._url!r} cannot be opened: {error}") from error
        self._fs: AbstractFileSystem = filesystem
        self._root: str = root.rstrip("/")
        self.cache_dir = cache_dir

    def put_folder(self, folder: Path, files: Sequence[Path] | None = None) -> str:
        """Store a folder, or only `files` of it, and return the content key. The same content is stored once.

        Raises StorageError if the folder cannot be read, or if the store cannot be reached or is full. Then no part of
        the folder stays in the store.
        """
        with self._storage_errors(f"storing {folder}"):
            key = content_hash(folder, files)
            if not self.exists(key):
                self._write_aside_then_rename(folder, _files(folder) if files is None else files, key)
        return key

    def fetch_folder(self, key: str) -> Path:
        """Return a local folder with the blob's content. It is fetched once, then cached, and must not be changed.

        Every call hashes the cached files again: a full or failing disk may cost another fetch, but must not change
        weights. Raises NotFoundError if the store has no such blob. Raises StorageError if the store cannot be
        reached, the local disk is full, or the content does not match the key.
        """
        _check_key(key)
        cached = self.cache_dir / key
        if _is_whole(cached, key):
            return cached
        aside = self.cache_dir / f".{key}.{uuid.uuid4().hex}"
        try:
            with self._storage_errors(f"fetching blob {key}"):
                aside.mkdir(parents=True)
                self._extract(key, aside)
                if content_hash(aside) != key:
                    raise StorageError(
                        f"Blob store {self._url!r}: blob {key} is corrupt. Delete it and store it again."
                    )
                _publish(aside, cached)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(_damaged(aside), ignore_errors=True)
        return cached

    def exists(self, key: str) -> bool:
        """Return whether the store has the blob."""
        with self._storage_errors(f"looking for blob {key}"):
            return _KEY.fullmatch(key) is not None and bool(self._fs.exists(self._path(key)))

    def stored(self) -> list["StoredBlob"]:
        """Return the files of the store: blobs, and what interrupted writers left."""
        with self._storage_errors("listing it"):
            if not self._fs.exists(self._root):
                return []
            self._fs.invalidate_cache()
            found = [entry for entry in self._fs.ls(self._root, detail=True) if entry["type"] == "file"]
            return [StoredBlob(Path(entry["name"]).name, entry["size"] or 0, _seconds(entry)) for entry in found]

    def delete(self, blob: "StoredBlob") -> None:
        """Delete a file of the store, and what this machine's cache has of it. One that is gone already is fine."""
        with self._storage_errors(f"deleting {blob.file}"), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{blob.file}")
        if blob.key is not None:
            shutil.rmtree(self.cache_dir / blob.key, ignore_errors=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}.tar"

    def _write_aside_then_rename(self, folder: Path, files: Iterable[Path], key: str) -> None:
        part = f"{self._root}/.{key}.{uuid.uuid4().hex}.part"
        self._fs.makedirs(self._root, exist_ok=True)
        try:
            with self._fs.open(part, "wb") as stream, _tar(stream, "w|") as tar:
                for file in files:
                    tar.add(file, arcname=file.relative_to(folder).as_posix(), recursive=False)
            self._fs.mv(part, self._path(key))
        except BaseException:
            with suppress(OSError):  # raise the first error, not this one
                self._fs.rm_file(part)
            raise

    def _extract(self, key: str, folder: Path) -> None:
        try:
            with self._fs.open(self._path(key), "rb") as stream, _tar(stream, "r|") as tar:
                tar.extractall(folder, filter="data")
        except FileNotFoundError as error:
            raise NotFoundError(f"Blob store {self._url!r} has no blob {key}.") from error
        except tarfile.TarError as error:
            raise StorageError(f"Blob store {self._url!r}: blob {key} is corrupt: {error}") from error

    @contextmanager
    def _storage_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"Blob store {self._url!r}: {doing} failed: {error}") from error


@dataclass(frozen=True)
class StoredBlob:
    """A file in a blob store. `modified_at` is in seconds since the epoch, 0 if the store does not tell."""

    file: str
    num_bytes: int
    modified_at: float

    @property
    def key(self) -> str | None:
        """The blob's key; None for a part that an interrupted writer left, or a file that is not ours."""
        key = self.file.removesuffix(".tar")
        return key if self.file.endswith(".tar") and _KEY.fullmatch(key) else None

    @property
    def is_part(self) -> bool:
        """Whether a writer has not finished the file."""
        return _PART.fullmatch(self.file) is not None


def _seconds(entry: Mapping[str, Any]) -> float:
    """Return when a file was changed: local files have a number, object stores a datetime."""
    modified = entry.get("mtime") or entry.get("LastModified") or 0.0
    return float(modified.timestamp() if hasattr(modified, "timestamp") else modified)


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it. Raises ImportError, ValueError or OSError."""
    if not url.startswith(_OBJECT_STORES):
        return url_to_fs(url)
    from pyarrow.fs import FileSystem  # imported here because a local store does not need it

    filesystem, root = FileSystem.from_uri(url)
    if not root:
        raise ValueError("the URL has no bucket")
    return ArrowFSWrapper(filesystem), root


def _tar(stream: IO[bytes], mode: Literal["r|", "w|"]) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode=mode, bufsize=_BLOCK_BYTES, dereference=True)


def content_hash(folder: Path, files: Sequence[Path] | None = None) -> str:
    """Return a SHA-256 over the relative names and the bytes of `files`, or of all files in a folder, at any depth.

    Raises StorageError if it is not a folder or a file cannot be read.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder.")
    digest = hashlib.sha256()
    try:
        for file in _files(folder) if files is None else sorted(files):
            with file.open("rb") as stream:
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from error
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _check_key(key: str) -> None:
    if _KEY.fullmatch(key) is None:
        raise NotFoundError(f"{key[:80]!r} is not a blob key.")


def _is_whole(cached: Path, key: str) -> bool:
    try:
        return content_hash(cached) == key
    except StorageError:  # it is missing or cannot be read
        return False


def _damaged(aside: Path) -> Path:
    """Return where to move a damaged cached folder that the folder `aside` replaces."""
    return aside.with_name(f"{aside.name}.damaged")


def _publish(aside: Path, cached: Path) -> None:
    """Move the fetched folder `aside` to `cached`, unless another process has done so; replace a damaged folder.

    Only one process publishes at a time. Otherwise one could move away what another has just published.
    """
    with (cached.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(cached, cached.name):
            return
        if cached.exists():
            os.rename(cached, _damaged(aside))
        os.rename(aside, cached)
