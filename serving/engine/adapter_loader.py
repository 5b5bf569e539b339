"""How an adapter comes to the host: mapped from this machine's disk, or fetched, checked, packed and written there."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.adapter_files import load_adapter
from serving.adapters.disk_tier import DiskTier
from serving.adapters.packing import PackedAdapter
from serving.engine.engine import Engine
from serving.engine.loads import Loads

_MAX_UNWRITTEN = 4  # adapters that wait for the disk at a time; others are written when they come next


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter on the host, how long that took, and whether its files had to be fetched."""

    packed: PackedAdapter
    load_s: float
    was_fetched: bool


class AdapterLoader:
    """What loader threads do for an engine, which keeps packed adapters in a folder if there is one."""

    def __init__(self, engine: Engine, packed_dir: Path | None):
        self._engine = engine
        self._is_on_gpu = engine.config.device != "cpu"
        self._files: DiskTier | None = None
        self._writes = Loads(1)
        if packed_dir is not None and engine.config.packed_bytes:
            self._files = DiskTier(packed_dir, engine.packing_id(), engine.config.packed_bytes)

    def load(self, key: str, folder: Path | Callable[[], Path]) -> Loaded:
        """Bring an adapter to the host; `folder` has its files, or fetches them.

        Raises InvalidAdapterError, and what fetching raises.
        """
        started_at = time.perf_counter()
        mapped = self._files.open(key) if self._files is not None else None
        packed = mapped or self._pack(folder)
        self._engine.check_packed(packed)
        if self._is_on_gpu:
            packed = packed.pinned()
        return Loaded(packed, time.perf_counter() - started_at, mapped is None)

    def write(self, key: str, packed: PackedAdapter, when_mapped: Callable[[PackedAdapter], None]) -> None:
        """Write an adapter to the disk, on a thread that nobody waits for; where a GPU reads memory it stays pinned."""
        if self._files is not None and self._writes.num_under_way < _MAX_UNWRITTEN:
            self._writes.ask(key, partial(self._write, self._files, key, packed, when_mapped))

    @property
    def num_unwritten(self) -> int:
        """Adapters that are being written, or wait for it."""
        return self._writes.num_under_way

    def is_packed(self, key: str) -> bool:
        """Whether an adapter is on this machine's disk."""
        return self._files is not None and self._files.has(key)

    def packed_keys(self) -> set[str]:
        """The adapters on this machine's disk."""
        return self._files.keys() if self._files is not None else set()

    def _pack(self, folder: Path | Callable[[], Path]) -> PackedAdapter:
        path = folder if isinstance(folder, Path) else folder()
        return self._engine.pack(load_adapter(path, self._engine.config.max_rank))

    def _write(
        self, files: DiskTier, key: str, packed: PackedAdapter, when_mapped: Callable[[PackedAdapter], None]
    ) -> None:
        stored = files.put(key, packed)
        if stored.is_mapped and not self._is_on_gpu:
            when_mapped(stored)
