"""The settings of re-adaptation, `[readapt.*]` of the fleet file. See `cluster.config.settings`."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from cluster.config.types import Count, CountOrZero, Positive, PositiveOrZero, Share, frozen

Rung = Literal["copy", "transplant", "fused", "train", "scratch"]


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
    min_reference_points: PositiveOrZero = 5.0
    """An old adapter that scores less on its own rows is no reference, since nearly anything would pass: its upgrade
    fails, with the likely cause. So does that of an adapter that only ever gives one answer. 0: no such check."""
    max_growth: PositiveOrZero = 0.0
    """Most parameters of a new version, as a multiple of the old one's; larger ones are cut, or rejected. 0: no limit.
    Without a limit too, a new version is cut to 1 to 4 times its old ranks if it then answers as well."""
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
