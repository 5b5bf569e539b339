"""How large an adapter is: its rank and the bytes of its files, which versions carry in their details."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ReloraError
from cluster.registry.records import Version

if TYPE_CHECKING:
    from cluster.storage.blobs import BlobStore


def size_details(rank: int, files: Iterable[Path]) -> dict[str, int]:
    """Return the highest rank of an adapter and the bytes of its files, for a version's details."""
    return {"rank": rank, "num_bytes": sum(file.stat().st_size for file in files if file.is_file())}


def size_of(version: Version, blobs: "BlobStore | None" = None) -> dict[str, Any]:
    """Return a version's rank and bytes; None for what is unknown.

    Releases before 0.1.0 did not note them. With `blobs`, the files of such a version are fetched and measured.
    """
    known = {"rank": version.details.get("rank"), "num_bytes": version.details.get("num_bytes")}
    if None not in known.values() or blobs is None or version.blob_key is None:
        return known
    from cluster.adapters.files import load_adapter  # imported here because it loads torch

    try:
        folder = blobs.fetch_folder(version.blob_key)
        return size_details(load_adapter(folder).max_rank, folder.rglob("*"))
    except ReloraError:  # the store has lost the files; `show` lists the version all the same
        return known
