"""Which blobs nobody refers to any more: those of adapters that were unregistered, and those of interrupted writers."""

import json
import re
import time
from collections.abc import Iterator

from cluster.registry.registry import Registry
from cluster.storage.blobs import BlobStore, StoredBlob

_KEY = re.compile(r"[0-9a-f]{64}")


def garbage(registry: Registry, blobs: BlobStore, older_than_s: float) -> Iterator[StoredBlob]:
    """Yield the files of the store that no version and no event refers to and that are older than `older_than_s`.

    A process stores a blob first and registers it afterwards. The age protects blobs that are not registered yet.
    Before each file the registry is read again, because deleting many takes long. Files that are not ours stay.
    """
    stored = blobs.stored()
    referred_to = _referred_to(registry)
    for blob in stored:
        is_ours = blob.key is not None or blob.is_part
        if not is_ours or blob.key in referred_to or time.time() - blob.modified_at <= older_than_s:
            continue
        if blob.is_part or blob.key not in _referred_to(registry):
            yield blob


def _referred_to(registry: Registry) -> set[str]:
    """Return every blob key that the registry holds, wherever it stands."""
    versions = registry.versions()
    held = [version.details for version in versions] + [event.details for event in registry.events()]
    keys = {version.blob_key for version in versions if version.blob_key is not None}
    return keys.union(*(_KEY.findall(json.dumps(details)) for details in held))
