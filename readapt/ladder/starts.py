"""The starts of a ladder that are made directly, with no search and no training."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.adapters.files import Adapter
from cluster.config.readapt import TransplantConfig
from cluster.errors import InvalidDataError
from readapt.fusion.search import subset
from readapt.ladder.inputs import Bases, LadderTask
from readapt.ladder.transplant import transplant
from readapt.training.data import Encoded, by_length


@dataclass(frozen=True)
class Start:
    """An adapter for the new base, not yet evaluated. `Attempt` explains `energy`, `Outcome` explains the others."""

    adapter: Adapter
    alpha: float
    beta: float
    energy: float | None = None


def transplanted(bases: Bases, task: LadderTask, config: TransplantConfig, seed: int) -> Start:
    """Fit a transplant on some of the training rows.

    Raises InvalidDataError if the old base can read none of them, and the errors of `transplant`.
    """
    rows = subset(task.rows.train, config.rows, seed)
    num_tokens = round(config.tokens_per_width * bases.new.config.hidden_size)
    encoded = (bases.encoder.encode(row) for row in rows)
    chosen = calibration_rows(encoded, bases.old.config.vocab_size, num_tokens)
    if not chosen:
        raise InvalidDataError("nothing to transplant: every row has tokens that the old base does not know")
    found = transplant(bases.old, task.old, bases.new, chosen, config)
    return Start(found.adapter, 1.0, 0.0, min(found.energy.values(), default=None))


def calibration_rows(rows: Iterable[Encoded], vocab_size: int, num_tokens: int) -> list[Encoded]:
    """Return the first rows with `num_tokens` tokens in all, shortest first.

    Rows with tokens beyond `vocab_size` are skipped. If only the end-of-sequence token is beyond it, the row is used
    without that token.
    """
    chosen: list[Encoded] = []
    for row in rows:
        if row.input_ids[-1] >= vocab_size:  # the last token is end-of-sequence
            row = replace(row, input_ids=row.input_ids[:-1])
        if max(row.input_ids) < vocab_size:
            chosen.append(row)
            num_tokens -= len(row.input_ids)
        if num_tokens <= 0:
            break
    return by_length(chosen)
