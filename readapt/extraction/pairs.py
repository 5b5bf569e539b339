"""Which tensors of two checkpoints belong together, and whether the two belong together at all."""

from dataclasses import dataclass

from cluster.checkpoints import Checkpoint
from cluster.errors import InvalidCheckpointError
from readapt.extraction.anatomy import Anatomy, Kind, Place, anatomy_of

_NO_MATRIX = "it is no weight matrix of a module that an adapter can change"


@dataclass(frozen=True)
class TensorPair:
    """One tensor of the tuned checkpoint and its counterpart: stored names, and the modules that use it.

    `base` is None for a tensor that only the tuned checkpoint has. Without `places` the tensor can only be carried
    whole, for the `reason` given.
    """

    index: int
    path: str
    base: str | None
    tuned: str
    places: tuple[Place, ...]
    reason: str = ""


def pair_tensors(base: Checkpoint, tuned: Checkpoint, anatomy: Anatomy) -> list[TensorPair]:
    """Pair up the tensors of both checkpoints, in order of their names.

    A tied weight that only one of the two stores on its own is compared with what it is tied to. Rows may be added to
    the vocabulary. InvalidCheckpointError for any other difference of shape or kind, and for tensors that the tuned
    checkpoint lacks.
    """
    kinds = base.config.get("model_type"), tuned.config.get("model_type")
    if kinds[0] != kinds[1]:
        raise InvalidCheckpointError(f"{tuned.folder}: is of model type {kinds[1]!r}, {base.folder} of {kinds[0]!r}.")
    ours, theirs = _Names(base, anatomy, anatomy), _Names(tuned, anatomy, anatomy_of(tuned, base))
    jobs = []
    for index, path in enumerate(sorted(ours.stored.keys() | theirs.stored.keys())):
        before, after = ours.find(path), theirs.find(path)
        if after is None:
            raise InvalidCheckpointError(f"{tuned.folder}: lacks tensor {path!r}, which {base.folder} has.")
        places, reason = _places(path, before, after, anatomy, ours, theirs)
        if before is not None:
            _check_shapes(path, base, before, tuned, after, places)
        jobs.append(TensorPair(index, path, before, after, places, reason))
    if not any(job.base is not None and job.places for job in jobs):
        raise InvalidCheckpointError(f"{base.folder}: has no weight matrix that an adapter can change.")
    return jobs


class _Names:
    """Stored names by the model class's own names, tied ones found through their partners."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, own: Anatomy):
        self.stored = {anatomy.path(name): name for name in checkpoint.names()}
        self._partners = {**{source: target for target, source in own.tied.items()}, **own.tied}

    def find(self, path: str) -> str | None:
        return self.stored.get(path) or self.stored.get(self._partners.get(path, ""))


def _places(
    path: str, before: str | None, after: str, anatomy: Anatomy, ours: _Names, theirs: _Names
) -> tuple[tuple[Place, ...], str]:
    if before is None:
        return (), "the base model has no such tensor"
    if path not in anatomy.places:
        return (), anatomy.refused.get(path) or anatomy.refused.get(after) or _NO_MATRIX
    on_their_own = ours.stored.keys() | theirs.stored.keys()
    partners = [place for place in anatomy.tied_places(path) if f"{place.module}.weight" not in on_their_own]
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
    if is_vocabulary and old[1:] == new[1:] and new[0] > old[0]:
        return
    raise InvalidCheckpointError(
        f"{tuned.folder}: {path} has shape {new}, but {old} in {base.folder}: what one architecture learned cannot be "
        "carried to another; only a vocabulary may grow."
    )
