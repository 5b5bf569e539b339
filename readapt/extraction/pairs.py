"""Pairs the tensors of a base checkpoint with those of a tuned one, and checks that the checkpoints match."""

from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import Checkpoint
from readapt.extraction.anatomy import Anatomy, Kind, Place, anatomy_of

_NO_MATRIX = "no adapter can change it: it is not the weight matrix of a supported module"


@dataclass(frozen=True)
class TensorPair:
    """The same tensor in the base and the tuned checkpoint: its stored names, and the modules that use it.

    `base` is None if only the tuned checkpoint has the tensor. If `places` is empty, the tensor cannot become low-rank
    factors, and `reason` says why.
    """

    index: int
    path: str
    base: str | None
    tuned: str
    places: tuple[Place, ...]
    reason: str = ""


def pair_tensors(
    base: Checkpoint, tuned: Checkpoint, anatomy: Anatomy, leaves_out: Callable[[str], bool] = lambda path: False
) -> list[TensorPair]:
    """Return the pairs of all tensors, sorted by name. `leaves_out` names those whose shapes do not matter.

    If only one checkpoint stores a tied weight separately, its partner is the weight that it is tied to. The vocabulary
    may grow or shrink. Raises InvalidCheckpointError if shapes or model types differ otherwise, or if the tuned
    checkpoint lacks a tensor.
    """
    kinds = base.config.get("model_type"), tuned.config.get("model_type")
    if kinds[0] != kinds[1]:
        raise InvalidCheckpointError(f"{tuned.folder} has model type {kinds[1]!r}, but {base.folder} has {kinds[0]!r}.")
    ours, theirs = _Names(base, anatomy, anatomy), _Names(tuned, anatomy, anatomy_of(tuned, base))
    pairs = []
    for index, path in enumerate(sorted(ours.stored.keys() | theirs.stored.keys())):
        before, after = ours.find(path), theirs.find(path)
        if after is None and leaves_out(path):
            continue
        if after is None:
            raise InvalidCheckpointError(f"{tuned.folder} lacks tensor {path!r}, which {base.folder} has.")
        places, reason = _places(path, before, after, anatomy, ours, theirs)
        if before is not None and not leaves_out(path):
            _check_shapes(path, base, before, tuned, after, places)
        pairs.append(TensorPair(index, path, before, after, places, reason))
    if not any(pair.base is not None and pair.places for pair in pairs):
        raise InvalidCheckpointError(f"{base.folder} has no weight matrix that an adapter can change.")
    return pairs


class _Names:
    """The stored names of a checkpoint's tensors, by the model class's own names."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, own: Anatomy):
        self.stored = {anatomy.path(name): name for name in checkpoint.names()}
        self._partners = {**{source: target for target, source in own.tied.items()}, **own.tied}

    def find(self, path: str) -> str | None:
        """Return the stored name of a tensor, or of the weight that it is tied to; None if neither is stored."""
        return self.stored.get(path) or self.stored.get(self._partners.get(path, ""))


def _places(
    path: str, before: str | None, after: str, anatomy: Anatomy, ours: _Names, theirs: _Names
) -> tuple[tuple[Place, ...], str]:
    if before is None:
        return (), "the base model has no such tensor"
    if path not in anatomy.places:
        return (), anatomy.refused.get(path) or anatomy.refused.get(after) or _NO_MATRIX
    stored = ours.stored.keys() | theirs.stored.keys()
    partners = [place for place in anatomy.tied_places(path) if f"{place.module}.weight" not in stored]
    return (anatomy.places[path], *partners), ""


def _check_shapes(
    path: str, base: Checkpoint, before: str, tuned: Checkpoint, after: str, places: tuple[Place, ...]
) -> None:
    old, new = base.shape(before), tuned.shape(after)
    if old == new:
        return
    is_vocabulary = any(place.kind is Kind.EMBEDDING for place in places) or (
        bool(old) and old[0] == base.config.get("vocab_size")
    )
    if is_vocabulary and old[1:] == new[1:]:
        return
    raise InvalidCheckpointError(
        f"{tuned.folder}: {path} has shape {new}, but {old} in {base.folder}. Both checkpoints must have the same "
        "architecture; only the vocabulary may grow or shrink. `--exclude` leaves a tensor out."
    )
