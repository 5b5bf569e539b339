"""How two versions of a base model differ: determined once per pair and kept in the registry.

This decides, before any other work, whether adapters can be carried over: the linear modules must have the same shapes,
and each token id must mean the same token. Added tokens, other rules for splitting text, and tied or untied embeddings
are fine, because adapters only change the linears between embedding and head.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.adapters.dialect import base_dialect, moved_tokens, ordinary_tokens
from cluster.adapters.files import Adapter, load_adapter, save_adapter
from cluster.config.settings import Fleet
from cluster.errors import InvalidCheckpointError, ReloraError
from cluster.fleet import register_base
from cluster.registry.registry import Registry
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import Checkpoint, open_checkpoint
from readapt.lowrank.delta import ADVICE, ModuleEnergy, base_evolution, check_finite, check_same_shape

EVOLUTION = "evolution"


class TokenizerChange(StrEnum):
    """How the tokenizer of a new base differs from the old one's."""

    SAME = "same"
    COMPATIBLE = (
        "compatible"  # the ids of ordinary tokens are unchanged; tokens may be added, text may be split otherwise
    )
    OTHER = "other"  # some ids mean other tokens


@dataclass(frozen=True)
class BasePair:
    """Two bases whose adapters can be carried over. `key` is the evolution's blob, None if no linear changed."""

    old: str
    new: str
    key: str | None
    modules: tuple[ModuleEnergy, ...]
    tokenizer: TokenizerChange
    num_new_tokens: int


class BasePairs:
    """The base pairs of one target. Each evolution is extracted at most once, across all campaigns."""

    def __init__(
        self, fleet: Fleet, registry: Registry, blobs: BlobStore, target: str, say: Callable[[str], None] = print
    ):
        self._fleet, self._registry, self._blobs = fleet, registry, blobs
        self._target, self._say = target, say
        self._found: dict[str, BasePair | ReloraError] = {}
        self._evolution = lru_cache(maxsize=1)(lambda key: load_adapter(blobs.fetch_folder(key)))

    def of(self, old: str) -> BasePair:
        """Return the pair of the base `old` and the target.

        Raises InvalidCheckpointError if adapters cannot be carried over, a tensor is not finite or a file is missing;
        ConflictError if the old base's weights are not those its adapters were registered for.
        """
        if old not in self._found:
            try:
                self._found[old] = self._find(old)
            except ReloraError as error:
                self._found[old] = error  # hashing and comparing two large bases takes long: do it once
        found = self._found[old]
        if isinstance(found, ReloraError):
            raise found
        return found

    def evolution(self, old: str) -> Adapter:
        """Return the evolution from `old` to the target as a low-rank adapter; empty if no linear changed."""
        key = self.of(old).key
        return Adapter({}) if key is None else self._evolution(key)

    def _find(self, old: str) -> BasePair:
        before, after = (open_checkpoint(self._fleet.base(name).path) for name in (old, self._target))
        check_same_shape(before, after)
        change, num_new_tokens = self._tokenizer_change(before, after)
        search = self._fleet.readapt.search
        identity = {
            "old": register_base(self._fleet, self._registry, old).fingerprint,
            "new": register_base(self._fleet, self._registry, self._target).fingerprint,
            "rank": search.evolution_rank,
            "energy": search.evolution_energy,
        }
        details = self._extracted(identity) or self._extract(before, after, identity)
        modules = tuple(ModuleEnergy(**module) for module in details["modules"])
        return BasePair(old, self._target, details["key"], modules, change, num_new_tokens)

    def _tokenizer_change(self, before: Checkpoint, after: Checkpoint) -> tuple[TokenizerChange, int]:
        """Return `tokenizer_change`. If every adapter is trained from scratch, ids may mean other tokens."""
        try:
            change, num_new_tokens = tokenizer_change(before, after)
        except InvalidCheckpointError:
            if self._fleet.readapt.ladder.rungs != ("scratch",):
                raise
            return TokenizerChange.OTHER, 0
        if change is TokenizerChange.COMPATIBLE:
            self._say(
                f"{self._target} has another tokenizer: {num_new_tokens} tokens were added, the old ids are unchanged"
            )
        return change, num_new_tokens

    def _extracted(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what an earlier campaign extracted, if the blob store still has it."""
        for event in self._registry.events(kind=EVOLUTION):
            key = event.details["key"]
            if identity.items() <= event.details.items() and (key is None or self._blobs.exists(key)):
                return event.details
        return None

    def _extract(self, before: Checkpoint, after: Checkpoint, identity: Mapping[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        check_finite(after)
        evolution, energies = base_evolution(before, after, rank=identity["rank"], energy=identity["energy"])
        key = self._store(evolution) if evolution.factors else None
        seconds = time.perf_counter() - started
        details: dict[str, Any] = {"key": key, "seconds": seconds, "modules": [asdict(energy) for energy in energies]}
        self._registry.log(EVOLUTION, **identity, **details)
        changed = f"{len(evolution.factors)} modules changed"
        self._say(f"evolution {before.folder.name} -> {after.folder.name}: {changed}, {seconds:.1f} s")
        return details

    def _store(self, evolution: Adapter) -> str:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(evolution, Path(folder) / "evolution")
            return self._blobs.put_folder(Path(folder) / "evolution")


def tokenizer_change(old: Checkpoint, new: Checkpoint) -> tuple[TokenizerChange, int]:
    """Return how the tokenizer has changed, and the number of added tokens.

    Raises InvalidCheckpointError if ids mean other tokens, because the adapters' knowledge would then be about other
    text. Special tokens may change their names, as reserved ones do once they are used.
    """
    if old.tokenizer_fingerprint() == new.tokenizer_fingerprint():
        return TokenizerChange.SAME, 0
    before, after = (base_dialect(checkpoint.folder).tokenizer for checkpoint in (old, new))
    moved = moved_tokens(before, after)
    if moved:
        token, (was, now) = next(iter(moved.items()))
        raise InvalidCheckpointError(
            f"{new.folder}: {len(moved)} of {len(ordinary_tokens(before))} tokens of {old.folder} have other ids or "
            f"are missing, such as {token!r} ({was}, now {'none' if now is None else now}): adapters cannot be "
            f"carried over, {ADVICE}"
        )
    return TokenizerChange.COMPATIBLE, max(0, len(after.get_vocab()) - len(before.get_vocab()))
