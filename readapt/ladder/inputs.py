"""What a ladder works on: the two bases, the adapter, and the task's rows, split by what they are used for."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.adapters.files import Adapter
from cluster.config.readapt import SearchConfig
from readapt.fusion.search import split_valid
from readapt.training.causal_lm import CausalLM
from readapt.training.data import Encoder, Row, Task
from readapt.training.evaluate import Gate, Metric


@dataclass(frozen=True)
class Bases:
    """The old and the new base model, both bare, the new one's encoder, and the evolution between them."""

    old: CausalLM
    new: CausalLM
    encoder: Encoder
    evolution: Adapter


@dataclass(frozen=True)
class TaskRows:
    """A task's rows by use: `train` for training, `search` to choose between starts, `gate` to accept an adapter.

    `search` and `gate` share no row. Test rows are left out: nothing in an upgrade sees them.
    """

    train: Sequence[Row]
    search: Sequence[Row]
    gate: Sequence[Row]

    @classmethod
    def split(cls, task: Task, config: SearchConfig) -> "TaskRows":
        """Split the task's validation rows between search and gate; see `split_valid` for the rule and its errors."""
        search, gate = split_valid(task.valid, config)
        return cls(task.train, search, gate)


@dataclass(frozen=True)
class LadderTask:
    """The `old` adapter to carry over, and the `gate` that its successor must pass on `rows.gate`.

    `metric` measures the quality. The gate's reference is the old adapter's quality on the old base, on the same rows.
    """

    old: Adapter
    rows: TaskRows
    gate: Gate
    metric: Metric
