"""A campaign: every adapter of a fleet on its way to a new base, as a state machine over the registry.

    plan     each adapter that is live on another base gets a version PLANNED on the target
    claim    PLANNED -> ADAPTING by compare-and-swap, in the order of `planning`, one by one as workers come free
    settle   ADAPTING -> CANDIDATE (files stored), REJECTED (no rung passed the gate; the old version stays) or FAILED

All that a campaign knows is in the registry, so a killed one is resumed by running it again: settled versions are not
touched, and what was in the air is put back to PLANNED. Several campaigns to one target may run at once and share the
work; `leases` says which of them are dead. The price is that a resumed campaign comes to the adapters that were in the
air last, at the earliest after `lease_s`.
"""

import itertools
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.adapter_files import Adapter, check_fits, load_adapter, save_adapter
from cluster.blobs import BlobStore
from cluster.checkpoints import open_checkpoint
from cluster.config import Fleet
from cluster.errors import ConflictError, InvalidAdapterError, ReloraError, StorageError
from cluster.fleet import register_base
from cluster.records import jsonable
from cluster.registry import Registry, Status, Version
from readapt.campaign.base_pair import BasePairs
from readapt.campaign.leases import LeaseWatch, heartbeat
from readapt.campaign.order import SETTLED, expected_seconds, in_order, unready_traffic
from readapt.campaign.worker import AdapterJob, Climbed, Executor, JobFailed, Report, RungReached
from readapt.fusion.search import SearchResult
from readapt.ladder.ladder import Outcome
from readapt.training.data import task_folders


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
        self._watch = LeaseWatch(registry, lease_s)
        self._pairs = BasePairs(fleet, registry, blobs, target, say)
        self._stopped = threading.Event()
        self._claimed: set[int] = set()
        self._settled: list[Version] = []

    def run(self) -> list[Version]:
        """Works until nothing is left to do and returns the versions that this campaign settled, in that order.

        Adapters that fail are FAILED with their error, and tried again by the next campaign. ConflictError when the
        target's name stands for other weights than before, NotFoundError when the fleet has no such base.
        """
        register_base(self._fleet, self._registry, self._target)
        self._registry.log("campaign_started", campaign=self.id, target=self._target)
        with heartbeat(self._registry, self.id, self._lease_s / 5):
            try:
                self._settle_all()
            finally:
                self._put_back(lambda owner: owner == self.id)
        if not self._stopped.is_set():
            self._finish()
        return list(self._settled)

    def stop(self) -> None:
        """From another thread: `run` returns within seconds, and what was in the air is put back to PLANNED."""
        self._stopped.set()

    def _finish(self) -> None:
        cost = unready_traffic(self._registry, self._target)
        self._registry.log(
            "campaign_finished",
            campaign=self.id,
            target=self._target,
            num_settled=len(self._settled),
            unready_traffic=cost.integral,
            mean_unready_s=cost.mean_s,
        )
        self._say(f"unready traffic: {cost.integral:.1f} units x s, {cost.mean_s:.1f} s for a request on average")

    def _settle_all(self) -> None:
        while not self._stopped.is_set():
            self._put_back(lambda owner: owner != self.id and self._watch.is_dead(owner))
            self._plan()
            claims = self._claims()
            first = next(claims, None)
            if first is not None:  # an executor is started only for something to do
                self._work_on(itertools.chain([first], claims))
            elif self._target_versions(Status.ADAPTING):
                time.sleep(self._lease_s / 20)
            else:
                return

    def _work_on(self, jobs: Iterator[AdapterJob]) -> None:
        with closing(self._executor.run(jobs)) as reports:
            for report in reports:
                if report is not None:
                    self._handle(*report)
                if self._stopped.is_set():
                    return

    # RunSettings

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
        for version in in_order(planned, traffic, expected_seconds(self._registry, planned)):
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
        new_base = self._fleet.base(self._target).path
        pair = self._pairs.of(parent.base)
        check_fits(load_adapter(self._blobs.fetch_folder(parent.blob_key)), open_checkpoint(new_base).linear_shapes())
        return AdapterJob(
            version_id=version.id,
            adapter=version.adapter,
            data=task_folders(record, parent),
            metric="chrf" if record.metric == "chrf" else "exact_match",
            task_key=parent.blob_key,
            evolution_key=pair.key,
            old_base=Path(self._registry.base(parent.base).path),
            new_base=new_base,
        )

    # Settle

    def _handle(self, job: AdapterJob, report: Report) -> None:
        """Writes down what a worker reports, unless the version was taken from us because we seemed dead."""
        version = self._registry.version(job.version_id)
        if version.status is not Status.ADAPTING or version.details.get("campaign") != self.id:
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
            loss=jsonable(point.loss),
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
        details = _details(climbed) | {"seconds": {**seconds, "total": sum(seconds.values())}} | self._stages(version)
        target = Status.CANDIDATE if outcome.accepted else Status.REJECTED
        self._say(
            f"{version.label}: {target} at rung {outcome.rung} (alpha {outcome.alpha:.2f}, beta {outcome.beta:.2f}): "
            f"{outcome.quality:.1f}, {_copy(outcome)}, asked {outcome.reference:.1f}"
        )
        self._move(version, target, details, quality=outcome.quality, **files)

    def _stages(self, version: Version) -> dict[str, Any]:
        """What the version has learned from its parent's stages, for the next upgrade and the next stage."""
        assert version.parent_id is not None, "planned versions have a parent"
        details = self._registry.version(version.parent_id).details
        return {"stages": details["stages"]} if "stages" in details else {}

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


@contextmanager
def in_background(campaign: Campaign) -> Iterator[Future[list[Version]]]:
    """Runs a campaign in a thread beside the block, and stops it when the block is left before it is over."""
    with ThreadPoolExecutor(1, thread_name_prefix="campaign") as pool:
        settled = pool.submit(campaign.run)
        try:
            yield settled
        finally:
            campaign.stop()


def _copy(outcome: Outcome) -> str:
    return "no copy tried" if outcome.copy_quality is None else f"copy {outcome.copy_quality:.1f}"


def _details(climbed: Climbed) -> dict[str, Any]:
    outcome, search = climbed.outcome, climbed.search
    asked = f"{outcome.reference:.1f} less the gate's tolerance were asked"
    rejected = climbed.setback or f"at rung {outcome.rung} it reached {outcome.quality:.1f} points, {asked}"
    return ({} if outcome.accepted else {"rejected": rejected}) | {
        "rung": outcome.rung,
        "alpha": float(outcome.alpha),
        "beta": float(outcome.beta),
        "copy_quality": outcome.copy_quality,
        "reference_quality": outcome.reference,
        "attempts": jsonable([asdict(attempt) for attempt in outcome.attempts]),
        "search": [] if search is None else _trials(search),
        "golden": list(outcome.golden),
    }


def _trials(search: SearchResult) -> list[dict[str, Any]]:
    return [jsonable(asdict(trial)) for trial in search.trials]
