"""The prompters of one gateway: one for each base, and one for each set of text files beside adapters of that base."""

import asyncio
from collections import OrderedDict
from pathlib import Path

from cluster.storage.blobs import BlobStore
from serving.gateway.prompts import Prompter
from serving.gateway.routing import Target, dialect_of

MAX_PROMPTERS = 32  # each may hold a large vocabulary


class Prompters:
    """Opens prompters when they are needed, and keeps those used last."""

    def __init__(self, blobs: BlobStore):
        self._blobs = blobs
        self._open: OrderedDict[tuple[Path, str], asyncio.Task[Prompter]] = OrderedDict()

    async def of(self, target: Target, folder: Path) -> Prompter:
        """Return the prompter of a target whose base has its files in `folder`. Callers that wait share the opening.

        Raises StorageError if the target's text files cannot be fetched, and InvalidAdapterError if they do not fit.
        """
        key = folder, dialect_of(target.version)
        if key not in self._open:
            self._open[key] = asyncio.create_task(asyncio.to_thread(open_prompter, self._blobs, *key))
            if len(self._open) > MAX_PROMPTERS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        opening = self._open[key]
        try:
            return await asyncio.shield(opening)  # a caller that is cancelled must not cancel it for the others
        finally:
            if opening.done() and (opening.cancelled() or opening.exception() is not None):
                self._open.pop(key, None)  # the next call tries again


def open_prompter(blobs: BlobStore, folder: Path, dialect: str) -> Prompter:
    """Open the prompter of a base, or of the adapters on it whose text files are the blob `dialect`."""
    return Prompter(folder, blobs.fetch_folder(dialect) if dialect else None)
