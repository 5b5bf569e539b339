"""The base that an adapter was trained on, as its adapter_config.json names it, against the base that it is loaded on.

Bases of one architecture have the same shapes, so an adapter of another base loads without an error and answers badly.
The name alone decides little: it may be a folder of another machine or a hub id. Where both bases' files are known,
their fingerprints decide. Otherwise people are warned.
"""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from cluster.errors import InvalidAdapterError, InvalidCheckpointError
from cluster.registry.records import BaseModel
from cluster.storage.checkpoints import open_checkpoint


def check_recorded_base(recorded: str, base: BaseModel, others: Iterable[BaseModel], adapter: Path) -> tuple[str, ...]:
    """Compare the base that an adapter names with the base that it is loaded on. Return warnings for people.

    `others` are the known bases, `adapter` is the adapter's folder. Raises InvalidAdapterError if the named base is
    known and has other weights. An adapter that names no base is neither refused nor warned of.
    """
    if not recorded or _names(recorded, base):
        return ()
    known = [other for other in others if other.name != base.name and _names(recorded, other)]
    fingerprints = {other.fingerprint for other in known}
    if not known and (found := _fingerprint_of(recorded)) is not None:
        fingerprints = {found}
    if base.fingerprint in fingerprints:
        return ()
    if fingerprints:
        called = f", which is called {known[0].name!r} here" if known else ""
        load_there = f" Load it on {known[0].name!r}." if known else ""
        raise InvalidAdapterError(
            f"{adapter}: it was trained on another base. Its adapter_config.json names {recorded!r}{called}, whose "
            f"weights are not those of {base.name!r}.{load_there} If it fits {base.name!r} all the same, write "
            f"{base.path!r} as its base_model_name_or_path."
        )
    return (
        f"adapter_config.json names the base {recorded!r}, which cannot be compared with {base.name!r} ({base.path}): "
        "check that the adapter was trained on these weights",
    )


def _names(recorded: str, base: BaseModel) -> bool:
    """Return whether the recorded name means this base: its name, its folder, or its hub id.

    A relative path means a base whose folder ends with it. A hub id means one in the hub's cache, or one whose folder
    has the id's last part as its name.
    """
    path = Path(base.path)
    if os.path.isabs(recorded):
        return os.path.realpath(recorded) == os.path.realpath(path)
    parts = tuple(part for part in recorded.lower().split("/") if part not in ("", ".", ".."))
    folders = tuple(part.lower() for part in path.parts)
    is_end = bool(parts) and folders[-len(parts) :] == parts
    is_hub_id = len(parts) == 2 and ("--".join(("models", *parts)) in folders or folders[-1] == parts[1])
    return recorded == base.name or is_end or is_hub_id


def _fingerprint_of(recorded: str) -> str | None:
    """Return the fingerprint of the recorded checkpoint if it is on this machine. Its weights are then read once."""
    if not os.path.isabs(recorded) or not os.path.isdir(recorded):
        return None
    try:
        return _fingerprint(Path(recorded), open_checkpoint(Path(recorded)).stamp())
    except InvalidCheckpointError:  # a folder that cannot be read says nothing about the base
        return None


@lru_cache(maxsize=16)
def _fingerprint(folder: Path, stamp: str) -> str:
    """Return a checkpoint's fingerprint; `stamp` tells its present files from earlier ones."""
    return open_checkpoint(folder).fingerprint()
