"""The settings of a fleet. The string under a field is its comment in fleet.toml (see `cluster.config.reference`)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.config.engines import EngineSpec
from cluster.config.readapt import ReadaptConfig
from cluster.config.types import (
    BlobsUrl,
    Count,
    CountOrZero,
    FilePath,
    Folder,
    Name,
    Origin,
    Positive,
    PositiveOrZero,
    RegistryUrl,
    Share,
    Source,
    frozen,
)
from cluster.errors import NotFoundError
from cluster.storage.sources import local_folder

MIB = 1024**2
GIB = 1024**3
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", "none"]
ReasoningParser = Literal["auto", "think", "mistral", "seed", "none"]


@frozen
class BaseSpec:
    """Base models: Hugging Face checkpoint folders (config.json, safetensors, tokenizer)."""

    name: Name
    """What requests and adapters call it."""
    path: Source
    """The checkpoint folder, s3://bucket/folder, gs://bucket/folder, or a Hugging Face id in the local cache."""
    tool_parser: ToolParser = "auto"
    """The format in which the model writes tool calls. "auto": the one that its chat template shows."""
    reasoning_parser: ReasoningParser = "auto"
    """The marks around the model's reasoning. "auto": those in its chat template."""


@dataclass(frozen=True)
class LocalBase:
    """A base model whose files are on this machine."""

    name: str
    path: Path


@frozen
class AdapterSpec:
    """The adapters as they are today, one table each."""

    name: Name
    """What requests call it. No base may have the same name."""
    path: Source
    """A folder in PEFT's format, s3://bucket/folder, gs://bucket/folder, or a Hugging Face id in the local cache."""
    base: str
    """Name of the base that it was trained for. Once registered, the registry says which base it is on."""
    data: FilePath
    """A folder with train.jsonl and valid.jsonl, or, if these are lost, with logged prompts.jsonl alone. See
    docs/how-to/data-formats.md."""
    metric: Literal["exact_match", "chrf"] = "exact_match"
    """How to measure whether a new version is as good as the old one."""
    traffic: PositiveOrZero = 1.0
    """Its share of the requests, in any unit. A campaign starts with the most traffic per second of expected work."""
    tool_parser: Literal["base", ToolParser] = "base"
    """The format in which it writes tool calls. "base": that of its base."""
    reasoning_parser: Literal["base", ReasoningParser] = "base"
    """The marks around its reasoning. "base": those of its base."""


@frozen
class ServingConfig:
    """The limits and the memory of each engine, and the number of its replicas."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 to be reachable from other machines."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on."""
    cors_origins: tuple[Origin, ...] = ()
    """Web pages of these origins may call the API from a browser, e.g. "http://localhost:3000"; "*" allows all."""
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
    trust_request_chat_template: bool = False
    """Let requests bring a chat template, as `chat_template`. A template is a program: trust your clients first."""
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
    traffic: Literal["gateway", "engines"] = "gateway"
    """Who moves the traffic. gateway: ours. engines: nobody here; a rollout loads live adapters into the servers of
    `[[engines]]` under their plain names, and unloads them elsewhere."""
    drain_s: PositiveOrZero = 30.0
    """With `traffic = "engines"`: seconds for which the old server keeps an adapter that is live on a new one."""


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
    engines: tuple[EngineSpec, ...] = ()
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

    def specs(self) -> dict[str, BaseSpec | AdapterSpec]:
        """Return bases and adapters by name. They share one namespace."""
        specs: tuple[BaseSpec | AdapterSpec, ...] = (*self.bases, *self.adapters)
        return {spec.name: spec for spec in specs}

    def base(self, name: str) -> LocalBase:
        """Return the base model of that name; NotFoundError, with the names that exist, if there is none.

        Its files are fetched if they are in a bucket (see `cluster.storage.sources.local_folder` for the errors).
        """
        specs = {spec.name: spec for spec in self.bases}
        if name not in specs:
            raise NotFoundError(f"No base model {name!r} in fleet {self.name!r}; it has: {', '.join(specs) or 'none'}.")
        return LocalBase(name, self.local(specs[name].path))

    def local(self, source: Path | str) -> Path:
        """Return a local folder with the files of a base or an adapter (see `cluster.storage.sources.local_folder`)."""
        return local_folder(source, self.folder / ".cache" / "sources", self.folder)

    def engines_of(self, base: str) -> tuple[EngineSpec, ...]:
        """Return the servers that run a base in place of our own engine; none if we run it."""
        return tuple(spec for spec in self.engines if spec.base == base)
