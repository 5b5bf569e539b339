"""An adapter's way into the blob store, from a folder that a fleet file or a client names: checks, then storing."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.adapters.dialect import adapter_dialect, base_dialect, store_dialect
from cluster.adapters.files import check_base, load_adapter
from cluster.adapters.folder import counting_files, store_adapter
from cluster.adapters.recorded_base import check_recorded_base
from cluster.adapters.size import size_details
from cluster.registry.records import WARNINGS, BaseModel
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter's folder that can be used on the base in `base_folder`. It does not hold the weights."""

    folder: Path
    base_folder: Path
    rank: int
    warnings: tuple[str, ...]


def check_adapter(folder: Path, base: BaseModel, bases: Iterable[BaseModel], max_rank: int) -> CheckedAdapter:
    """Check an adapter's files against its base. Raises InvalidAdapterError if it cannot be used there."""
    base_folder = Path(base.path)
    adapter = load_adapter(folder, max_rank=max_rank)
    check_base(adapter, open_checkpoint(base_folder))
    adapter_dialect(folder, base_dialect(base_folder))
    warnings = check_recorded_base(adapter.base_model, base, bases, folder)
    return CheckedAdapter(folder, base_folder, adapter.max_rank, tuple(warnings))


def store_checked(blobs: BlobStore, checked: CheckedAdapter) -> tuple[str, dict[str, Any]]:
    """Store the files that count. Return their key and the details of a version made of them."""
    details: dict[str, Any] = {WARNINGS: list(checked.warnings)} if checked.warnings else {}
    details |= store_dialect(blobs, checked.folder, checked.base_folder)
    details |= size_details(checked.rank, counting_files(checked.folder))
    return store_adapter(blobs, checked.folder), details
