"""The fleet file: which base models and adapters there are, and how they are served, re-adapted and rolled out.

One TOML file, read once into frozen dataclasses. An unknown key, a wrong type or a value out of bounds is a
ConfigError that names the key. That the named files exist is checked by whoever opens them.
"""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from cluster.errors import ConfigError, InvalidRequestError, NotFoundError
from cluster.names import check_name

MIB = 1024**2
GIB = 1024**3
SQLITE = "sqlite:///"


def _valid_name(name: str) -> str:
    try:
        return check_name(name)
    except InvalidRequestError as error:
        raise ValueError(str(error)) from error


def _absolute_path(path: Path, info: ValidationInfo) -> Path:
    return info.context["folder"] / path if info.context else path


def _absolute_folder(folder: str, info: ValidationInfo) -> str:
    return str(_absolute_path(Path(folder), info))


def _absolute_blobs(url: str, info: ValidationInfo) -> str:
    return _absolute_folder(url, info) if "://" not in url else url


def _absolute_registry(url: str, info: ValidationInfo) -> str:
    if "://" not in url:
        raise ValueError(f"Not a database URL: {url!r}; a SQLite file is written sqlite:///registry.db")
    if not url.startswith(SQLITE):
        return url
    return f"{SQLITE}{_absolute_path(Path(url.removeprefix(SQLITE)), info)}"


Config = TypeVar("Config")
Name = Annotated[str, AfterValidator(_valid_name)]
FilePath = Annotated[Path, AfterValidator(_absolute_path)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass_transform(frozen_default=True)
def _frozen(cls: type[Config]) -> type[Config]:
    strict = ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast("type[Config]", dataclass(cls, frozen=True, config=strict))


@_frozen
class BaseSpec:
    """A base model: its name and its Hugging Face checkpoint folder."""

    name: Name
    path: FilePath


@_frozen
class AdapterSpec:
    """An adapter as it exists today, the base it was trained for, and the rows that say whether a new one is as good.

    `path` is a folder in PEFT's format. `data` holds train.jsonl, valid.jsonl and test.jsonl, or, where these are gone,
    logged prompts.jsonl. `traffic` is its share of requests, in any unit: campaigns take first what has most of it for
    each second that it is expected to take.
    """

    name: Name
    path: FilePath
    base: str
    data: FilePath
    metric: Literal["exact_match", "chrf"] = "exact_match"
    traffic: PositiveOrZero = 1.0


@_frozen
class ServingConfig:
    """One engine's limits and memory, and how many replicas of it there are.

    `max_overtakes` is K of the bound on waiting in `serving.engine.waiting`. `prefix_cache` says between whom KV of
    common prefixes is shared: all, requests of one tenant, or none. `first_token_deadline_s` is for requests that bring
    none. There, and in `max_queue_per_tenant`, 0 means no limit. `packed_bytes` bounds each machine's folder of packed
    adapters; with 0 none are kept there. `compiled_kernels` has the C++ kernels for CPUs compiled on first use, where
    there is a compiler and AVX-512. `swap_bytes` of host memory are for the KV of preempted requests; what finds no
    room there is computed anew.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "cpu"
    memory_bytes: Count = 256 * MIB
    page_tokens: Count = 16
    max_model_tokens: Count = 2048
    max_batch_tokens: Count = 512
    max_sequences: Count = 64
    max_queue: Count = 1024
    max_queue_per_tenant: CountOrZero = 0
    max_overtakes: Count = 64
    first_token_deadline_s: PositiveOrZero = 0.0
    prefix_cache: Literal["shared", "tenant", "off"] = "shared"
    adapter_load_timeout_s: Positive = 60.0
    max_rank: Count = 128
    host_cache_bytes: Count = GIB
    packed_bytes: CountOrZero = 8 * GIB
    swap_bytes: CountOrZero = 256 * MIB
    threads: Count = 1
    compiled_kernels: bool = True
    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Positive = 32.0
    cpus_per_replica: PositiveOrZero = 1.0
    gpus_per_replica: PositiveOrZero = 0.0


@_frozen
class SearchConfig:
    """The search of the fused initialisation alpha * T + beta * E_r: its budget, box and subset.

    `trials` candidates in rounds of `batch`, each round scored at once on `subset_rows` held-out rows. `groups` gives
    groups of modules an (alpha, beta) of their own: by kind (attention, MLP) or by third of the depth. `rank` says what
    is scored: the fused adapter as it ships ("serving"), or before it is cut to its rank ("uncut"). `refine_steps`
    steps of gradient descent on one (alpha, beta) for each module may follow. `concurrency` rounds run side by side
    where they take longer than a process takes to start: shorter ones are all done by the first (see `readapt.on_ray`).
    """

    trials: Count = 16
    batch: Count = 8
    subset_rows: Count = 48
    concurrency: Count = 1
    groups: Literal["all", "kind", "depth", "kind+depth"] = "all"
    rank: Literal["uncut", "serving"] = "serving"
    refine_steps: CountOrZero = 0
    alpha_max: Positive = 1.5
    beta_min: float = -1.0
    beta_max: float = 1.0
    evolution_rank: Count = 64
    evolution_energy: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: CountOrZero = 0


@_frozen
class TrainConfig:
    """The fine-tuning after the initialisation: budgets in optimiser steps, and the two-phase pull on the weights.

    What is evaluated and shipped is a moving average of the weights, to which each step leaves the share `averaging` of
    the average before it: it lies steady where single steps, at a rate that recovers fast, throw the weights about.
    """

    short_steps: Count = 60
    full_steps: Count = 200
    eval_every: Count = 20
    batch_rows: Count = 16
    learning_rate: Positive = 1e-3
    scratch_learning_rate: Positive = 3e-3
    anchor: Literal["init", "old", "zero"] = "init"
    pull_strong: PositiveOrZero = 0.05
    pull_weak: PositiveOrZero = 0.005
    strong_fraction: Share = 0.3
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.9
    max_tokens: Count = 256
    scratch_steps: Count = 600
    seed: CountOrZero = 0


TRANSPLANT_RANKS = ("rank", "wide_rank")


@_frozen
class TransplantConfig:
    """The functional transplant: how many training rows it is fitted on, and how.

    As many as come to `tokens_per_width` tokens for each unit of the model's width, at most `rows`. Each module gets
    the smallest rank that holds `energy` of its map, from the old adapter's up to `rank`. One that misses the gate by
    far is made again on twice the tokens, with ranks up to `wide_rank`, where this is higher. Neither may lie above
    `serving.max_rank`; where they are not given, they are not. `ridge` is the penalty as a share of the inputs' mean
    square; it pulls to the old adapter, or to nothing.
    `match_stream` and `map_head` let it mend the residual stream, and allow for the new head; there to be measured.
    """

    rows: Count = 1024
    tokens_per_width: Positive = 12.0
    rank: Count = 64
    wide_rank: Count = 128
    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    ridge: Annotated[float, Field(ge=1e-5)] = 3e-2
    centre: Literal["old", "zero"] = "old"
    match_stream: bool = True
    map_head: bool = True

    def widened(self) -> "TransplantConfig":
        """As it is made again after a miss by far."""
        wider = {"rank": self.wide_rank, "tokens_per_width": 2 * self.tokens_per_width}
        return TransplantConfig(**{**vars(self), **wider})


@_frozen
class LadderConfig:
    """Which rungs are tried, in the given order, and when the climb ends: at the first that passes, or with the budget.

    "copy", "transplant" and "fused" are starts; "train", after them, goes on from the best; "scratch" begins anew.
    Bases whose weights have a cosine below `min_cosine` are taken for unrelated: then only "scratch" is tried, if
    allowed. Below `copy_cosine` (0.999 is a relative change of 4.5 %) the transplant is tried before the copy.
    """

    rungs: tuple[Literal["copy", "transplant", "fused", "train", "scratch"], ...] = (
        "copy",
        "transplant",
        "train",
        "scratch",
    )
    stop: Literal["ready", "budget"] = "ready"
    min_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.1
    copy_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.999


@_frozen
class GateConfig:
    """How many points of its metric (0 to 100) a new version may lose against the old one on the old base.

    `tolerance_points` always; where training from scratch cannot reach that on the new base either, what scratch
    reaches is asked for instead, but no more than `max_drop_points` are given away so; nor may a stage of continual
    learning cost an earlier one more. `agreement_points` is the tolerance where there are no true answers and the old
    service's own are what counts. An evaluation that is going to fail is given up early: wrongly with a chance of at
    most 1 - `confidence` (a few times that where chrF is very uneven). Passing needs all rows.
    """

    tolerance_points: PositiveOrZero = 1.0
    max_drop_points: PositiveOrZero = 5.0
    agreement_points: PositiveOrZero = 5.0
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.999


@_frozen
class WorkersConfig:
    """The processes that re-adapt.

    `pack` is the number of adapters that a worker trains at once. On a CPU more than 1 pays only where batches are of a
    few rows; on a GPU, which a small batch leaves idle, it is meant to be large. Beside the workers, a search for the
    fused rung takes `gpus_per_worker` GPUs of its own.
    """

    num_workers: Count = 1
    pack: Count = 1
    cpus_per_worker: PositiveOrZero = 1.0
    gpus_per_worker: PositiveOrZero = 0.0


@_frozen
class ReadaptConfig:
    """How an adapter is carried from one base to the next."""

    ladder: LadderConfig = LadderConfig()
    search: SearchConfig = SearchConfig()
    transplant: TransplantConfig = TransplantConfig()
    train: TrainConfig = TrainConfig()
    gate: GateConfig = GateConfig()
    workers: WorkersConfig = WorkersConfig()


@_frozen
class RolloutConfig:
    """How a new version takes over the traffic: a canary's share of requests and how long it has to hold."""

    canary_share: Share = 0.2
    canary_s: PositiveOrZero = 3.0
    golden_prompts: Count = 4
    poll_s: Positive = 0.5


@_frozen
class Fleet:
    """The whole fleet file. `folder` is where it lies; all paths and local URLs in it are absolute once loaded.

    In `packed`, on each machine, engines keep adapters as they map them into memory.
    """

    name: Name
    folder: Path
    registry: Annotated[str, AfterValidator(_absolute_registry), Field(validate_default=True)] = "sqlite:///registry.db"
    blobs: Annotated[str, AfterValidator(_absolute_blobs), Field(validate_default=True)] = "blobs"
    packed: Annotated[str, AfterValidator(_absolute_folder), Field(validate_default=True)] = ".cache/packed"
    bases: tuple[BaseSpec, ...] = ()
    adapters: tuple[AdapterSpec, ...] = ()
    serving: ServingConfig = ServingConfig()
    readapt: ReadaptConfig = ReadaptConfig()
    rollout: RolloutConfig = RolloutConfig()

    def base(self, name: str) -> BaseSpec:
        """Return the base model of that name, or raise NotFoundError that lists those that exist."""
        for spec in self.bases:
            if spec.name == name:
                return spec
        raise NotFoundError(f"No base model {name!r} in fleet {self.name!r}; it has: {_listed(self.bases)}.")


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file; ConfigError names the file, and every bad key with what is wrong with it."""
    raw = _read_toml(path)
    folder = path.absolute().parent
    faults = ["folder: Unexpected keyword argument"] if "folder" in raw else []
    try:
        # By way of JSON, whose strict mode takes arrays for tuples and strings for paths, but no "16" for a number.
        text = json.dumps({**_with_ranks(raw), "folder": str(folder)}, default=str)
        fleet = TypeAdapter(Fleet).validate_json(text, strict=True, context={"folder": folder})
        faults += _contradictions(fleet)
    except ValidationError as error:
        faults += [_described(fault) for fault in error.errors()]
    if faults:
        raise ConfigError("\n".join(f"{path.name}: {fault}" for fault in faults))
    return fleet


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError, which says the line, or text that is not UTF-8
        raise ConfigError(f"{path.name}: not valid TOML: {error}") from error


def _with_ranks(raw: dict[str, Any]) -> dict[str, Any]:
    """The file's values with the transplant's ranks that it leaves open, where the engines take lower ones only."""
    match {"readapt": {}} | raw:
        case {"serving": {"max_rank": int(limit)}, "readapt": dict(readapt)} if limit > 0:
            defaults = TransplantConfig()
            ranks = {key: min(getattr(defaults, key), limit) for key in TRANSPLANT_RANKS}
            given = readapt.get("transplant", {})
            return {
                **raw,
                "readapt": {**readapt, "transplant": {**ranks, **given} if isinstance(given, dict) else given},
            }
    return raw  # the default limit, or a fault that is yet to be found


def _described(fault: ErrorDetails) -> str:
    keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"])
    return f"{keys.removeprefix('.')}: {fault['msg'].removeprefix('Value error, ')}"


def _contradictions(fleet: Fleet) -> Iterator[str]:
    """Faults that no key has on its own."""
    yield from _name_clashes(fleet)
    bases = {base.name for base in fleet.bases}
    for i, adapter in enumerate(fleet.adapters):
        if adapter.base not in bases:
            yield f"adapters[{i}].base: no base {adapter.base!r} among: {_listed(fleet.bases)}"
    if fleet.serving.max_replicas < fleet.serving.min_replicas:
        yield "serving.max_replicas: Input should be at least serving.min_replicas"
    yield from _impossible_rungs(fleet.readapt.ladder.rungs)
    for key in TRANSPLANT_RANKS if "transplant" in fleet.readapt.ladder.rungs else ():
        if getattr(fleet.readapt.transplant, key) > fleet.serving.max_rank:
            yield f"readapt.transplant.{key}: Input should be at most serving.max_rank, or the result cannot be served"
    if fleet.readapt.search.beta_max <= fleet.readapt.search.beta_min:
        yield "readapt.search.beta_max: Input should be greater than readapt.search.beta_min"


def _impossible_rungs(rungs: tuple[str, ...]) -> Iterator[str]:
    if not rungs:
        yield "readapt.ladder.rungs: Input should have at least one rung"
    if len(set(rungs)) < len(rungs):
        yield "readapt.ladder.rungs: Input should name no rung twice"
    if "train" in rungs and {"copy", "transplant", "fused"}.isdisjoint(rungs[: rungs.index("train")]):
        yield "readapt.ladder.rungs: 'train' should come after a start to train from: copy, transplant or fused"


def _name_clashes(fleet: Fleet) -> Iterator[str]:
    """Bases and adapters share one space of names, because a request's `model` may be either."""
    entries = [(f"bases[{i}].name", base.name) for i, base in enumerate(fleet.bases)]
    entries += [(f"adapters[{i}].name", adapter.name) for i, adapter in enumerate(fleet.adapters)]
    first: dict[str, str] = {}
    for key, name in entries:
        if name in first:
            yield f"{key}: {name!r} is already the name of {first[name].removesuffix('.name')}"
        first.setdefault(name, key)


def _listed(specs: tuple[BaseSpec, ...]) -> str:
    return ", ".join(spec.name for spec in specs) or "none"
