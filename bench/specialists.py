"""The tasks of the re-adaptation benchmark, and the specialists that are trained on them on the old base."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.facts import read_json
from cluster.adapters.files import Adapter, save_adapter
from cluster.storage.jsonl import write_lines
from readapt.ladder.relabel import PROMPTS
from readapt.training.data import Encoder, Row, Task, encoder_for, load_rows
from readapt.training.evaluate import Evaluator, Metric
from readapt.training.lora import blank, linear_shapes, load_base
from readapt.training.training_group import fine_tune
from readapt.training.training_run import RunSettings, TrainingRun

RANK, ALPHA = 8, 16.0
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.02


@dataclass(frozen=True)
class BenchTask:
    """One task of the kit and its budgets.

    A specialist trains for `specialist_steps` steps of `specialist_rows` rows, an arm for `steps` of `batch_rows`.
    `search_rows` and `gate_rows` are disjoint parts of the validation split. If that split is short, the last
    `moved_rows` training rows are added to it. Rows longer than `max_tokens` are left out. The data-free arm gets
    `num_prompts` prompts of the training rows.
    """

    name: str
    metric: Metric = "exact_match"
    steps: int = 200
    batch_rows: int = 16
    specialist_steps: int = 240
    specialist_rows: int = 16
    search_rows: int = 48
    gate_rows: int = 400
    test_rows: int = 500
    max_tokens: int = 256
    moved_rows: int = 0
    num_prompts: int = 1000

    @property
    def is_generation(self) -> bool:
        """Whether answers are free text."""
        return self.metric == "chrf"


TASKS = (
    BenchTask("clinc150", steps=600, specialist_steps=800, specialist_rows=24),
    BenchTask("snips"),
    BenchTask("trec"),
    BenchTask("subjectivity"),
    BenchTask("e2e", "chrf", 160, 8, 400, 12, 32, 200, 200, max_tokens=112, num_prompts=400),
    BenchTask("sql_geography", "chrf", 160, 8, 400, 12, 16, 64, 200, max_tokens=160, moved_rows=40, num_prompts=400),
)


def load_bench_task(task: BenchTask, kit: Path, encoder: Encoder) -> Task:
    """Return a task's distinct rows in a fixed random order, because some files are sorted by label."""
    folder = kit / "tasks" / task.name
    train, valid, test = (_fitting(load_rows(folder / f"{part}.jsonl"), encoder) for part in ("train", "valid", "test"))
    cut = len(train) - task.moved_rows
    valid = list(dict.fromkeys([*valid, *train[cut:]]))[: task.search_rows + task.gate_rows]
    return Task(train[:cut], valid, test[: task.test_rows])


def write_bench_task(task: BenchTask, kit: Path, base: Path, work: Path) -> Path:
    """Return the folder of a task's rows for a base's tokenizer. They are written unless they exist."""
    folder = work / "tasks" / f"{base.name}-{task.name}"
    record, wanted = folder / "facts.json", asdict(task)
    if read_json(record) != wanted:
        rows = load_bench_task(task, kit, encoder_for(base, task.max_tokens))
        prompts = [{"prompt": row.prompt} for row in rows.train[: task.num_prompts]]
        write_lines(folder / "logged" / PROMPTS, prompts)
        for part in fields(rows):
            write_lines(folder / f"{part.name}.jsonl", [asdict(row) for row in getattr(rows, part.name)])
        record.write_text(json.dumps(wanted))
    return folder


def _fitting(rows: Sequence[Row], encoder: Encoder) -> list[Row]:
    fitting = [row for row in dict.fromkeys(rows) if _num_tokens(row, encoder) <= encoder.max_tokens]
    return random.Random(0).sample(fitting, len(fitting))


def _num_tokens(row: Row, encoder: Encoder) -> int:
    answer = encoder.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    return len(encoder.encode_prompt(row.prompt)) + len(answer) + 1


def make_specialist(task: BenchTask, seed: int, base: Path, kit: Path, work: Path) -> Path:
    """Return the folder of the task's specialist on the old base. It is trained unless `work` has it."""
    folder = work / "specialists" / f"{base.name}-{task.name}-{seed}"
    record, wanted = folder / "facts.json", _recipe(task, seed)
    if read_json(record).get("recipe") != wanted:
        started = time.perf_counter()
        save_adapter(_train(task, seed, base, kit), folder)
        record.write_text(json.dumps({"recipe": wanted, "seconds": time.perf_counter() - started}))
    return folder


def _recipe(task: BenchTask, seed: int) -> dict[str, object]:
    keys = ("name", "specialist_steps", "specialist_rows", "max_tokens", "moved_rows")
    fixed = {"rank": RANK, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "seed": seed}
    return {key: asdict(task)[key] for key in keys} | fixed


def _train(task: BenchTask, seed: int, base: Path, kit: Path) -> Adapter:
    model, encoder = load_base(base), encoder_for(base, task.max_tokens)
    rows = load_bench_task(task, kit, encoder)
    steps = task.specialist_steps
    settings = RunSettings(
        steps,
        LEARNING_RATE,
        task.specialist_rows,
        eval_every=steps,
        warmup_steps=round(WARMUP_SHARE * steps),
        seed=seed,
    )
    evaluate = Evaluator(
        model, encoder, rows.valid[:64], "exact_match"
    )  # runs at the start and the end; its result is not used
    start = blank(linear_shapes(model), RANK, ALPHA, seed=seed)
    return fine_tune(model, TrainingRun(start, encoder.encode_all(rows.train), settings, evaluate)).last
