"""Packed adapters on a machine's disk: written once per content, mapped into memory by every engine there.

The page cache of the operating system is then the host's tier for all engines of a machine together. A file is named by
the hash of the adapter's content, in a folder named by what it was packed for (`packing_id`), so that it can never be
stale. It appears whole or not at all, and is read whole when it is opened, which checks it and brings it into memory
before the engine's thread copies from it. A machine that loses power may leave a file that is not what was written:
that, too, the check finds, and the adapter is packed anew.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from serving.adapters.packing import PackedAdapter

log = logging.getLogger(__name__)

_FORMAT = 2  # raised whenever the layout of blobs or tables changes
_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_TENSORS = ("blob_PE", "a_rows_I", "b_rows_I")
_BOOKS = ("ranks", "scalings", "is_dora", "table_starts", "page_ends")
_STALE_S = 3600.0  # a file that was being written so long ago belongs to a process that died
_SCANS_PER_BUDGET = 16  # the folder is measured each time so large a part of its budget was written


def packing_id(weights: Mapping[str, Tensor], page_elements: int, dtype: torch.dtype, max_rank: int) -> str:
    """A hash of all that decides how an adapter is packed, and whether it may be: base weights, pages, dtype, limit."""
    digest = hashlib.sha256(f"{_FORMAT}\0{page_elements}\0{dtype}\0{max_rank}".encode())
    for name, weight in weights.items():
        digest.update(f"\0{name}\0{tuple(weight.shape)}\0{_crc(0, weight.cpu())}".encode())
    return digest.hexdigest()


class DiskTier:
    """A folder of packed adapters, kept to a budget of bytes. Safe under many threads and processes.

    Only loader threads use it. A file that another process deletes stays whole for those that have mapped it.
    """

    def __init__(self, folder: Path, packed_for: str, max_bytes: int):
        self._root = folder
        self._folder = folder / packed_for
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._unscanned_bytes = max_bytes  # written since the folder was last measured

    def has(self, key: str) -> bool:
        """Whether an adapter is here."""
        # Not Path.exists, which raises where the folder may not be read: no folder is no obstacle to serving.
        return _KEY.fullmatch(key) is not None and os.path.exists(self._path(key))

    def open(self, key: str) -> PackedAdapter | None:
        """Map an adapter; None where it cannot be had from here. What is damaged is deleted.

        What the process lacks (file descriptors, maps, permission) says nothing of the file, which others may be using.
        """
        if not self.has(key):
            return None
        path = self._path(key)
        try:
            packed = _read(path)
        except (SafetensorError, ValueError, LookupError) as error:
            log.warning("packed adapter %s is damaged and will be made anew: %s", path, error)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        except (OSError, RuntimeError) as error:  # the latter: torch cannot map
            log.warning("packed adapter %s cannot be opened: %s", path, error)
            return None
        with suppress(OSError):
            os.utime(path)  # the least recently used go first
        return packed

    def put(self, key: str, packed: PackedAdapter) -> PackedAdapter:
        """Store an adapter and return it mapped, or as it is where the disk does not take it."""
        size = packed.blob_PE.nbytes
        if size > self._max_bytes or _KEY.fullmatch(key) is None:
            return packed
        part = self._folder / f".{key}.{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: getattr(packed, name) for name in _TENSORS}, part, _metadata(packed))
            part.replace(self._path(key))
        except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
            log.warning("adapter %s is served from memory, since it cannot be stored packed: %s", key, error)
            with suppress(OSError):
                part.unlink()
            return packed
        self._keep_to_budget(size)
        return self.open(key) or packed

    def keys(self) -> set[str]:
        """The adapters that are here."""
        with suppress(OSError):
            names = (name.removesuffix(_SUFFIX) for name in os.listdir(self._folder))
            return {name for name in names if _KEY.fullmatch(name)}
        return set()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _keep_to_budget(self, new_bytes: int) -> None:
        """Delete what was used least recently. Measured now and then: several processes write, and each may err."""
        with self._lock:
            self._unscanned_bytes += new_bytes
            if self._unscanned_bytes < self._max_bytes // _SCANS_PER_BUDGET:
                return
            self._unscanned_bytes = 0
            with suppress(OSError):
                _delete_oldest(self._root, self._max_bytes - self._max_bytes // _SCANS_PER_BUDGET)


def _metadata(packed: PackedAdapter) -> dict[str, str]:
    books = json.dumps([getattr(packed, name) for name in _BOOKS])
    return {"books": books, "crc32": str(_checksum(books, packed))}


def _read(path: Path) -> PackedAdapter:
    with safe_open(path, framework="pt") as stored:  # checks that the file has the length that its header says
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in _TENSORS}  # mapped, not copied
    books = dict(zip(_BOOKS, map(tuple, json.loads(metadata["books"])), strict=True))
    packed = PackedAdapter(**tensors, **books, is_mapped=True)
    if _checksum(metadata["books"], packed) != int(metadata["crc32"]):
        raise ValueError("its bytes are not those that were written")
    return packed


def _checksum(books: str, packed: PackedAdapter) -> int:
    crc = zlib.crc32(books.encode())
    for tensor in (getattr(packed, name) for name in _TENSORS):
        crc = _crc(zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), crc), tensor)
    return crc


def _crc(crc: int, tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: 7 GB/s on one core, without Python's lock."""
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), crc)


def _stats(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob("*/*"):
        with suppress(FileNotFoundError):  # another process has renamed or deleted it meanwhile
            stat = path.stat()
            if S_ISREG(stat.st_mode):
                yield path, stat


def _delete_oldest(root: Path, max_bytes: int) -> None:
    """Delete the least recently used files below a folder until no more than so many bytes are left."""
    stats = list(_stats(root))
    total = sum(stat.st_size for _, stat in stats)
    now = time.time()
    for path, stat in sorted(stats, key=lambda pair: pair[1].st_mtime):
        is_stale = path.name.startswith(".") and now - stat.st_mtime > _STALE_S
        if total > max_bytes or is_stale:
            path.unlink(missing_ok=True)
            total -= stat.st_size
