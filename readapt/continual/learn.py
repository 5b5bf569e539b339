"""Class-incremental learning: each stage teaches an adapter new classes, without the rows of earlier stages.

A stage adds one direction and trains the magnitudes of all directions (see `directions`). Inference uses the final
state for every input; no task is named or selected. The loss of a stage compares only its own classes with one another,
so it does not push older classes down (as in the released code of SD-LoRA, arXiv 2501.13198).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cluster.errors import TrainingError
from readapt.continual.directions import PAPER, Decoupled, DirectionSettings, DirectionWeights, distil, restarted
from readapt.continual.moments import contrasting, input_moments, with_moments
from readapt.training.data import shuffled_batches
from readapt.training.lora import blank
from readapt.training.optimiser import MAX_GRADIENT_NORM, learning_rate

MethodName = Literal["recall", "contrast", "paper", "distil", "code"]
RowT = TypeVar("RowT", contravariant=True)
AnyT = TypeVar("AnyT")


@dataclass(frozen=True)
class Recall:
    """How `recall` trains the readout in all stages but the first. Each step draws `draws` vectors."""

    steps: int = 800
    draws: int = 512
    rank: int = 32
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Method:
    """How a stage is learned. The defaults are the paper's method.

    - `ranks`: (first stage, rank) pairs in rising order, with stages counted from 0. Lower ranks for later stages are
      the paper's rank reduction.
    - `max_residual`: the paper's distillation (see `directions.distil`), with our `rest_rank`.
    - `inherits`: a new direction starts as a copy of the first one, which gives up the same magnitude. Random starts
      are nearly orthogonal, so distillation without it never finds a direction to drop.
    - `restart`: every stage resets all magnitudes to this number.
    - `contrasts`: ours. The rows of A respond to new inputs and not to old ones (see `moments`).
    - `recall`: ours. For a causal LM that writes labels (see the module of that name).
    - `magnitude_learning_rate`: by default the learning rate of the factors.
    """

    steps: int = 100
    batch_rows: int = 32
    ranks: tuple[tuple[int, int], ...] = ((0, 10),)
    max_residual: float | None = None
    direction_settings: DirectionSettings = PAPER
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
        assert not (self.inherits and self.contrasts), "`inherits` and `contrasts` both set the start of a direction"

    def rank_of(self, stage: int) -> int:
        """Return the rank of the direction that a stage adds."""
        return [rank for first, rank in self.ranks if first <= stage][-1]


def released_code(method: Method) -> Method:
    """Return the method as in the authors' released code.

    It normalises by ||A|| ||B||, does not normalise the direction under training, resets all magnitudes to 0.8 at each
    stage, and uses SGD with momentum.
    """
    settings = DirectionSettings(normaliser="factors", is_fresh_unit=False)
    return replace(method, direction_settings=settings, magnitude=0.8, restart=0.8, optimizer="sgd")


def contrast(method: Method) -> Method:
    """Return our variant in which new directions respond to what is new in the inputs, and older magnitudes are frozen.

    Both together keep the outputs for inputs of earlier stages as they were learned.
    """
    settings = replace(method.direction_settings, learns_old_magnitudes=False)
    return replace(method, contrasts=True, direction_settings=settings)


def recalling(method: Method, recall: Recall = Recall()) -> Method:
    """Return our variant for a causal LM: the first stage trains the features, later stages train only the readout.

    The direction of the first stage is an ordinary LoRA with alpha = 2 rank.
    """
    settings = replace(method.direction_settings, is_fresh_unit=False)
    return replace(method, recall=recall, magnitude=2.0, direction_settings=settings)


def method_of(kind: MethodName, steps: int | None, learning_rate: float, rank: int | None = None) -> Method:
    """Return a method by its name, for a stage on top of an adapter.

    `rank` defaults to 10, or to 32 for the readout of recall; `steps` defaults to 200, or to 800 for that readout.
    """
    method = Method(steps or 200, ranks=((0, rank or 10),), learning_rate=learning_rate)
    if kind == "recall":
        readout = Recall(steps or Recall.steps, rank=rank or Recall.rank, learning_rate=learning_rate)
        return recalling(method, readout)
    variants = {"contrast": contrast, "distil": distilling, "code": released_code}
    return method if kind == "paper" else variants[kind](method)


def distilling(method: Method, max_residual: float = 0.5, rest_rank: int | None = None) -> Method:
    """Return the distillation variant with inherited starts. The paper's `max_residual` is 9e-4."""
    return replace(method, inherits=True, max_residual=max_residual, rest_rank=rest_rank)


class Learner(Protocol[RowT]):
    """The loss of a stage's rows, and the trainable parameters that it needs besides the adapter."""

    def loss(self, rows: Sequence[RowT]) -> Tensor:
        """Return the loss of a batch of the present stage's rows."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained with the adapter."""


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
    """Learn one stage on a bare model and return the state with the new direction. The model is bare again afterwards.

    The returned state keeps sketches of inputs if the method contrasts. It drops class statistics, because the features
    have changed. `shapes` maps the modules to adapt to (out, in). Raises TrainingError if the loss becomes infinite or
    NaN.
    """
    if method.restart is not None:
        state = restarted(state, method.restart, method.direction_settings.normaliser)
    fresh = blank(shapes, method.rank_of(stage), alpha=method.rank_of(stage), seed=seed)
    settings = method.direction_settings
    if method.inherits and state.directions:
        fresh, state = state.directions[0], _lent(state, method.magnitude)
    if method.contrasts and state.inputs:
        fresh = contrasting(fresh, _moments(model, state, learner, rows, list(shapes)), state.inputs)
        settings = replace(settings, learns_rows=False)
    with DirectionWeights(model, state, fresh, method.magnitude, settings) as weights:
        groups = [
            {"params": [*weights.factors(), *learner.parameters()], "lr": method.learning_rate},
            {"params": [weights.magnitudes_A], "lr": method.magnitude_learning_rate or method.learning_rate},
        ]
        descend(groups, learner.loss, shuffled_batches(rows, method.batch_rows, seed), method)
        learned = weights.export()
    learned = learned if method.max_residual is None else distil(learned, method.max_residual, method.rest_rank)
    learned = replace(learned, classes={}, has_readout=False)
    if not method.contrasts:
        return replace(learned, inputs={})
    return remember(model, learned, learner, rows, list(shapes))


def _lent(state: Decoupled, magnitude: float) -> Decoupled:
    """Return the state with the first direction's magnitude reduced by `magnitude`."""
    return replace(state, magnitudes=(state.magnitudes[0] - magnitude, *state.magnitudes[1:]))


def remember(
    model: nn.Module, state: Decoupled, learner: Learner[AnyT], rows: Sequence[AnyT], modules: Sequence[str]
) -> Decoupled:
    """Return the state with the inputs of these rows added to its sketches. The model must be bare."""
    return replace(state, inputs=with_moments(state.inputs, _moments(model, state, learner, rows, modules)))


def _moments(
    model: nn.Module, state: Decoupled, learner: Learner[AnyT], rows: Sequence[AnyT], modules: Sequence[str]
) -> dict[str, Tensor]:
    with DirectionWeights(model, state):
        return input_moments(model, modules, learner.loss, rows)


def descend(
    groups: list[dict[str, Any]], loss_of: Callable[[list[AnyT]], Tensor], batches: Iterator[list[AnyT]], method: Method
) -> None:
    """Train parameter groups for `method.steps` steps, with a cosine learning rate and clipped gradients.

    Raises TrainingError if the loss becomes infinite or NaN.
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
