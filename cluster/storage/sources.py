"""Where bases and adapters come from: a folder, a bucket (`s3://`, `gs://`), or the local Hugging Face cache.

`local_folder` returns a folder on this machine for each. Files of a bucket are fetched once and kept. A changed bucket
gives another folder, so files never change under a reader. Nothing is ever downloaded from the hub.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from fsspec import AbstractFileSystem

from cluster.errors import InvalidRequestError, NotFoundError, StorageError
from cluster.storage.blobs import open_filesystem

SCHEMES = ("s3://", "gs://", "gcs://")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)?(?:@[\w./-]+)?")
# What a base or an adapter may consist of. Model cards, optimizer states and pickled weights are not fetched.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def check_source(source: str) -> str:
    """Return the source; InvalidRequestError if it is a URL of a kind that is not supported."""
    if "://" in source and not source.startswith(SCHEMES):
        scheme = source.partition("://")[0]
        known = ", ".join(SCHEMES)
        raise InvalidRequestError(
            f"{source!r} has the unknown scheme {scheme!r}. Give a folder, a URL ({known}), or an id of the Hugging "
            "Face hub that is in the local cache."
        )
    return source


def local_folder(source: str | Path, kept: Path, root: Path | None = None) -> Path:
    """Return a local folder with the files of a source. `kept` is where fetched buckets are kept.

    A relative path counts from `root`. A path that is no folder is looked up as a hub id, `org/name` or
    `org/name@revision`. Raises InvalidRequestError for an unknown kind of URL, NotFoundError if there is nothing, and
    StorageError if a bucket cannot be read.
    """
    text = check_source(str(source))
    if "://" in text:
        return _fetched(text, kept)
    path = Path(text) if root is None else root / text
    return (
        path if os.path.isdir(path) else _in_hub_cache(text, path, root)
    )  # Path.is_dir raises if the name is too long


def _in_hub_cache(text: str, path: Path, root: Path | None) -> Path:
    name = text if root is None else os.path.relpath(path, root)
    if _HUB_ID.fullmatch(name) is None:
        raise NotFoundError(f"{str(path)[:300]}: no such folder on this machine.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise NotFoundError(
            f"{str(path)[:300]}: no such folder on this machine, and no {name[:160]!r} in the local Hugging Face "
            f"cache. `hf download {repo[:160]}` would fetch it from the hub."
        ) from error


@cache  # one process sees one state of a bucket
def _fetched(url: str, kept: Path) -> Path:
    shown = re.sub("//[^/@]*@", "//***@", url.partition("?")[0])  # without credentials
    try:
        filesystem, root = open_filesystem(url)
        files = _listing(filesystem, root.rstrip("/"))
        if not files:
            raise NotFoundError(f"{shown}: there are no files of a model or an adapter.")
        folder = kept / hashlib.sha256(json.dumps([url, files], sort_keys=True, default=str).encode()).hexdigest()
        if not folder.is_dir():
            _fetch(filesystem, root.rstrip("/"), list(files), folder)
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(f"{shown}: cannot be read: {error}") from error
    return folder


def _listing(filesystem: AbstractFileSystem, root: str) -> dict[str, list[object]]:
    """Return size and time of the wanted files by relative name."""
    try:
        found = filesystem.find(root, detail=True)
    except FileNotFoundError:
        return {}
    facts = {path.removeprefix(f"{root}/"): [info["size"], info.get("mtime")] for path, info in found.items()}
    return {name: fact for name, fact in facts.items() if any(fnmatch(name, pattern) for pattern in _WANTED)}


def _fetch(filesystem: AbstractFileSystem, root: str, names: list[str], folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(aside / name))
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process fetched it meanwhile
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
