"""One adapter's training run: its settings, its learning curve and its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.adapters.files import Adapter
from cluster.errors import ReloraError, TrainingError
from readapt.training.data import Encoded
from readapt.training.evaluate import Evaluation, Verdict

GROWTH_AFTER = 16  # evaluation intervals before they double for the first time


class BrokenRunError(TrainingError):
    """The loss is no longer finite. `kept` is what the run had reached before that."""

    def __init__(self, message: str, kept: "TrainingResult"):
        super().__init__(message, kept)
        self.kept = kept

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RunSettings:
    """How a run trains, and when it is evaluated.

    `anchor` is the adapter that the pull goes to; None is the run's own start. With `runs_on`, a run that is ready to
    ship still takes all its steps. `averaging` is the decay per step of the moving average of the weights. The average
    is what is evaluated and kept; 0 means the weights themselves.

    A run is evaluated before its first step, after its last, and every `eval_every` steps between them. The interval
    doubles after `GROWTH_AFTER` intervals, and again each time the run is twice as long: the longer a run, the less
    there is to miss between two evaluations.
    """

    steps: int
    learning_rate: float
    batch_rows: int = 16
    eval_every: int = 20
    warmup_steps: int = 0
    pull_strong: float = 0.0
    pull_weak: float = 0.0
    strong_fraction: float = 0.0
    anchor: Adapter | None = None
    seed: int = 0
    runs_on: bool = False
    averaging: float = 0.0

    def is_due(self, step: int) -> bool:
        """Return whether the run is evaluated after `step` steps."""
        doublings = (step // (self.eval_every * GROWTH_AFTER)).bit_length()
        return step % (self.eval_every << doublings) == 0 or step == self.steps


@dataclass(frozen=True)
class CurvePoint:
    """A held-out evaluation after `step` steps, `seconds` after the start of the run (evaluations included)."""

    step: int
    seconds: float
    loss: float
    quality: float


@dataclass(frozen=True)
class TrainingResult:
    """What a run has reached.

    `best` is the best evaluated checkpoint, which may be the start; `last` has the weights at the end of the run.
    `ready` is the evaluation, with its checkpoint, at which the watcher first said READY. `verdict` is the watcher's
    last word.
    """

    curve: list[CurvePoint]
    best: Adapter
    best_evaluation: Evaluation
    best_step: int
    last: Adapter
    steps_done: int
    verdict: Verdict
    ready: tuple[CurvePoint, Adapter] | None

    @property
    def best_quality(self) -> float:
        """The quality of the best checkpoint: an estimate if its evaluation ended early."""
        return self.best_evaluation.quality

    @property
    def is_ready(self) -> bool:
        """Whether the watcher said READY at least once."""
        return self.ready is not None


def go_on(evaluation: Evaluation) -> Verdict:
    """Watch a run that always takes all its steps."""
    return Verdict.GO_ON


@dataclass(frozen=True)
class TrainingRun:
    """One adapter's run: train `start` on `rows` as `settings` say.

    `evaluate` is called when `settings` have it due, with only this adapter on the model. Then `report` gets the new
    point of the curve, and `watch` decides whether the run continues. `known` is the evaluation of the start, if there
    already is one.
    """

    start: Adapter
    rows: Sequence[Encoded]
    settings: RunSettings
    evaluate: Callable[[], Evaluation]
    watch: Callable[[Evaluation], Verdict] = go_on
    report: Callable[[CurvePoint], None] = lambda point: None
    known: Evaluation | None = None


RunError = ReloraError | RuntimeError  # torch raises RuntimeError for out of memory and for shapes that do not fit
