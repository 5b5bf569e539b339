"""The settings of a fleet. The string under a field is its comment in fleet.toml (see `cluster.config_reference`)."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.config_types import (
    BlobsUrl,
    Count,
    CountOrZero,
    FilePath,
    Folder,
    Name,
    Positive,
    PositiveOrZero,
    RegistryUrl,
    Share,
    frozen,
)
from cluster.errors import NotFoundError

MIB = 1024**2
GIB = 1024**3
Rung = Literal["copy", "transplant", "fused", "train", "scratch"]


@frozen
class BaseSpec:
    """Base models: Hugging Face checkpoint folders (config.json, safetensors, tokenizer)."""

    name: Name
    """What requests and adapters call it."""
    path: FilePath
    """The checkpoint folder."""


@frozen
class AdapterSpec:
    """The adapters as they are today, one table each."""

    name: Name
    """What requests call it. No base may have the same name."""
    path: FilePath
    """A folder in PEFT's format."""
    base: str
    """Name of the base that it was trained for."""
    data: FilePath
    """A folder with train.jsonl and valid.jsonl, or, if these are lost, with logged prompts.jsonl alone."""
    metric: Literal["exact_match", "chrf"] = "exact_match"
    """How to measure whether a new version is as good as the old one."""
    traffic: PositiveOrZero = 1.0
    """Its share of the requests, in any unit. A campaign starts with the most traffic per second of expected work."""


@frozen
class ServingConfig:
    """The limits and the memory of each engine, and the number of its replicas."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 to be reachable from other machines."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the weights and the KV cache."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    memory_bytes: Count = 256 * MIB
    """Size of the arena that KV cache and resident adapters share, per replica."""
    page_tokens: Count = 16
    """Tokens of KV cache in one page of the arena."""
    max_model_tokens: Count = 2048
    """Longest prompt plus output. The model's own limit applies if it is lower."""
    max_batch_tokens: Count = 512
    """Tokens in one step; longer prompts are split into chunks."""
    max_sequences: Count = 64
    """Sequences in one step."""
    max_queue: Count = 1024
    """Requests that may wait; more are refused with status 503."""
    max_queue_per_tenant: CountOrZero = 0
    """Requests of one API key that may wait; more are refused with status 429. 0: no limit."""
    max_overtakes: Count = 64
    """Requests that may overtake an adapter's first waiting request: K of the bound in `serving.engine.waiting`."""
    first_token_deadline_s: PositiveOrZero = 0.0
    """Refuse a request if its first token cannot come in time. A request may bring its own deadline. 0: no deadline."""
    prefix_cache: Literal["shared", "tenant", "off"] = "shared"
    """Which requests share the KV of common prefixes: all, those of one API key, or none."""
    adapter_load_timeout_s: Positive = 60.0
    """If fetching an adapter takes longer, the requests that wait for it fail."""
    max_rank: Count = 128
    """Adapters of a higher rank are refused."""
    host_cache_bytes: Count = GIB
    """Private host memory for adapters, per replica."""
    packed_bytes: CountOrZero = 8 * GIB
    """Size limit of each machine's `packed` folder; the least recently used adapters are deleted. 0: keep none."""
    swap_bytes: CountOrZero = 256 * MIB
    """Host memory for the KV of preempted requests. KV that does not fit is recomputed."""
    threads: Count = 1
    """CPU threads of one replica."""
    compiled_kernels: bool = True
    """Compile the C++ kernels for CPUs on first use, if the machine has a compiler and AVX-512."""
    min_replicas: Count = 1
    """Fewest replicas per base model."""
    max_replicas: Count = 1
    """Most replicas per base model."""
    target_ongoing_requests: Positive = 32.0
    """Requests in flight per replica that autoscaling aims at."""
    cpus_per_replica: PositiveOrZero = 1.0
    """CPUs that Ray reserves for one replica."""
    gpus_per_replica: PositiveOrZero = 0.0
    """GPUs that Ray reserves for one replica."""


@frozen
class LadderConfig:
    """Re-adaptation: the ladder of rungs, cheapest first."""

    rungs: tuple[Rung, ...] = ("copy", "transplant", "train", "scratch")
    """The rungs in the order in which they are tried: copy, transplant, fused, train, scratch, each at most once.
    "train" continues from the best start: copy, transplant, fused. ReLoRA as published: copy, fused, train, scratch."""
    stop: Literal["ready", "budget"] = "ready"
    """Stop at the first version that passes the gate, or when the training budget is spent."""
    min_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.1
    """Bases whose weights have a lower cosine are unrelated: only "scratch" is tried, if `rungs` has it."""
    copy_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.999
    """Bases with a lower cosine try the transplant before the copy. 0.999 is a relative change of 4.5 %."""


@frozen
class TransplantConfig:
    """The functional transplant: a closed-form adapter that reproduces the old service on the task's rows."""

    rows: Count = 1024
    """Most training rows to fit it on."""
    tokens_per_width: Positive = 12.0
    """Use as many rows as give this many tokens per unit of the model's width."""
    rank: Count | None = None
    """Highest rank of a module, unless the old adapter's is higher. Default: 64, or `serving.max_rank` if lower."""
    wide_rank: Count | None = None
    """Highest rank of the second transplant (twice the tokens, after a far miss). Default: 128, limited as `rank`."""
    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of a module's map to keep. A module gets the smallest such rank, from the old adapter's up to `rank`."""
    ridge: Annotated[float, Field(ge=1e-5)] = 3e-2
    """Ridge penalty, as a share of the inputs' mean square."""
    centre: Literal["old", "zero"] = "old"
    """What the penalty pulls to: the old adapter or zero."""
    match_stream: bool = True
    """Also correct the residual stream, not only the output of each module."""
    map_head: bool = True
    """Aim at the old logits through the new head."""

    @property
    def ranks(self) -> tuple[int, int]:
        """The highest ranks of the first and of the second transplant, with the defaults filled in."""
        return self.rank or 64, self.wide_rank or 128

    def widened(self) -> "TransplantConfig":
        """Return the settings of the second transplant."""
        return replace(self, rank=self.ranks[1], tokens_per_width=2 * self.tokens_per_width)


@frozen
class SearchConfig:
    """The fused start: a search of the initialisation alpha * T + beta * E_r."""

    trials: Count = 16
    """Candidates per adapter."""
    batch: Count = 8
    """Candidates of one round, which are scored together."""
    subset_rows: Count = 48
    """Held-out rows on which a candidate's loss is measured."""
    concurrency: Count = 1
    """Rounds at the same time. More than 1 helps only if a round takes longer than the start of a process."""
    groups: Literal["all", "kind", "depth", "kind+depth"] = "all"
    """Modules that share one (alpha, beta): all, those of a kind (attention, MLP), of a third of the depth, or both."""
    rank: Literal["uncut", "serving"] = "serving"
    """Score candidates as they are served, or before they are cut to their rank."""
    refine_steps: CountOrZero = 0
    """Gradient steps after the search, on one (alpha, beta) per module."""
    alpha_max: Positive = 1.5
    """alpha, the weight of the old adapter T, is searched in [0, alpha_max]."""
    beta_min: float = -1.0
    """beta, the weight of the base's evolution E_r, is searched in [beta_min, beta_max]."""
    beta_max: float = 1.0
    """See beta_min."""
    evolution_rank: Count = 64
    """Highest rank of E_r in any module."""
    evolution_energy: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the squared norm of E that E_r keeps, if `evolution_rank` allows."""
    seed: CountOrZero = 0
    """Random seed of the search."""


@frozen
class TrainConfig:
    """Fine-tuning from the best start, with a pull on the weights that is strong at first and weak later."""

    short_steps: Count = 60
    """Optimiser steps of the short rung."""
    full_steps: Count = 200
    """Optimiser steps of the full rung."""
    eval_every: Count = 20
    """Steps between evaluations; the interval grows in long runs."""
    batch_rows: Count = 16
    """Rows of one batch."""
    learning_rate: Positive = 1e-3
    """Learning rate of the short and the full rung."""
    scratch_learning_rate: Positive = 3e-3
    """Learning rate of the scratch rung."""
    anchor: Literal["init", "old", "zero"] = "init"
    """What the weights are pulled to: their start, the old adapter or zero."""
    pull_strong: PositiveOrZero = 0.05
    """Strength of the pull in the first steps."""
    pull_weak: PositiveOrZero = 0.005
    """Strength of the pull in the other steps."""
    strong_fraction: Share = 0.3
    """Share of the steps with the strong pull."""
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the weights' moving average, which is evaluated and served. It is steadier than the weights."""
    max_tokens: Count = 256
    """Longest prompt plus completion; longer prompts lose their beginning."""
    scratch_steps: Count = 600
    """Optimiser steps of the scratch rung."""
    seed: CountOrZero = 0
    """Random seed of the training."""


@frozen
class GateConfig:
    """What a new version has to reach, in points of its metric (0 to 100)."""

    tolerance_points: PositiveOrZero = 1.0
    """Points that a new version may lose against the old version on the old base."""
    max_drop_points: PositiveOrZero = 5.0
    """If scratch training on the new base loses more than `tolerance_points`, the new version may lose as much, up to
    this limit. It also limits what a stage of `relora continual` may cost an earlier stage."""
    agreement_points: PositiveOrZero = 5.0
    """The tolerance if there are only prompts, so that the old service's answers count as correct."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """An evaluation that is going to fail ends early. It does so wrongly with a probability of at most 1 - `confidence`
    (a few times that if chrF varies much between rows). Passing always takes all rows."""


@frozen
class WorkersConfig:
    """The processes that re-adapt."""

    num_workers: Count = 1
    """Number of workers."""
    adapters_per_worker: Count = 1
    """Adapters that one worker trains side by side. More than 1 helps on a GPU, or on a CPU with small batches."""
    cpus_per_worker: PositiveOrZero = 1.0
    """CPUs that Ray reserves for one worker."""
    gpus_per_worker: PositiveOrZero = 0.0
    """GPUs that Ray reserves for one worker. The search of the fused rung reserves as many again."""


@frozen
class ReadaptConfig:
    """How an adapter is carried over to a new base."""

    ladder: LadderConfig = LadderConfig()
    transplant: TransplantConfig = TransplantConfig()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig()
    gate: GateConfig = GateConfig()
    workers: WorkersConfig = WorkersConfig()


@frozen
class RolloutConfig:
    """How a new version takes over the traffic."""

    canary_share: Share = 0.2
    """Share of the adapter's requests that go to the canary."""
    canary_s: PositiveOrZero = 3.0
    """Seconds for which the canary has to serve without a failure."""
    golden_prompts: Count = 4
    """Prompts that the new version has to answer as it did when it passed the gate."""
    poll_s: Positive = 0.5
    """Seconds between looks at the registry."""


@frozen
class Fleet:
    """The whole fleet file. Its paths and local URLs are absolute once it is loaded."""

    name: Name
    """The fleet's name."""
    folder: Path
    registry: RegistryUrl = "sqlite:///registry.db"
    """Where versions are kept: a SQLite file, or postgresql+psycopg://user@host/database."""
    blobs: BlobsUrl = "blobs"
    """Where adapter files are kept: a folder, s3://bucket/prefix or gs://bucket/prefix."""
    packed: Folder = ".cache/packed"
    """The folder on each machine where engines keep packed adapters; best on the machine's own disk."""
    bases: tuple[BaseSpec, ...] = ()
    adapters: tuple[AdapterSpec, ...] = ()
    serving: ServingConfig = ServingConfig()
    readapt: ReadaptConfig = ReadaptConfig()
    rollout: RolloutConfig = RolloutConfig()

    @model_validator(mode="after")
    def _fill_in_ranks(self) -> Self:
        """Set the transplant's ranks that are not given: the defaults, but no more than the engines serve."""
        given = self.readapt.transplant
        rank, wide_rank = (min(rank, self.serving.max_rank) for rank in given.ranks)
        filled = replace(given, rank=given.rank or rank, wide_rank=given.wide_rank or wide_rank)
        object.__setattr__(self, "readapt", replace(self.readapt, transplant=filled))
        return self

    def base(self, name: str) -> BaseSpec:
        """Return the base model of that name; NotFoundError, with the names that exist, if there is none."""
        specs = {spec.name: spec for spec in self.bases}
        if name not in specs:
            raise NotFoundError(f"No base model {name!r} in fleet {self.name!r}; it has: {', '.join(specs) or 'none'}.")
        return specs[name]
