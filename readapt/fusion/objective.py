"""The objective of the search: the loss of candidates `alpha * T + beta * E` on fixed held-out rows.

Shape letters: C candidates, N rows of one candidate, L label positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapter_files import Adapter, check_fits
from cluster.config import SearchConfig
from readapt.fusion.coefficients import Deltas, deltas, installed
from readapt.fusion.fuse import Fusion, Rank
from readapt.fusion.points import Point, groups
from readapt.training.causal_lm import CausalLM
from readapt.training.data import BatchTensors, Encoded, Encoder, Row, by_length, collate
from readapt.training.evaluate import label_logits
from readapt.training.lora import linear_shapes

# Rows x tokens of one forward, all candidates together: what a core's caches hold, or enough to fill a GPU.
FORWARD_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class Trial:
    """One candidate and its loss on the search rows; inf where the loss was not a number."""

    point: Point
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """The best candidate and all that were tried, in order."""

    point: Point
    loss: float
    trials: tuple[Trial, ...]


def best_of(trials: Sequence[Trial]) -> SearchResult:
    """The trial of the lowest loss; among equals the earliest."""
    best = min(trials, key=lambda trial: trial.loss)
    return SearchResult(best.point, best.loss, tuple(trials))


class FusionObjective:
    """Loss on fixed rows of `alpha * task + beta * evolution`, of many candidates at once, on a bare `model`.

    The same rows in the same order for every candidate, so that candidates differ by their merit alone. `config.rank`
    says what is scored: the sum as it is ("uncut"), or cut to the task's own ranks ("serving"), as it would ship.
    InvalidAdapterError where the task does not fit the model.
    """

    def __init__(
        self,
        model: CausalLM,
        task: Adapter,
        evolution: Adapter,
        rows: Sequence[Row],
        encoder: Encoder,
        config: SearchConfig,
    ):
        check_fits(task, linear_shapes(model))
        self.model, self.config = model, config
        self.rows = by_length(encoder.encode_all(rows))
        self._fusion = Fusion(_on(model.device, task), _on(model.device, evolution))
        self.stacks = self._fusion.stacks
        self.groups = groups(task.factors, config.groups)

    def adapter(self, point: Point, rank: Rank = "task") -> Adapter:
        """The candidate itself, on the CPU; see `Fusion.at`."""
        return _on(torch.device("cpu"), self._fusion.at(point, rank))

    def lost_energy(self, point: Point, rank: Rank = "task") -> dict[str, float]:
        """See `Fusion.lost_energy`."""
        return self._fusion.lost_energy(point, rank)

    @torch.no_grad()
    def losses(self, points: Sequence[Point], rows: Sequence[Encoded] | None = None) -> list[float]:
        """Mean loss of each point in nats per completion token; inf where it is not a number.

        `rows` are some of the objective's rows in their order (None: all of them).
        """
        rows = rows or self.rows
        at_once = max(1, FORWARD_TOKENS[self.model.device.type] // len(rows[-1].input_ids))
        sums: list[float] = []
        for start in range(0, len(points), at_once):
            chunk = points[start : start + at_once]
            pairs = {name: stack.pairs(chunk) for name, stack in self.stacks.items()}
            with installed(self.model, self.deltas(pairs)):
                sums += sum_losses(self.model, rows, len(chunk)).tolist()
        return [loss / count_labels(rows) if math.isfinite(loss) else math.inf for loss in sums]

    def deltas(self, pairs: Mapping[str, Tensor]) -> dict[str, Deltas]:
        """What candidates add to each module, from their (alpha, beta) there, C x 2; differentiable in these."""
        rank: Rank = None if self.config.rank == "uncut" else "task"
        weights = {name: self.model.get_submodule(name).weight for name in pairs}
        return {name: deltas(self.stacks[name], weights[name], pairs_C2, rank) for name, pairs_C2 in pairs.items()}


def sum_losses(model: CausalLM, rows: Sequence[Encoded], num_candidates: int) -> Tensor:
    """Summed loss over all labels of `rows`, by candidate [C], of the candidates that are installed on the model."""
    total_C = torch.zeros(num_candidates, dtype=torch.float64, device=model.device)
    for batch in _batches(rows, FORWARD_TOKENS[model.device.type] // num_candidates):
        num_rows = len(batch.input_ids_BT)
        logits_LV, labels_L, row_L = label_logits(model, _repeat(batch, num_candidates))
        losses_L = cross_entropy(logits_LV, labels_L, reduction="none").double()
        total_C = total_C.index_add(0, row_L // num_rows, losses_L)
    return total_C


def count_labels(rows: Sequence[Encoded]) -> int:
    """The number of completion tokens, eos included."""
    return sum(len(row.input_ids) - row.num_prompt_tokens for row in rows)


def _batches(rows: Sequence[Encoded], max_tokens: int) -> Iterator[BatchTensors]:
    """Rows by rising length, as many at once as stay below `max_tokens` with their padding, at least one."""
    batch: list[Encoded] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.input_ids) > max_tokens:
            yield collate(batch)
            batch = []
        batch.append(row)
    yield collate(batch)


def _repeat(batch: BatchTensors, times: int) -> BatchTensors:
    tensors = (batch.input_ids_BT, batch.attention_mask_BT, batch.labels_BT)
    return BatchTensors(*(tensor.repeat(times, 1) for tensor in tensors))


def _on(device: torch.device, adapter: Adapter) -> Adapter:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    factors = {
        name: replace(f, a_RD=moved(f.a_RD), b_FR=moved(f.b_FR), magnitude_F=moved(f.magnitude_F))
        for name, f in adapter.factors.items()
    }
    return replace(adapter, factors=factors)
