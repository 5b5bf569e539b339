"""A campaign: carry every adapter of a fleet over to a new base, as a state machine over the registry.

    plan     each adapter that is live on another base gets a version PLANNED on the target
    claim    PLANNED -> ADAPTING by compare-and-swap, one at a time as workers become free, in the order of `order`
    settle   ADAPTING -> CANDIDATE (its files are stored), REJECTED (no rung passed the gate, so the old version stays
             live) or FAILED (an error)

The registry holds all of a campaign's state, so a killed campaign is resumed by running it again. Settled versions stay
as they are, and versions that were being adapted go back to PLANNED. Those are taken up last, at the earliest after
`lease_s`. Several campaigns to one target may run at once and share the work; `leases` tells which of them are dead.
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

from cluster.adapters.dialect import adapter_dialect, base_dialect, keep_text_files, store_dialect
from cluster.adapters.files import Adapter, check_fits, load_adapter, save_adapter
from cluster.adapters.size import size_details
from cluster.config.settings import Fleet
from cluster.errors import ConflictError, InvalidAdapterError, ReloraError, StorageError
from cluster.fleet import register_base
from cluster.progress import Counted
from cluster.registry.records import jsonable
from cluster.registry.registry import Registry, Status, Version
from cluster.storage.blobs import BlobStore
from cluster.storage.checkpoints import open_checkpoint
from readapt.campaign.base_pair import BasePairs
from readapt.campaign.jobs import AdapterJob, AdapterResult, Executor, JobFailure, JobUpdate, RungReached
from readapt.campaign.leases import LeaseWatch, heartbeat
from readapt.campaign.order import SETTLED, expected_seconds, in_order, unready_traffic
from readapt.training.data import task_folders
from readapt.training.selection import described


class Campaign:
    """Carries the adapters of `fleet` over to the base `target`. `say` gets one line per step of each adapter."""

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
        self._counted = Counted("adapter", say)

    def run(self) -> list[Version]:
        """Work until nothing is left to do; return the versions this campaign settled, in order.

        Adapters that fail become FAILED with their error, and the next campaign tries them again. Raises ConflictError
        if the target's name stood for other weights before, NotFoundError if the fleet has no such base.
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
        """Make `run`, in another thread, return within seconds. Unfinished versions go back to PLANNED."""
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
        self._say(f"waiting time: weighted by traffic, adapters waited {cost.mean_s:.1f} s for their new version")

    def _settle_all(self) -> None:
        while not self._stopped.is_set():
            self._put_back(lambda owner: owner != self.id and self._watch.is_dead(owner))
            self._plan()
            claims = self._claims()
            first = next(claims, None)
            if first is not None:  # the executor starts only if there is work
                self._work_on(itertools.chain([first], claims))
            elif self._target_versions(Status.ADAPTING):
                time.sleep(self._lease_s / 20)
            else:
                return

    def _work_on(self, jobs: Iterator[AdapterJob]) -> None:
        with closing(self._executor.run(jobs)) as updates:
            for update in updates:
                if update is not None:
                    self._handle(*update)
                if self._stopped.is_set():
                    return

    # Plan

    def _plan(self) -> None:
        """Give every adapter that is live on another base a version here. FAILED versions are planned again.

        A paused adapter gets none until somebody resumes it.
        """
        here = self._first_versions()
        paused = self._registry.paused()
        for adapter, route in self._registry.routes().items():
            version = here.get(adapter)
            if route.live.base == self._target or adapter in paused:
                continue
            if version is None:
                self._registry.add_version(adapter, self._target, Status.PLANNED, parent_id=route.live.id)
            elif version.status is Status.FAILED and version.id not in self._claimed:
                self._move(version, Status.PLANNED)

    def _target_versions(self, *statuses: Status) -> list[Version]:
        return self._registry.versions(base=self._target, statuses=statuses or None)

    def _first_versions(self) -> dict[str, Version]:
        """Return the first version of each adapter on the target that was made from its present live version.

        Two campaigns that plan at once may each add one; only the first is ever claimed. If the owner has replaced the
        live version meanwhile, versions made from the old one no longer count.
        """
        live = {adapter: route.live.id for adapter, route in self._registry.routes().items()}
        return {v.adapter: v for v in reversed(self._target_versions()) if v.parent_id == live.get(v.adapter, -1)}

    def _put_back(self, is_lost: Callable[[str], bool]) -> None:
        """Move versions from ADAPTING back to PLANNED if `is_lost` says so of their campaign."""
        for version in self._target_versions(Status.ADAPTING):
            if is_lost(version.details.get("campaign", "")) and self._move(version, Status.PLANNED):
                self._say(f"{version.label}: put back to planned, its campaign no longer works on it")

    # Claim

    def _claims(self) -> Iterator[AdapterJob]:
        traffic = {record.name: record.traffic for record in self._registry.adapters()}
        planned = [v for v in self._first_versions().values() if v.status is Status.PLANNED]
        for version in in_order(planned, traffic, expected_seconds(self._registry, planned)):
            if version.adapter in self._registry.paused():
                continue
            claimed = self._move(version, Status.ADAPTING, {"campaign": self.id})
            if claimed is None:
                continue
            self._claimed.add(claimed.id)
            try:
                yield self._job(claimed)
            except ReloraError as error:
                self._fail(claimed, f"{type(error).__name__}: {error}")

    def _job(self, version: Version) -> AdapterJob:
        """Return the version's job, after checking that it can be done. Raises a ReloraError if it cannot."""
        record = self._registry.adapter(version.adapter)
        assert version.parent_id is not None, "planned versions have a parent"
        parent = self._registry.version(version.parent_id)
        if parent.blob_key is None:
            raise InvalidAdapterError(f"{parent.label} has no files in the blob store.")
        new_base = self._fleet.base(self._target).path
        pair = self._pairs.of(parent.base)
        folder = self._blobs.fetch_folder(parent.blob_key)
        check_fits(load_adapter(folder), open_checkpoint(new_base).linear_shapes())
        adapter_dialect(folder, base_dialect(new_base))
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

    def _handle(self, job: AdapterJob, update: JobUpdate) -> None:
        """Record an update, unless another campaign took the version because this one seemed dead."""
        version = self._registry.version(job.version_id)
        if version.status is not Status.ADAPTING or version.details.get("campaign") != self.id:
            return
        match update:
            case RungReached():
                self._log_rung(version, update)
            case JobFailure():
                self._fail(version, update.error)
            case AdapterResult():
                self._settle(version, job, update)

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

    def _settle(self, version: Version, job: AdapterJob, result: AdapterResult) -> None:
        started = time.perf_counter()
        outcome = result.outcome
        try:
            files, more = self._store(job, outcome.adapter) if outcome.accepted else ({}, {})
        except StorageError as error:  # the next adapter may be stored; an error of the registry ends the campaign
            self._fail(version, f"StorageError: {error}")
            return
        seconds = {**result.seconds, "store": time.perf_counter() - started}
        details = _details(result) | {"seconds": {**seconds, "total": sum(seconds.values())}}
        details |= self._stages(version) | more
        target = Status.CANDIDATE if outcome.accepted else Status.REJECTED
        copied = "copy not tried" if outcome.copy_quality is None else f"copy {outcome.copy_quality:.1f}"
        self._say(
            f"{version.label}: {target} at rung {outcome.rung} (alpha {outcome.alpha:.2f}, beta {outcome.beta:.2f}): "
            f"{outcome.quality:.1f}, {copied}, reference {outcome.reference:.1f}, rank {outcome.adapter.max_rank}"
        )
        if result.left_out:
            self._say(f"{version.label}: rows left out: {described(result.left_out)}")
            self._registry.log("rows_left_out", version.id, campaign=self.id, left_out=result.left_out)
        self._move(version, target, details, quality=outcome.quality, **files)

    def _stages(self, version: Version) -> dict[str, Any]:
        """Return the parent's stages, which the new version has learned too."""
        assert version.parent_id is not None, "planned versions have a parent"
        details = self._registry.version(version.parent_id).details
        return {"stages": details["stages"]} if "stages" in details else {}

    def _store(self, job: AdapterJob, adapter: Adapter) -> tuple[dict[str, str], dict[str, Any]]:
        """Store a new version's files, with the text files beside the old one; return their keys, and details."""
        new_base = self._fleet.base(self._target).path
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "adapter"
            save_adapter(replace(adapter, base_model=str(new_base)), folder)
            keep_text_files(self._blobs.fetch_folder(job.task_key), folder)
            key = self._blobs.put_folder(folder)
            more = store_dialect(self._blobs, folder, new_base) | size_details(adapter.max_rank, folder.rglob("*"))
            return {"blob_key": key, "content_hash": key}, more

    def _move(
        self, version: Version, target: Status, details: dict[str, Any] | None = None, **values: Any
    ) -> Version | None:
        """Move the version and return it. Returns None if another campaign moved it first and so owns it."""
        try:
            moved = self._registry.move(version.id, version.status, target, details=details, **values)
        except ConflictError:
            return None
        if target in SETTLED:
            self._settled.append(moved)
            unfinished = (Status.PLANNED, Status.ADAPTING)
            num_left = sum(version.status in unfinished for version in self._first_versions().values())
            self._counted.update(len(self._settled), len(self._settled) + num_left, f"{moved.label} {moved.status}")
        if moved.setback is not None:
            self._registry.log("setback", moved.id, campaign=self.id, status=moved.status, reason=moved.setback)
        return moved


@contextmanager
def in_background(campaign: Campaign) -> Iterator[Future[list[Version]]]:
    """Run a campaign in a thread during the block; stop it if the block ends first."""
    with ThreadPoolExecutor(1, thread_name_prefix="campaign") as pool:
        settled = pool.submit(campaign.run)
        try:
            yield settled
        finally:
            campaign.stop()


def _details(result: AdapterResult) -> dict[str, Any]:
    """Return what the registry keeps of a result."""
    outcome = result.outcome
    reached = f"it reached {outcome.quality:.1f} points at rung {outcome.rung}"
    rejected = result.setback or f"{reached}; the gate asks for {outcome.reference:.1f} less its tolerance"
    trials = [] if result.search is None else [jsonable(asdict(trial)) for trial in result.search.trials]
    return ({} if outcome.accepted else {"rejected": rejected}) | {
        "rung": outcome.rung,
        "alpha": float(outcome.alpha),
        "beta": float(outcome.beta),
        "copy_quality": outcome.copy_quality,
        "reference_quality": outcome.reference,
        "attempts": jsonable([asdict(attempt) for attempt in outcome.attempts]),
        "search": trials,
        "golden": list(result.golden),
        "left_out_rows": result.left_out,
    }
