"""Which files of an adapter's folder count: its weights, its configuration, and the tokenizer and template beside them.

These files are the adapter's identity, and only these are stored. Trainers and the Hugging Face hub leave others there:
model cards, optimizer states, checkpoints. The folder may consist of links, as in the hub's cache.
"""

from pathlib import Path

from cluster.adapters.dialect import TEXT_FILES
from cluster.storage.blobs import BlobStore, content_hash

FILES = ("adapter_config.json", "adapter_model.safetensors", *TEXT_FILES)


def identity(folder: Path) -> str:
    """Return the hash of the files that count. StorageError if one cannot be read."""
    return content_hash(folder, counting_files(folder))


def store_adapter(blobs: BlobStore, folder: Path) -> str:
    """Store the files that count, and return their key: the adapter's identity."""
    return blobs.put_folder(folder, counting_files(folder))


def counting_files(folder: Path) -> list[Path]:
    """Return the files that count, in a fixed order."""
    return sorted(folder / name for name in FILES if (folder / name).is_file())
