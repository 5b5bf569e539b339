"""The arms of the continual benchmark: ways to learn a stream of stages.

means              no training; the classes of an encoder are the means of their rows
sequential         one LoRA, fine-tuned on one stage after the other over all classes so far, with a linear classifier
sequential_means   the same with the method's classifier
sequential_masked  the same with the method's classifier and its loss, which leaves older classes alone
method             SD-LoRA as in the paper (arXiv 2501.13198), except that an encoder's classes start at their means
method_linear      SD-LoRA with the paper's linear classifier
released_code      SD-LoRA as its authors' code: other norms, no normalisation in training, reset magnitudes, SGD
contrast           ours: the method, with new directions that respond to new inputs (see `moments`)
recall             ours: the first stage trains the features, later ones the last layer on statistics (see `recall`)
rank_reduction     the method, with lower ranks for later stages
distillation       the method, with directions that start as the first one and keep only what older ones lack
oracle             one LoRA per stage, and every test row names its stage
joint              one LoRA on all stages at once
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from bench.continual.subjects import Subject
from readapt.continual.directions import Decoupled, DirectionSettings, DirectionWeights, fold
from readapt.continual.learn import Method, Recall, contrast, descend, distilling, learn_stage, recalling, released_code
from readapt.continual.recall import recall_stage
from readapt.training.data import shuffled_batches
from readapt.training.lora import blank

PLAIN = DirectionSettings(is_fresh_unit=False)


@dataclass
class Course:
    """The result of an arm, which fills it in. `matrix` has the accuracies on all stages so far, after each stage."""

    matrix: list[list[dict[str, float]]] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0
    directions: int = 0
    moments: int = 0  # statistics kept for later stages, in values; not served

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to the training time."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def scores(self, sizes: Sequence[int]) -> dict[str, float]:
        """Return accuracies weighted by rows, and forgetting: the mean drop from the best accuracy of each stage."""
        scores: dict[str, float] = {}
        for way in self.matrix[-1][0]:
            rows = [[point[way] for point in row] for row in self.matrix]
            after = [sum(a * n for a, n in zip(row, sizes, strict=False)) / sum(sizes[: len(row)]) for row in rows]
            drops = [max(row[j] for row in rows if j < len(row)) - rows[-1][j] for j in range(len(rows[-1]) - 1)]
            ending = "" if way == "accuracy" else f"_{way}"
            scores[f"accuracy_final{ending}"] = after[-1]
            scores[f"accuracy_average{ending}"] = sum(after) / len(after)
            scores[f"forgetting{ending}"] = sum(drops) / max(1, len(drops))
        return scores


@dataclass(frozen=True)
class Settings:
    """The settings of the method for one subject, and those of its variants.

    `recall_learning_rate` is the rate of recall's first stage.
    """

    method: Method
    ranks: tuple[tuple[int, int], ...]
    max_residual: float
    rest_rank: int
    plain_learning_rate: float
    recall: Recall = field(default_factory=Recall)
    recall_learning_rate: float = 1e-3

    @property
    def rank(self) -> int:
        """The rank of every plain LoRA, which is that of the method's first direction."""
        return self.method.rank_of(0)


def run_arm(name: str, subject: Subject, num_stages: int, settings: Settings, seed: int) -> Course:
    """Run one arm over the stream. The subject cannot be used again."""
    stages = range(num_stages)
    variants = {
        "method": settings.method,
        "method_linear": settings.method,
        "released_code": released_code(settings.method),
        "contrast": contrast(settings.method),
        "rank_reduction": replace(settings.method, ranks=settings.ranks),
        "recall": replace(recalling(settings.method, settings.recall), learning_rate=settings.recall_learning_rate),
        "distillation": distilling(settings.method, settings.max_residual, settings.rest_rank),
    }
    if name in variants:
        return _directions(subject, stages, variants[name], seed)
    arms: dict[str, Callable[[], Course]] = {
        "means": lambda: _means(subject, stages),
        "sequential": lambda: _sequential(subject, stages, settings, seed, is_plain=True),
        "sequential_means": lambda: _sequential(subject, stages, settings, seed, is_plain=True),
        "sequential_masked": lambda: _sequential(subject, stages, settings, seed, is_plain=False),
        "oracle": lambda: _oracle(subject, stages, settings, seed),
        "joint": lambda: _joint(subject, stages, settings, seed),
    }
    return arms[name]()


def _means(subject: Subject, stages: Sequence[int]) -> Course:
    course = Course()
    for stage in stages:
        with course.timed():
            subject.enter([stage], is_plain=False)
        _examine(course, subject, stage)
    return course


def _directions(subject: Subject, stages: Sequence[int], method: Method, seed: int) -> Course:
    course, state = Course(), Decoupled()
    for stage in stages:
        with course.timed():
            with DirectionWeights(subject.model, state):
                learner = subject.enter([stage], is_plain=False)
            learn = recall_stage if method.recall else learn_stage
            state = learn(
                subject.model,
                state,
                learner,
                subject.rows(stage),
                method,
                shapes=subject.shapes,
                stage=stage,
                seed=seed * 1000 + stage,
            )
        with DirectionWeights(subject.model, _served(state)):
            _examine(course, subject, stage)
    course.parameters, course.directions = state.num_parameters, len(state.directions)
    course.moments = sum(kept.numel() for kept in (*state.inputs.values(), *state.classes.values()))
    return course


def _served(state: Decoupled) -> Decoupled:
    """Return the state as one ordinary adapter, as it is served."""
    return Decoupled((fold(state),), (1.0,)) if state.directions else state


def _sequential(subject: Subject, stages: Sequence[int], settings: Settings, seed: int, *, is_plain: bool) -> Course:
    course = Course()
    with _plain_lora(subject, settings, seed) as weights:
        for stage in stages:
            with course.timed():
                learner = subject.enter([stage], is_plain=is_plain)
                _fit(weights, learner, subject.rows(stage), settings, settings.method.steps, seed * 1000 + stage)
            _examine(course, subject, stage)
        course.parameters = _size(weights)
    return course


def _joint(subject: Subject, stages: Sequence[int], settings: Settings, seed: int) -> Course:
    course = Course()
    rows = [row for stage in stages for row in subject.rows(stage)]
    with _plain_lora(subject, settings, seed) as weights:
        with course.timed():
            learner = subject.enter(stages, is_plain=True)
            _fit(weights, learner, rows, settings, settings.method.steps * len(stages), seed)
        _examine(course, subject, stages[-1])
        course.parameters = _size(weights)
    return course


def _oracle(subject: Subject, stages: Sequence[int], settings: Settings, seed: int) -> Course:
    course, answers = Course(), []
    for stage in stages:
        with _plain_lora(subject, settings, seed) as weights:
            with course.timed():
                learner = subject.enter([stage], is_plain=False)
                _fit(weights, learner, subject.rows(stage), settings, settings.method.steps, seed * 1000 + stage)
            answers.append(subject.accuracies(stage, knows_stage=True))
            course.parameters += _size(weights)
    course.matrix = [answers[: stage + 1] for stage in stages]
    return course


def _fit(weights: DirectionWeights, learner: Any, rows: list[Any], settings: Settings, steps: int, seed: int) -> None:
    method = replace(settings.method, steps=steps)
    groups = [{"params": [*weights.factors(), *learner.parameters()], "lr": settings.plain_learning_rate}]
    descend(groups, learner.loss, shuffled_batches(rows, method.batch_rows, seed), method)


def _examine(course: Course, subject: Subject, stage: int) -> None:
    course.matrix.append([subject.accuracies(seen) for seen in range(stage + 1)])


def _size(weights: DirectionWeights) -> int:
    return sum(parameter.numel() for parameter in weights.factors())


def _plain_lora(subject: Subject, settings: Settings, seed: int) -> DirectionWeights:
    """Return an ordinary LoRA (alpha = 2 rank): a fresh direction without normalisation and with a fixed magnitude."""
    fresh = blank(subject.shapes, settings.rank, alpha=settings.rank, seed=seed)
    return DirectionWeights(subject.model, Decoupled(), fresh, 2.0, PLAIN)
