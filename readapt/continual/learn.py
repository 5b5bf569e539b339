"""Class-incremental learning: an adapter learns new classes stage by stage, without the rows of the earlier ones.

Each stage adds one direction and learns the magnitudes of all (see `directions`); the state after the last stage is
used as it is, whatever the input: nothing is selected, no task is named. A stage's loss compares its own classes with
one another only, so that nothing pushes the older ones down (as in the released code of SD-LoRA, arXiv 2501.13198).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cluster.errors import TrainingError
from readapt.continual.directions import PAPER, Decoupled, Decoupling, DirectionWeights, distil, restarted
from readapt.continual.moments import contrasting, input_moments, with_moments
from readapt.training.data import shuffled_batches
from readapt.training.lora import blank
from readapt.training.optimiser import MAX_GRADIENT_NORM, learning_rate

MethodName = Literal["recall", "contrast", "paper", "distil", "code"]
RowT = TypeVar("RowT", contravariant=True)
AnyT = TypeVar("AnyT")


@dataclass(frozen=True)
class Recall:
    """How the readout of `recall` is trained in each stage but the first: so many vectors are drawn for each step."""

    steps: int = 800
    draws: int = 512
    rank: int = 32
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Method:
    """How a stage is learned; the defaults are the paper's method, as far as it does not depend on the data.

    `ranks` are (first stage, rank) pairs in rising order, stages counted from 0: rank reduction. `max_residual` is the
    share of a new direction's squared norm that the older ones may leave over for it to be dropped: distillation; with
    `rest_rank` (ours) of what is not dropped only that which is left over is kept, at that rank.
    `inherits` lets a new direction start as a copy of the first one, which gives up as much of its magnitude: random
    starts are orthogonal in practice, so that without it distillation never finds anything to drop.
    `contrasts` is ours, not the paper's: rows of A that answer the new inputs and not the old ones (see `moments`).
    `recall` is ours too (see the module of that name), for a causal LM that writes labels.
    `restart` sets all magnitudes back at each stage's start. `magnitude_learning_rate` None is that of the factors.
    """

    steps: int = 100
    batch_rows: int = 32
    ranks: tuple[tuple[int, int], ...] = ((0, 10),)
    max_residual: float | None = None
    decoupling: Decoupling = PAPER
    magnitude: float = 1.0
    restart: float | None = None
    inherits: bool = False
    rest_rank: int | None = None
    contrasts: bool = False
    recall: Recall | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 8e-3
    magnitude_learning_rate: float | None = None

    def __post_init__(self) -> None:
        assert not (self.inherits and self.contrasts), "a direction starts in one way"

    def rank_of(self, stage: int) -> int:
        """The rank of the direction that this stage adds."""
        return [rank for first, rank in self.ranks if first <= stage][-1]


RANK_REDUCTION = ((0, 10), (4, 8), (8, 6))
"""The paper's ranks by stage, counted from 0."""


def released_code(method: Method) -> Method:
    """The same settings with what the authors' released code does differently.

    Norms are ||A|| ||B||, the direction under training is not normalised, all magnitudes start each stage at 0.8, and
    the optimiser is SGD with momentum.
    """
    decoupling = Decoupling(normaliser="factors", is_fresh_unit=False)
    return replace(method, decoupling=decoupling, magnitude=0.8, restart=0.8, optimizer="sgd")


def contrast(method: Method) -> Method:
    """Our variant: new directions look at what is new in the inputs, and the older magnitudes stay as they are.

    With both, an input of an earlier stage is answered as it was when that stage was learned.
    """
    return replace(method, contrasts=True, decoupling=replace(method.decoupling, learns_old_magnitudes=False))


def recalling(method: Method, recall: Recall = Recall()) -> Method:
    """Our other variant, for a causal LM: the first stage makes the features, the others only the readout.

    The first stage's direction is an ordinary LoRA with alpha = 2 rank.
    """
    return replace(method, recall=recall, magnitude=2.0, decoupling=replace(method.decoupling, is_fresh_unit=False))


def method_of(kind: MethodName, steps: int | None, learning_rate: float, rank: int | None = None) -> Method:
    """A method by its name, for a stage on top of an adapter.

    `rank` None is 10, or 32 for recall's readout; `steps` None is 200, or 800 for that.
    """
    method = Method(steps or 200, ranks=((0, rank or 10),), learning_rate=learning_rate)
    if kind == "recall":
        how = Recall(steps or Recall.steps, rank=rank or Recall.rank, learning_rate=learning_rate)
        return recalling(method, how)
    variants = {"contrast": contrast, "distil": distilling, "code": released_code}
    return method if kind == "paper" else variants[kind](method)


def distilling(method: Method, max_residual: float = 0.5, rest_rank: int | None = None) -> Method:
    """The distillation variant, made to find something: see `Method.inherits`. The paper has 9e-4 for the residual."""
    return replace(method, inherits=True, max_residual=max_residual, rest_rank=rest_rank)


class Learner(Protocol[RowT]):
    """What a stage's rows mean to the model: a loss, and whatever parameters of its own go with it."""

    def loss(self, rows: Sequence[RowT]) -> Tensor:
        """The loss of a batch of the present stage's rows."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained besides the adapter."""


def learn_stage(
    model: nn.Module,
    state: Decoupled,
    learner: Learner[AnyT],
    rows: Sequence[AnyT],
    method: Method,
    *,
    shapes: dict[str, tuple[int, int]],
    stage: int,
    seed: int = 0,
) -> Decoupled:
    """Learns one stage on a bare model, which is bare again afterwards, and returns the state with its direction.

    It keeps the sketches of inputs if the method contrasts, and no statistics of classes, whose features have moved.
    `shapes` are those of the modules to adapt, (out, in) by path. TrainingError when the loss is no longer finite.
    """
    if method.restart is not None:
        state = restarted(state, method.restart, method.decoupling.normaliser)
    fresh = blank(shapes, method.rank_of(stage), alpha=method.rank_of(stage), seed=seed)
    decoupling = method.decoupling
    if method.inherits and state.directions:
        fresh, state = state.directions[0], _lent(state, method.magnitude)
    if method.contrasts and state.inputs:
        fresh = contrasting(fresh, _moments(model, state, learner, rows, list(shapes)), state.inputs)
        decoupling = replace(decoupling, learns_rows=False)
    with DirectionWeights(model, state, fresh, method.magnitude, decoupling) as weights:
        groups = [
            {"params": [*weights.factors(), *learner.parameters()], "lr": method.learning_rate},
            {"params": [weights.magnitudes_N], "lr": method.magnitude_learning_rate or method.learning_rate},
        ]
        descend(groups, learner.loss, shuffled_batches(rows, method.batch_rows, seed), method)
        learned = weights.export()
    learned = learned if method.max_residual is None else distil(learned, method.max_residual, method.rest_rank)
    learned = replace(learned, classes={}, has_readout=False)
    if not method.contrasts:
        return replace(learned, inputs={})
    return remember(model, learned, learner, rows, list(shapes))


def _lent(state: Decoupled, magnitude: float) -> Decoupled:
    """The state with this much of the first direction's magnitude taken away."""
    return replace(state, magnitudes=(state.magnitudes[0] - magnitude, *state.magnitudes[1:]))


def remember(
    model: nn.Module, state: Decoupled, learner: Learner[AnyT], rows: Sequence[AnyT], modules: Sequence[str]
) -> Decoupled:
    """The state with these rows' inputs among those that later stages leave alone; for a bare model."""
    return replace(state, inputs=with_moments(state.inputs, _moments(model, state, learner, rows, modules)))


def _moments(
    model: nn.Module, state: Decoupled, learner: Learner[AnyT], rows: Sequence[AnyT], modules: Sequence[str]
) -> dict[str, Tensor]:
    with DirectionWeights(model, state):
        return input_moments(model, modules, learner.loss, rows)


def descend(
    groups: list[dict[str, Any]], loss_of: Callable[[list[AnyT]], Tensor], batches: Iterator[list[AnyT]], method: Method
) -> None:
    """Trains parameter groups for `method.steps` steps, with a cosine rate and the gradient's norm clipped.

    TrainingError when the loss is no longer finite.
    """
    optimizer: torch.optim.Optimizer
    if method.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, foreach=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=method.learning_rate, momentum=0.9, foreach=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for step in range(method.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(step, method.steps, peak)
        optimizer.zero_grad()
        loss = loss_of(next(batches))
        if not math.isfinite(loss.item()):
            raise TrainingError(f"The loss became {loss.item()} at step {step}.")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
