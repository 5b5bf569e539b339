"""A campaign: every adapter of a fleet on its way to a new base, as a state machine over the registry.

    plan     each adapter that is live on another base gets a version PLANNED on the target
    claim    PLANNED -> ADAPTING by compare-and-swap, busiest adapter first, one by one as workers come free
    settle   ADAPTING -> CANDIDATE (files stored), REJECTED (no rung passed the gate; the old version stays) or FAILED

All that a campaign knows is in the registry, so a killed one is resumed by running it again: settled versions are not
touched, and what was in the air is put back to PLANNED. Several campaigns to one target may run at once and share the
work. Which campaign is dead is decided by heartbeats: each logs one every `lease_s / 5` seconds, and is taken for dead
when another has watched for `lease_s` and seen none. Counting from the watcher's first look, on its own monotonic
clock, needs no agreement of clocks between machines and no process ids, which mean nothing between containers. The
price is that a resumed campaign comes to the adapters that were in the air last, at the earliest after `lease_s`.
"""

import contextlib
import itertools
import math
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.adapter_files import Adapter, check_fits, load_adapter, save_adapter
from cluster.blobs import BlobStore
from cluster.checkpoints import open_checkpoint
from cluster.config import Fleet
from cluster.errors import ConflictError, InvalidAdapterError, InvalidDataError, ReloraError, StorageError
from cluster.fleet import register_base
from cluster.registry import Registry, Status, Version
from readapt.delta import base_evolution
from readapt.search import SearchResult
from readapt.workbench import AdapterJob, Climbed, Executor, JobFailed, Report, RungReached

HEARTBEAT = "campaign_heartbeat"
EVOLUTION = "evolution"
SETTLED = frozenset({Status.CANDIDATE, Status.REJECTED, Status.FAILED})


class Campaign:
    """Carries the adapters of `fleet` over to base `target`; `say` gets one line for each step of each adapter."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        blobs: BlobStore,
        target: str,
        executor: Executor,
        *,
        lease_s: float = 10.0,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):
        self.id = uuid.uuid4().hex
        self._fleet, self._registry, self._blobs = fleet, registry, blobs
        self._target, self._executor, self._lease_s, self._say = target, executor, lease_s, say
        self._watch = _LeaseWatch(registry, lease_s)
        self._claimed: set[int] = set()
        self._settled: list[Version] = []
        self._evolutions: dict[str, str | ReloraError | None] = {}

    def run(self) -> list[Version]:
        """Works until nothing is left to do and returns the versions that this campaign settled, in that order.

        Adapters that fail are FAILED with their error, and tried again by the next campaign. ConflictError when the
        target's name stands for other weights than before, NotFoundError when the fleet has no such base.
        """
        register_base(self._fleet, self._registry, self._target)
        self._registry.log("campaign_started", campaign=self.id, target=self._target)
        with _heartbeat(self._registry, self.id, self._lease_s / 5):
            try:
                self._settle_all()
            finally:
                self._put_back(lambda owner: owner == self.id)
        self._registry.log("campaign_finished", campaign=self.id, target=self._target, num_settled=len(self._settled))
        return list(self._settled)

    def _settle_all(self) -> None:
        while True:
            self._put_back(lambda owner: owner != self.id and self._watch.is_dead(owner))
            self._plan()
            claims = self._claims()
            first = next(claims, None)
            if first is not None:  # an executor is started only for something to do
                for job, report in self._executor.run(itertools.chain([first], claims)):
                    self._handle(job, report)
            elif self._target_versions(Status.ADAPTING):
                time.sleep(self._lease_s / 20)
            else:
                return

    # Plan

    def _plan(self) -> None:
        """Gives every adapter that is live elsewhere a version here, unless it has one; FAILED ones get a new turn."""
        here = self._first_versions()
        for adapter, route in self._registry.routes().items():
            version = here.get(adapter)
            if route.live.base == self._target:
                continue
            if version is None:
                self._registry.add_version(adapter, self._target, Status.PLANNED, parent_id=route.live.id)
            elif version.status is Status.FAILED and version.id not in self._claimed:
                self._move(version, Status.PLANNED)

    def _target_versions(self, *statuses: Status) -> list[Version]:
        return self._registry.versions(base=self._target, statuses=statuses or None)

    def _first_versions(self) -> dict[str, Version]:
        """By adapter, of those made from its live version: what its owner has replaced meanwhile is not carried over.

        Two campaigns that plan at once may both add one: the first counts, no other is ever taken.
        """
        live = {adapter: route.live.id for adapter, route in self._registry.routes().items()}
        return {v.adapter: v for v in reversed(self._target_versions()) if v.parent_id == live.get(v.adapter, -1)}

    def _put_back(self, is_lost: Callable[[str], bool]) -> None:
        for version in self._target_versions(Status.ADAPTING):
            if is_lost(version.details.get("campaign", "")) and self._move(version, Status.PLANNED):
                self._say(f"{version.label}: put back, nobody works on it any more")

    # Claim

    def _claims(self) -> Iterator[AdapterJob]:
        traffic = {record.name: record.traffic for record in self._registry.adapters()}
        planned = [v for v in self._first_versions().values() if v.status is Status.PLANNED]
        for version in sorted(planned, key=lambda v: (-traffic[v.adapter], v.adapter)):
            claimed = self._move(version, Status.ADAPTING, {"campaign": self.id})
            if claimed is None:
                continue
            self._claimed.add(claimed.id)
            try:
                yield self._job(claimed)
            except ReloraError as error:
                self._fail(claimed, f"{type(error).__name__}: {error}")

    def _job(self, version: Version) -> AdapterJob:
        """Everything a worker needs, checked. Errors are the adapter's own fault, or its base's."""
        record = self._registry.adapter(version.adapter)
        assert version.parent_id is not None, "planned versions have a parent"
        parent = self._registry.version(version.parent_id)
        if parent.blob_key is None:
            raise InvalidAdapterError(f"{parent.label} has no files in the blob store.")
        if not record.data:
            raise InvalidDataError(f"{version.adapter} has no rows to judge it by: give it `data` in the fleet file.")
        new_base = self._fleet.base(self._target).path
        evolution_key = self._evolution(parent.base)
        check_fits(load_adapter(self._blobs.fetch_folder(parent.blob_key)), open_checkpoint(new_base).linear_shapes())
        return AdapterJob(
            version_id=version.id,
            adapter=version.adapter,
            data=Path(record.data),
            metric="chrf" if record.metric == "chrf" else "exact_match",
            task_key=parent.blob_key,
            evolution_key=evolution_key,
            old_base=Path(self._registry.base(parent.base).path),
            new_base=new_base,
        )

    def _evolution(self, old: str) -> str | None:
        """Blob key of the evolution from `old` to the target: made once, found again by whoever resumes."""
        if old not in self._evolutions:
            try:
                self._evolutions[old] = self._find_evolution(old)
            except ReloraError as error:
                self._evolutions[old] = error  # hashing or comparing two large bases once is enough
        found = self._evolutions[old]
        if isinstance(found, ReloraError):
            raise found
        return found

    def _find_evolution(self, old: str) -> str | None:
        search = self._fleet.readapt.search
        identity = {
            "old": register_base(self._fleet, self._registry, old).fingerprint,
            "new": self._registry.base(self._target).fingerprint,
            "rank": search.evolution_rank,
            "energy": search.evolution_energy,
        }
        for event in self._registry.events(kind=EVOLUTION):
            key = event.details["key"]
            if identity.items() <= event.details.items() and (key is None or self._blobs.exists(key)):
                return key
        return self._extract_evolution(old, identity)

    def _extract_evolution(self, old: str, identity: dict[str, Any]) -> str | None:
        started = time.perf_counter()
        before, after = (open_checkpoint(self._fleet.base(name).path) for name in (old, self._target))
        evolution, energies = base_evolution(before, after, rank=identity["rank"], energy=identity["energy"])
        key = None
        if evolution.factors:
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(evolution, Path(folder) / "evolution")
                key = self._blobs.put_folder(Path(folder) / "evolution")
        seconds = time.perf_counter() - started
        modules = _jsonable([asdict(energy) for energy in energies])
        is_same_tokenizer = before.tokenizer_fingerprint() == after.tokenizer_fingerprint()
        details = identity | {"key": key, "seconds": seconds, "modules": modules, "same_tokenizer": is_same_tokenizer}
        self._registry.log(EVOLUTION, **details)
        self._say(f"evolution {old} -> {self._target}: {len(evolution.factors)} modules changed, {seconds:.1f} s")
        if not is_same_tokenizer:
            self._say(f"{self._target} has another tokenizer than {old}: expect adapters to be trained anew")
        return key

    # Settle

    def _handle(self, job: AdapterJob, report: Report) -> None:
        """Writes down what a worker reports, unless the version was taken from us because we seemed dead."""
        version = self._registry.version(job.version_id)
        if version.details.get("campaign") != self.id:
            return
        match report:
            case RungReached():
                self._log_rung(version, report)
            case JobFailed():
                self._fail(version, report.error)
            case Climbed():
                self._settle(version, report)

    def _log_rung(self, version: Version, reached: RungReached) -> None:
        point = reached.point
        self._registry.log(
            "rung",
            version.id,
            campaign=self.id,
            rung=reached.rung,
            step=point.step,
            quality=point.quality,
            loss=_jsonable(point.loss),
            seconds=reached.seconds,
        )
        self._say(f"{version.label}: {reached.rung} step {point.step}: {point.quality:.1f} ({reached.seconds:.1f} s)")

    def _fail(self, version: Version, error: str) -> None:
        self._say(f"{version.label}: failed: {error}")
        self._move(version, Status.FAILED, {"error": error})

    def _settle(self, version: Version, climbed: Climbed) -> None:
        started = time.perf_counter()
        outcome = climbed.outcome
        try:
            files = self._store(outcome.adapter) if outcome.accepted else {}
        except StorageError as error:  # the others may have better luck; the registry's own errors end the campaign
            self._fail(version, f"StorageError: {error}")
            return
        seconds = {**climbed.seconds, "store": time.perf_counter() - started}
        details = _details(climbed) | {"seconds": {**seconds, "total": sum(seconds.values())}}
        target = Status.CANDIDATE if outcome.accepted else Status.REJECTED
        self._say(
            f"{version.label}: {target} at rung {outcome.rung} (alpha {outcome.alpha:.2f}, beta {outcome.beta:.2f}): "
            f"{outcome.quality:.1f}, copy {outcome.copy_quality:.1f}, asked {outcome.reference:.1f}"
        )
        self._move(version, target, details, quality=outcome.quality, **files)

    def _store(self, adapter: Adapter) -> dict[str, str]:
        new_base = str(self._fleet.base(self._target).path)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "adapter"
            save_adapter(replace(adapter, base_model=new_base), folder)
            key = self._blobs.put_folder(folder)
            return {"blob_key": key, "content_hash": key}

    def _move(
        self, version: Version, target: Status, details: dict[str, Any] | None = None, **values: Any
    ) -> Version | None:
        """The version after the move, or None when somebody else moved it first, which is theirs to go on with."""
        try:
            moved = self._registry.move(version.id, version.status, target, details=details, **values)
        except ConflictError:
            return None
        if target in SETTLED:
            self._settled.append(moved)
        return moved


def _details(climbed: Climbed) -> dict[str, Any]:
    outcome, search = climbed.outcome, climbed.search
    return {
        "rung": outcome.rung,
        "alpha": float(outcome.alpha),
        "beta": float(outcome.beta),
        "copy_quality": outcome.copy_quality,
        "reference_quality": outcome.reference,
        "attempts": _jsonable([asdict(attempt) for attempt in outcome.attempts]),
        "search": [] if search is None else _trials(search),
        "golden": list(outcome.golden),
    }


def _trials(search: SearchResult) -> list[dict[str, Any]]:
    return [_jsonable(asdict(trial)) for trial in search.trials]


def _jsonable(value: Any) -> Any:
    """JSON has no infinity and no NaN: None instead."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _LeaseWatch:
    """Knows which campaigns still give signs of life, as seen since this watch began."""

    def __init__(self, registry: Registry, lease_s: float):
        self._registry = registry
        self._lease_s = lease_s
        self._last_event_id = 0
        self._seen_at_s: dict[str, float] = {}

    def is_dead(self, campaign: str) -> bool:
        now_s = time.monotonic()
        for event in self._registry.events(after_id=self._last_event_id, kind=HEARTBEAT):
            self._last_event_id = event.id
            self._seen_at_s[event.details["campaign"]] = now_s
        return now_s - self._seen_at_s.setdefault(campaign, now_s) > self._lease_s


@contextlib.contextmanager
def _heartbeat(registry: Registry, campaign: str, every_s: float) -> Iterator[None]:
    """Logs a sign of life from a thread, at once and then every `every_s`."""
    is_over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(StorageError):  # a database that is away for one beat is not the end
                registry.log(HEARTBEAT, campaign=campaign)
            if is_over.wait(every_s):
                return

    thread = threading.Thread(target=beat, daemon=True, name="campaign-heartbeat")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
