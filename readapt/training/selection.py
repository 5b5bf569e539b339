"""Which rows can be used: those that fit the models' tokenizers and `readapt.train.max_tokens`.

One odd row of many must not end an upgrade. It is left out, counted and reported. Too few rows are an error.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import InvalidDataError
from readapt.training.data import Encoder, Row, load_rows

log = logging.getLogger(__name__)


def usable_rows(path: Path, encoders: Sequence[Encoder], left_out: Counter[str] | None = None) -> list[Row]:
    """Load the rows of a file that fit all encoders. The others are logged, and added to `left_out` by reason.

    InvalidDataError if none is left; see `load_rows` for the others.
    """
    rows = load_rows(path)
    faults = [next((fault for encoder in encoders if (fault := encoder.fault(row))), None) for row in rows]
    counts = Counter(f"{path.name}: {fault}" for fault in faults if fault is not None)
    kept = [row for row, fault in zip(rows, faults, strict=True) if fault is None]
    if not kept:
        raise InvalidDataError(f"{path}: none of its {len(rows)} rows can be used. {described(counts)}")
    if counts:
        log.warning("%s: %d of %d rows are left out. %s", path, len(rows) - len(kept), len(rows), described(counts))
    if left_out is not None:
        left_out.update(counts)
    return kept


def described(left_out: Counter[str] | dict[str, int]) -> str:
    """Return how many rows were left out for which reason, as text."""
    return "; ".join(f"{num} x {reason}" for reason, num in left_out.items())
