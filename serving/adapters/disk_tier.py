"""The disk tier: packed adapters on a machine's disk, written once and mapped into memory by every engine there.

The operating system's page cache is thus the host tier that all engines of a machine share. A file is named by the
adapter's content hash, in a folder named by the `packing_id`, so it is never stale. It appears as a whole or not at
all. Opening it reads it as a whole: that checks it, and brings it into memory before the engine's thread copies it. A
power failure may leave a file with wrong content; the check finds it, and the adapter is packed again.
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

_FORMAT = 2  # raise it when the layout of the files, pages or tables changes
_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_TENSORS = ("pages_PE", "a_rows_I", "b_rows_I")
_FIELDS = ("ranks", "scalings", "is_dora", "table_starts", "page_ends")
_STALE_S = 3600.0  # a temporary file this old was left by a process that died
_SCANS_PER_BUDGET = 16  # the folder is measured each time 1/16 of its budget is written


def packing_id(weights: Mapping[str, Tensor], page_elements: int, dtype: torch.dtype, max_rank: int) -> str:
    """Return a hash of everything packing depends on: base weights, page size, dtype and the highest rank allowed."""
    digest = hashlib.sha256(f"{_FORMAT}\0{page_elements}\0{dtype}\0{max_rank}".encode())
    for name, weight in weights.items():
        digest.update(f"\0{name}\0{tuple(weight.shape)}\0{_crc(0, weight.cpu())}".encode())
    return digest.hexdigest()


class DiskTier:
    """A folder of packed adapters with a budget of bytes. Several threads and processes may use it at once.

    Only loader threads use it. A file that another process deletes stays readable for those that have mapped it.
    """

    def __init__(self, folder: Path, packed_for: str, max_bytes: int):
        self._root = folder
        self._folder = folder / packed_for
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._unscanned_bytes = max_bytes  # written since the folder was last measured; the first write measures it

    def has(self, key: str) -> bool:
        """Whether an adapter is here."""
        # Path.exists would raise if the folder is not readable, and serving must go on without it.
        return _KEY.fullmatch(key) is not None and os.path.exists(self._path(key))

    def open(self, key: str) -> PackedAdapter | None:
        """Map an adapter; returns None if it is not here or cannot be read.

        A damaged file is deleted. If this process lacks file descriptors, maps or permissions, the file stays, since
        other processes may be using it.
        """
        if not self.has(key):
            return None
        path = self._path(key)
        try:
            packed = _read(path)
        except (SafetensorError, ValueError, LookupError) as error:
            log.warning("packed adapter %s is damaged and will be packed again: %s", path, error)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        except (OSError, RuntimeError) as error:  # RuntimeError: torch cannot map it
            log.warning("packed adapter %s cannot be opened: %s", path, error)
            return None
        with suppress(OSError):
            os.utime(path)  # eviction goes by the time of last use
        return packed

    def put(self, key: str, packed: PackedAdapter) -> PackedAdapter:
        """Write an adapter and return it mapped; returns `packed` itself if it cannot be written."""
        size = packed.pages_PE.nbytes
        if size > self._max_bytes or _KEY.fullmatch(key) is None:
            return packed
        part = self._folder / f".{key}.{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: getattr(packed, name) for name in _TENSORS}, part, _metadata(packed))
            part.replace(self._path(key))
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            log.warning("adapter %s is served from memory, since it cannot be written to disk: %s", key, error)
            with suppress(OSError):
                part.unlink()
            return packed
        self._keep_to_budget(size)
        return self.open(key) or packed

    def keys(self) -> set[str]:
        """Return the keys of the adapters that are here."""
        with suppress(OSError):
            names = (name.removesuffix(_SUFFIX) for name in os.listdir(self._folder))
            return {name for name in names if _KEY.fullmatch(name)}
        return set()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _keep_to_budget(self, new_bytes: int) -> None:
        """Delete the least recently used files beyond the budget.

        The folder is measured from time to time, since several processes write to it.
        """
        with self._lock:
            self._unscanned_bytes += new_bytes
            if self._unscanned_bytes < self._max_bytes // _SCANS_PER_BUDGET:
                return
            self._unscanned_bytes = 0
            with suppress(OSError):
                _delete_oldest(self._root, self._max_bytes - self._max_bytes // _SCANS_PER_BUDGET)


def _metadata(packed: PackedAdapter) -> dict[str, str]:
    fields = json.dumps([getattr(packed, name) for name in _FIELDS])
    return {"fields": fields, "crc32": str(_checksum(fields, packed))}


def _read(path: Path) -> PackedAdapter:
    with safe_open(path, framework="pt") as stored:  # checks the file's length against its header
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in _TENSORS}  # mapped, not copied
    fields = dict(zip(_FIELDS, map(tuple, json.loads(metadata["fields"])), strict=True))
    packed = PackedAdapter(**tensors, **fields, is_mapped=True)
    if _checksum(metadata["fields"], packed) != int(metadata["crc32"]):
        raise ValueError("its checksum does not match its content")
    return packed


def _checksum(fields: str, packed: PackedAdapter) -> int:
    crc = zlib.crc32(fields.encode())
    for tensor in (getattr(packed, name) for name in _TENSORS):
        crc = _crc(zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), crc), tensor)
    return crc


def _crc(crc: int, tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes: 7 GB/s on one core, without holding Python's lock."""
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), crc)


def _stats(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob("*/*"):
        with suppress(FileNotFoundError):  # another process renamed or deleted it meanwhile
            stat = path.stat()
            if S_ISREG(stat.st_mode):
                yield path, stat


def _delete_oldest(root: Path, max_bytes: int) -> None:
    """Delete the least recently used files of a folder until at most `max_bytes` are left, and all stale ones."""
    stats = list(_stats(root))
    total = sum(stat.st_size for _, stat in stats)
    now = time.time()
    for path, stat in sorted(stats, key=lambda pair: pair[1].st_mtime):
        is_stale = path.name.startswith(".") and now - stat.st_mtime > _STALE_S
        if total > max_bytes or is_stale:
            path.unlink(missing_ok=True)
            total -= stat.st_size
