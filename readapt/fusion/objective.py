"""The objective of the search: the loss of candidates `alpha * T + beta * E` on fixed held-out rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.adapters.files import Adapter, check_fits
from cluster.config.readapt import SearchConfig
from readapt.fusion.coefficients import Deltas, deltas, installed
from readapt.fusion.fuse import Fusion, Rank
from readapt.fusion.points import Point, groups
from readapt.training.causal_lm import CausalLM
from readapt.training.data import BatchTensors, Encoded, Encoder, Row, by_length, collate
from readapt.training.evaluate import label_logits
from readapt.training.lora import linear_shapes

# The most tokens in one forward pass, all candidates together: what a core's caches hold, or enough to fill a GPU.
FORWARD_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class Trial:
    """One candidate and its loss on the search rows; inf if the loss is not finite."""

    point: Point
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """The best candidate, and all trials in order."""

    point: Point
    loss: float
    trials: tuple[Trial, ...]


def best_of(trials: Sequence[Trial]) -> SearchResult:
    """Return the trial of the lowest loss, the earliest of equals, with all trials."""
    best = min(trials, key=lambda trial: trial.loss)
    return SearchResult(best.point, best.loss, tuple(trials))


class FusionObjective:
    """The loss of `alpha * task + beta * evolution` on fixed rows, for many candidates at once, on a bare `model`.

    All candidates get the same rows in the same order, so only their quality makes a difference. `config.rank` says
    what is scored: the sum as it is ("uncut"), or cut to the task's own ranks ("serving"), as it would ship.
    InvalidAdapterError if the task does not fit the model.
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
        self.model = model
        self.config = config
        self.rows = by_length(encoder.encode_all(rows))
        self._fusion = Fusion(_on(model.device, task), _on(model.device, evolution))
        self.terms = self._fusion.terms
        self.groups = groups(task.factors, config.groups)

    def adapter(self, point: Point, rank: Rank = "task") -> Adapter:
        """Return the candidate itself, on the CPU; see `Fusion.at`."""
        return _on(torch.device("cpu"), self._fusion.at(point, rank))

    def lost_energy(self, point: Point, rank: Rank = "task") -> dict[str, float]:
        """Return what a cut loses, by module; see `Fusion.lost_energy`."""
        return self._fusion.lost_energy(point, rank)

    @torch.no_grad()
    def losses(self, points: Sequence[Point], rows: Sequence[Encoded] | None = None) -> list[float]:
        """Return the mean loss of each point in nats per completion token; inf if it is not finite.

        `rows` may be a part of the objective's rows, in their order (None: all of them).
        """
        rows = rows or self.rows
        at_once = max(1, FORWARD_TOKENS[self.model.device.type] // len(rows[-1].input_ids))
        sums: list[float] = []
        for start in range(0, len(points), at_once):
            chunk = points[start : start + at_once]
            pairs = {name: terms.pairs(chunk) for name, terms in self.terms.items()}
            with installed(self.model, self.deltas(pairs)):
                sums += sum_losses(self.model, rows, len(chunk)).tolist()
        return [loss / count_labels(rows) if math.isfinite(loss) else math.inf for loss in sums]

    def deltas(self, pairs: Mapping[str, Tensor]) -> dict[str, Deltas]:
        """Return what candidates add to each module, from their (alpha, beta) there [C, 2]; differentiable in these."""
        rank: Rank = None if self.config.rank == "uncut" else "task"
        weights = {name: self.model.get_submodule(name).weight for name in pairs}
        return {name: deltas(self.terms[name], weights[name], pairs_C2, rank) for name, pairs_C2 in pairs.items()}


def sum_losses(model: CausalLM, rows: Sequence[Encoded], num_candidates: int) -> Tensor:
    """Return the loss of each candidate installed on the model [C], summed over all labels of `rows`."""
    total_C = torch.zeros(num_candidates, dtype=torch.float64, device=model.device)
    for batch in _batches(rows, FORWARD_TOKENS[model.device.type] // num_candidates):
        num_rows = len(batch.input_ids_BT)
        logits_YV, labels_Y, row_Y = label_logits(model, _repeat(batch, num_candidates))
        losses_Y = cross_entropy(logits_YV, labels_Y, reduction="none").double()
        total_C = total_C.index_add(0, row_Y // num_rows, losses_Y)
    return total_C


def count_labels(rows: Sequence[Encoded]) -> int:
    """Return the number of completion tokens, eos included."""
    return sum(len(row.input_ids) - row.num_prompt_tokens for row in rows)


def _batches(rows: Sequence[Encoded], max_tokens: int) -> Iterator[BatchTensors]:
    """Yield batches of consecutive rows: at most `max_tokens` with padding each, but at least one row.

    The rows come in order of rising length, so the last row of a batch is its width.
    """
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
