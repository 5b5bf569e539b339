"""The demo's world: two base models, tasks and their specialists, made from nothing in one folder with a fleet file.

    FOLDER/bases/v1, bases/v2     Hugging Face checkpoints; v2 is v1 trained further on other text
    FOLDER/tasks/NAME/            train.jsonl, valid.jsonl, test.jsonl
    FOLDER/adapters/NAME/         the task's specialist, trained on v1, in PEFT's format
    FOLDER/fleet.toml             ties them together
    FOLDER/world.json             written last: the hash of the recipe, which marks a finished world

On one machine the same recipe gives the same files, for any number of cores: every computation is single-threaded, and
gradients are summed in a fixed order.
"""

import hashlib
import inspect
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from cluster.errors import ConfigError
from cluster.storage.blobs import content_hash
from cluster.storage.checkpoints import open_checkpoint
from demo import corpus, lexicon, pretrain, specialists, tasks
from demo.pretrain import BaseShape, Pretraining, Texts, train_base
from demo.specialists import Specialist, single_threaded, train_all

OLD, NEW = "v1", "v2"
Progress = Callable[[str, float], None]  # what is being made, and which share of it is done (0 to 1)


@dataclass(frozen=True)
class Recipe:
    """Everything that a world depends on. `readapt` goes into [readapt.train] of fleet.toml.

    `gate_points` is tolerance_points of [readapt.gate]. The demo promises one point on test rows. The gate has only
    some hundred rows, and the tasks are easy, so it asks for more than that.
    """

    title: str
    shape: BaseShape
    v1: Pretraining
    v2: Pretraining
    tasks: tuple[str, ...]
    num_chars: int = 1_000_000
    specialist_steps: int = 400
    rows: dict[str, int] = field(default_factory=lambda: {"train": 3000, "valid": 848, "test": 800})
    readapt: dict[str, float] = field(default_factory=lambda: {"max_tokens": 128})
    gate_points: float = 0.5
    seed: int = 0


FULL = Recipe(
    title="made from nothing",
    shape=BaseShape(),
    v1=Pretraining(steps=400, learning_rate=4e-3, rows=(12, 4, 0)),
    v2=Pretraining(steps=300, learning_rate=2e-3, rows=(2, 0, 14), seed=1),
    tasks=("intent", "sentiment", "describe", "topic", "question", "support", "place", "device"),
)
QUICK = Recipe(
    title="made from nothing, quick",
    shape=BaseShape(hidden_size=96, intermediate_size=264),
    v1=Pretraining(steps=320, learning_rate=4e-3, rows=(12, 4, 0)),
    v2=Pretraining(steps=200, learning_rate=2.5e-3, rows=(2, 0, 14), seed=1),
    tasks=("sentiment", "describe", "question", "support"),
    specialist_steps=320,
    rows={"train": 3000, "valid": 448, "test": 400},
)
_RECIPES = {"full": FULL, "quick": QUICK}
RUNGS = ("copy", "fused", "transplant", "train", "scratch")  # all rungs: the demo shows each at work
_MARK = "# Written by `relora demo`, which deletes the folder of an earlier run.\n"
_KIT_BUDGETS = {"clinc150": (800, 24)}  # tasks that need more than 300 steps of 16 rows


@dataclass(frozen=True)
class WorldInfo:
    """A finished world. `title` describes it in a few words, and `bases` has the keys OLD and NEW.

    `data` has one folder per spec. `quality_v1` is the quality of each specialist on v1, in points on the task's first
    valid rows. `train` and `gate` go into [readapt.train] and [readapt.gate] of the fleet file.
    """

    folder: Path
    title: str
    bases: dict[str, Path]
    data: Path
    specs: tuple[Specialist, ...]
    train: dict[str, float]
    gate: dict[str, float]
    quality_v1: dict[str, float]
    is_reused: bool

    @property
    def fleet(self) -> Path:
        """The world's fleet file."""
        return self.folder / "fleet.toml"

    def new_run(self, folder: Path) -> Path:
        """Write this world's fleet file, with a free port, into a fresh `folder` and return its path.

        A run has its own folder for registry and blobs, so the world itself never changes. If `folder` is that of an
        earlier run, it is deleted. ConfigError if it holds anything else.
        """
        path = folder / "fleet.toml"
        if folder.exists():
            if not path.is_file() or not path.read_text(encoding="utf-8").startswith(_MARK):
                raise ConfigError(f"{folder} exists and is not an earlier run's folder: choose another folder.")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return self.write_fleet(path, {"port": free_port()})

    def write_fleet(self, path: Path, serving: Mapping[str, float] = MappingProxyType({})) -> Path:
        """Write a fleet file of this world to `path`, with `serving` as its [serving] table."""
        tables = [_table("[[bases]]", {"name": name, "path": base}) for name, base in self.bases.items()]
        tables += [_table("[[adapters]]", self._adapter(index, spec)) for index, spec in enumerate(self.specs)]
        tables += [_table("[serving]", serving), _table("[readapt.train]", self.train)]
        tables += [
            _table("[readapt.ladder]", {"rungs": RUNGS, "copy_cosine": -1.0}),
            _table("[readapt.gate]", self.gate),
        ]
        tables += [_table("[readapt.workers]", {"num_workers": max(1, (os.cpu_count() or 1) // 2)})]
        path.write_text("\n".join([_MARK, 'name = "demo"\n', *tables]), encoding="utf-8")
        return path

    def _adapter(self, index: int, spec: Specialist) -> dict[str, object]:
        return {
            "name": spec.name,
            "path": self.folder / "adapters" / spec.name,
            "base": OLD,
            "data": self.data / spec.name,
            "metric": spec.metric,
            "traffic": round(1 / (index + 1), 3),  # a few adapters take most requests, as in real fleets
        }


def _table(header: str, values: Mapping[str, object]) -> str:
    lines = [f"{key} = {json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in values.items()]
    return "\n".join([header, *lines, ""])


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_world(folder: Path, size: Literal["full", "quick"], progress: Progress) -> WorldInfo:
    """Make the demo's world in `folder`, or reuse it if the folder already holds one with the same recipe."""
    return build(folder, _RECIPES[size], progress)


def build(folder: Path, recipe: Recipe, progress: Progress) -> WorldInfo:
    """Make the world of any recipe, or reuse it. `make_world` has the demo's two recipes."""
    folder = folder.absolute()
    chosen = [task for task in tasks.TASKS if task.name in recipe.tasks]
    bases = {OLD: folder / "bases" / OLD, NEW: folder / "bases" / NEW}
    specs = tuple(_specialist(task, recipe) for task in chosen)
    gate = {"tolerance_points": recipe.gate_points}
    info = WorldInfo(folder, recipe.title, bases, folder / "tasks", specs, recipe.readapt, gate, {}, is_reused=False)
    key = _key(asdict(recipe))
    if reused := _finished(info, key):
        return reused
    for task in chosen:
        tasks.write_rows(info.data / task.name, tasks.make_rows(task, recipe.rows, recipe.seed))
    with single_threaded():
        qualities = _train(info, recipe, progress)
    return _finish(info, key, qualities)


def _train(info: WorldInfo, recipe: Recipe, progress: Progress) -> dict[str, float]:
    v1 = info.bases[OLD]
    v2 = info.bases[NEW]
    texts = Texts.make(recipe.shape.vocab_size, recipe.seed, recipe.num_chars)
    train_base(None, v1, texts, recipe.shape, recipe.v1, lambda share: progress("base v1", share))
    return train_all(
        info.specs,
        base=v1,
        data=info.data,
        target=info.folder / "adapters",
        progress=lambda share: progress("adapters", share),
        meanwhile=lambda: train_base(v1, v2, texts, recipe.shape, recipe.v2, lambda s: progress("base v2", s)),
    )


def _specialist(task: tasks.Task, recipe: Recipe) -> Specialist:
    return Specialist(
        name=task.name,
        metric=task.metric,
        rank=task.rank,
        alpha=float(task.rank) if task.is_rslora else 2.0 * task.rank,
        is_rslora=task.is_rslora,
        modules=task.modules,
        steps=recipe.specialist_steps,
        max_tokens=recipe.shape.context_tokens,
        seed=recipe.seed,
    )


def kit_world(folder: Path, kit: Path, names: Sequence[str], progress: Progress) -> WorldInfo:
    """Make a world of real models and tasks: train the specialists of the named tasks into `folder`. Nothing is copied.

    `kit` holds models/stories3m-v1, models/stories3m-v2-strong and tasks/NAME. ConfigError if one of them is missing.
    """
    folder = folder.absolute()
    kit = kit.absolute()
    bases = {OLD: kit / "models" / "stories3m-v1", NEW: kit / "models" / "stories3m-v2-strong"}
    missing = [str(path) for path in (*bases.values(), *(kit / "tasks" / name for name in names)) if not path.is_dir()]
    if missing:
        raise ConfigError(f"The kit {kit} lacks these folders: {', '.join(missing)}")
    specs = tuple(_kit_specialist(kit / "tasks" / name) for name in names)
    info = WorldInfo(folder, "real models and tasks", bases, kit / "tasks", specs, {}, {}, {}, is_reused=False)
    inputs = [open_checkpoint(bases[OLD]).fingerprint(), *(content_hash(info.data / name) for name in names)]
    key = _key({"inputs": inputs, "specs": [asdict(spec) for spec in specs]})
    if reused := _finished(info, key):
        return reused
    with single_threaded():
        target = folder / "adapters"
        qualities = train_all(specs, bases[OLD], info.data, target, lambda share: progress("adapters", share))
    return _finish(info, key, qualities)


def _kit_specialist(data: Path) -> Specialist:
    kind = json.loads((data / "task.json").read_text(encoding="utf-8"))["kind"]
    steps, batch_rows = _KIT_BUDGETS.get(data.name, (300, 16))
    return Specialist(data.name, "chrf" if kind == "generation" else "exact_match", steps=steps, batch_rows=batch_rows)


def _key(recipe: object) -> str:
    """Return a hash of a recipe, of the code that follows it, and of the Python and torch versions."""
    sources = [inspect.getsource(module) for module in (corpus, lexicon, pretrain, specialists, tasks)]
    versions = [platform.python_version(), torch.__version__]
    return hashlib.sha256(json.dumps([recipe, sources, versions], sort_keys=True).encode()).hexdigest()


def _finished(info: WorldInfo, key: str) -> WorldInfo | None:
    file = info.folder / "world.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if record.get("key") == key:
        info.write_fleet(info.fleet)  # again, because the folder may have been moved
        return replace(info, quality_v1=record["quality_v1"], is_reused=True)
    file.unlink(missing_ok=True)  # the folder is about to change
    return None


def _finish(info: WorldInfo, key: str, quality_v1: dict[str, float]) -> WorldInfo:
    info.write_fleet(info.fleet)
    text = json.dumps({"key": key, "quality_v1": quality_v1}, indent=1)
    (info.folder / "world.json").write_text(text, encoding="utf-8")
    return replace(info, quality_v1=quality_v1)
