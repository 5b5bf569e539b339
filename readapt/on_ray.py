"""Re-adaptation on Ray: one worker group of Ray Train and one run of Ray Tune for a whole campaign, fed by an actor.

Workers and trial actors import torch and load the bases once. A trainer or a tuner for each adapter would cost about
ten seconds each (ray 2.60, 4 cores, 2026-11), more than a small adapter's own training. A trial of Tune is one round of
a search: some candidates of one adapter, scored at once. An adapter is searched when its worker has come so far up the
ladder; the trial actors have loaded the new base by then.

Results travel through the queue actor, not `ray.train.report`, which is a barrier over all workers and waits for the
controller's next poll. When a worker dies, Ray Train restarts the group and the jobs in the air are queued again.
"""

import logging
import math
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import train, tune
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.tune.search import Searcher

from cluster.config import Fleet, ReadaptConfig, SearchConfig
from cluster.errors import ConfigError, TrainingError
from readapt.campaign.job_queue import JobQueue
from readapt.campaign.worker import AdapterJob, Ended, Reports, RungReached, Shift, Worker
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.fusion.points import Point
from readapt.fusion.refine import refine
from readapt.fusion.search import BayesianSearch

MAX_WORKER_GROUP_RESTARTS = 16
TRAINING_NICENESS = 5  # engines are at 0: on cores that they share, a request goes before a training step
TRIAL_CPUS = 0.5  # trials are short and share the cores with the workers
SEARCH_POLL_S = 0.01  # how long a worker waits for a search before it goes on with its other jobs
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the registry is what a campaign resumes from
    "RAY_AIR_NEW_OUTPUT": "0",
}

Job = TypeVar("Job")


class RayExecutor:
    """Runs jobs on the connected Ray cluster; see `workbench.Executor`.

    `storage` takes the small files that Ray Train and Tune write; on a cluster of several machines a shared folder.
    Needs `num_workers * cpus_per_worker + concurrency / 2` CPUs free, or it waits for them; `check_room` says what the
    cluster must have at least.
    """

    def __init__(self, fleet: Fleet, storage: Path | None = None):
        self._fleet = fleet
        self._storage = (storage or fleet.folder / ".cache" / "ray") / uuid.uuid4().hex  # its own, to be removed after

    def run(self, jobs: Iterator[AdapterJob]) -> Reports:
        """See `Executor.run`. One job more than there are workers is drawn, so that none waits for the campaign.

        ConfigError when the cluster is too small, TrainingError when workers or the search cannot be kept alive.
        """
        check_room(self._fleet.readapt, ray.cluster_resources())
        os.environ.update(_SETTINGS)
        # Its warning is a line for each trial that has no result file; ours report to the searcher and write none.
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        queue = ray.remote(num_cpus=0)(JobQueue).remote()
        search = FleetSearch(self._fleet.readapt.search, lambda id, found: queue.set_found.remote(id, found))
        services = [_Service("the worker group", self._trainer(queue).fit)]
        if "fused" in self._fleet.readapt.ladder.rungs:  # no other rung is searched for
            services.append(_Service("the search", self._tuner(queue, search).fit))
        in_the_air: dict[int, AdapterJob] = {}
        try:
            while self._fill(jobs, in_the_air, queue, search) or in_the_air:
                reports = ray.get(queue.reports.remote(timeout_s=1.0))
                for version_id, groups in ray.get(queue.wanted.remote()):
                    search.add(version_id, groups)
                for version_id, report in reports:
                    if version_id not in in_the_air:
                        continue  # the last word of a worker whose successor has settled the job meanwhile
                    yield in_the_air[version_id], report
                    if not isinstance(report, RungReached):
                        del in_the_air[version_id]
                        search.drop(version_id)
                for service in services:
                    service.check_alive()
                yield None
        finally:
            search.close()
            queue.close.remote()
        for service in services:
            service.join()
        shutil.rmtree(self._storage, ignore_errors=True)  # a folder for each trial, of no use but to explain a failure

    def _fill(
        self, jobs: Iterator[AdapterJob], in_the_air: dict[int, AdapterJob], queue: ActorHandle, search: "FleetSearch"
    ) -> bool:
        workers = self._fleet.readapt.workers
        while len(in_the_air) <= workers.num_workers * workers.adapters_per_worker:
            job = next(jobs, None)
            if job is None:
                return False
            in_the_air[job.version_id] = job
            ray.get(queue.add.remote(job))
            search.warm_up(job.version_id)
        return True

    def _trainer(self, queue: ActorHandle) -> TorchTrainer:
        workers = self._fleet.readapt.workers
        resources = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
        return TorchTrainer(
            _work,
            train_loop_config={"fleet": self._fleet, "queue": queue},
            scaling_config=train.ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker={name: amount for name, amount in resources.items() if amount},
            ),
            run_config=train.RunConfig(
                storage_path=str(self._storage),
                failure_config=train.FailureConfig(max_failures=MAX_WORKER_GROUP_RESTARTS),
            ),
        )

    def _tuner(self, queue: ActorHandle, search: "FleetSearch") -> tune.Tuner:
        trial = tune.with_parameters(FusionTrial, fleet=self._fleet, queue=queue)
        gpus = self._fleet.readapt.workers.gpus_per_worker
        return tune.Tuner(
            tune.with_resources(trial, {"cpu": TRIAL_CPUS, "gpu": gpus}),
            tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=str(self._storage),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )


class _Service:
    """Something that runs in a thread for as long as the campaign; a daemon, so that it never holds up an exit."""

    def __init__(self, name: str, run: Callable[[], object]):
        self._name = name
        self._error: Exception | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True, name=name)
        self._thread.start()

    def _run(self, run: Callable[[], object]) -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 (handed on to the campaign's own thread by `check`)
            self._error = error
        self._has_ended = True

    def check_alive(self) -> None:
        """TrainingError if it has died, or ended although it is still needed."""
        if self._has_ended:
            self.join()
            raise TrainingError(f"On Ray, {self._name} ended before its work was done.")

    def join(self) -> None:
        """Waits for its end; TrainingError if it died."""
        self._thread.join()
        if self._error is not None:
            raise TrainingError(f"On Ray, {self._name} could not go on: {self._error}") from self._error


def check_room(config: ReadaptConfig, cluster: Mapping[str, float]) -> None:
    """ConfigError where a cluster of these resources can never hold all workers, and a search beside them.

    Both would wait for ever: the workers go home when all is done, and what they do may need the search.
    """
    workers, num_searches = config.workers, int("fused" in config.ladder.rungs)
    needs = {
        "CPU": workers.num_workers * workers.cpus_per_worker + num_searches * TRIAL_CPUS,
        "GPU": (workers.num_workers + num_searches) * workers.gpus_per_worker,
    }
    for resource, needed in needs.items():
        if round(needed - cluster.get(resource, 0.0), 4) > 0:  # Ray counts in ten-thousandths
            beside = " and the search of the fused rung" if num_searches else ""
            raise ConfigError(
                f"[readapt.workers]: the workers{beside} need {needed:g} {resource}s, "
                f"the cluster has {cluster.get(resource, 0.0):g}."
            )


def _device(fleet: Fleet) -> str:
    return "cuda" if fleet.readapt.workers.gpus_per_worker > 0 else "cpu"


def _work(config: dict[str, Any]) -> None:
    """One worker's life: jobs from the queue, as many at once as it packs, with the bases held.

    It asks for the next job when the last one has come, so that the workers share out what there is.
    """
    os.setpriority(os.PRIO_PROCESS, 0, TRAINING_NICENESS)
    queue, adapters_per_worker = config["queue"], config["fleet"].readapt.workers.adapters_per_worker
    rank = train.get_context().get_world_rank()

    searches: dict[int, ray.ObjectRef] = {}

    def search(job: AdapterJob, objective: FusionObjective) -> SearchResult | None:
        if job.version_id not in searches:
            searches[job.version_id] = queue.found.remote(job.version_id, objective.groups)
        if not ray.wait([searches[job.version_id]], timeout=SEARCH_POLL_S)[0]:
            return None
        found = ray.get(searches.pop(job.version_id))
        if isinstance(found, str):
            raise TrainingError(found)
        return refine(objective, found)

    shift = Shift(Worker(config["fleet"], _device(config["fleet"])), search)
    life = ray.get(queue.enter.remote(rank))
    asked: ray.ObjectRef | None = None
    is_over = False
    while True:
        if asked is None and not is_over and shift.num_jobs < adapters_per_worker:
            asked = queue.take.remote(rank, life)
        if is_over and not shift.num_jobs:
            return
        ended: list[Ended] = []
        if asked is not None and ray.wait([asked], timeout=0 if shift.num_jobs else None)[0]:
            job, asked = ray.get(asked), None
            is_over = job is None
            if job is not None:
                ended += shift.begin(job, partial(queue.report.remote, rank, job.version_id))
        ended += shift.step() if shift.num_jobs else []
        for version_id, end in ended:
            ray.get(queue.report.remote(rank, version_id, end))


class FusionTrial(tune.Trainable):
    """One round of one adapter's search. The actor is reused, and keeps the new base and the last adapter's fusion."""

    def setup(self, config: dict[str, Any], fleet: Fleet, queue: ActorHandle) -> None:
        """Called once for each actor."""
        self._bench = Worker(fleet, _device(fleet))
        self._queue = queue
        self._version_id: int | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Turns to another round, maybe of another adapter."""
        self._points = new_config["points"]
        if new_config["version_id"] != self._version_id:
            job = ray.get(self._queue.job.remote(new_config["version_id"]))
            self._objective = self._bench.objective(job)
            self._version_id = job.version_id
        return True

    def step(self) -> dict[str, Any]:
        """The whole round: the losses on the search rows, and as Tune's own metric the lowest."""
        losses = self._objective.losses(self._points)
        return {"loss": min(losses, default=math.inf), "losses": losses, tune.result.DONE: True}


@dataclass(frozen=True)
class _Round:
    """What a trial is about; `search` is None where it only makes an actor load the base."""

    version_id: int
    points: list[Point]
    search: BayesianSearch | None = None


class FleetSearch(Searcher):
    """Makes one long run of Tune out of the searches of many adapters; `report` gets each result, or words of failure.

    Up to `concurrency` rounds are in the air. Adapters are served in the order in which they were added, but one with
    a round in the air waits behind those that have none, for its next round shall know that one's losses. Called by
    Tune's thread and by the campaign's.
    """

    def __init__(self, config: SearchConfig, report: Callable[[int, SearchResult | str], None]):
        super().__init__(metric="loss", mode="min")
        self._config = config
        self._report = report
        self._lock = threading.Lock()
        self._searches: dict[int, BayesianSearch] = {}
        self._rounds: dict[str, _Round] = {}
        self._num_to_warm_up = config.concurrency
        self._first_version_id: int | None = None
        self._is_closed = False

    def warm_up(self, version_id: int) -> None:
        """An adapter that may have to be searched: with the first one, the actors load what they need."""
        with self._lock:
            if self._first_version_id is None:
                self._first_version_id = version_id

    def add(self, version_id: int, groups: tuple[str, ...] = ()) -> None:
        """An adapter whose search is wanted, over these groups of its modules."""
        with self._lock:
            self._searches[version_id] = BayesianSearch(self._config, groups)

    def drop(self, version_id: int) -> None:
        """The adapter's search is not wanted any more."""
        with self._lock:
            self._searches.pop(version_id, None)

    def close(self) -> None:
        """Nothing will be wanted any more."""
        with self._lock:
            self._is_closed = True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Tune asks for the next trial: None for none at present, FINISHED for the end of the run."""
        with self._lock:
            if self._is_closed:
                return Searcher.FINISHED
            next_round = self._next_round() if len(self._rounds) < self._config.concurrency else None
            if next_round is None:
                return None
            self._rounds[trial_id] = next_round
            return {"version_id": next_round.version_id, "points": next_round.points}

    def _next_round(self) -> _Round | None:
        if self._num_to_warm_up and self._first_version_id is not None:
            self._num_to_warm_up -= 1
            return _Round(self._first_version_id, [])
        busy = {found.version_id for found in self._rounds.values()}
        ready = [version_id for version_id, search in self._searches.items() if search.can_ask]
        if not ready:
            return None
        version_id = next((ready_id for ready_id in ready if ready_id not in busy), ready[0])
        search = self._searches[version_id]
        return _Round(version_id, search.ask(), search)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune says that a trial is over."""
        with self._lock:
            ended = self._rounds.pop(trial_id)
            if ended.search is None:
                return
            ended.search.tell(ended.points, None if result is None or error else result["losses"])
            if ended.search.is_over:
                self._searches.pop(ended.version_id, None)
                self._report(ended.version_id, _result(ended.search))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a pickled copy of its settings for a resume that a campaign never asks for

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a campaign resumes from the registry."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def _result(search: BayesianSearch) -> SearchResult | str:
    try:
        return search.result()
    except TrainingError as error:
        return str(error)


def spread(function: Callable[[Job], None], jobs: Sequence[Job], in_flight_per_cpu: int = 2) -> Iterator[Job]:
    """Calls the function on every job, on all CPUs of the connected cluster, and yields each job once it is done.

    The function is shipped once. The first error ends it all; what was in the air is cancelled.
    """
    shared, call = ray.put(function), ray.remote(num_cpus=1)(_call)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) * in_flight_per_cpu
    waiting: deque[Job] = deque(jobs)
    running: dict[ray.ObjectRef, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.popleft()
                running[call.remote(shared, job)] = job
            done, _ = ray.wait(list(running))
            ray.get(done)
            yield from (running.pop(reference) for reference in done)
    finally:
        for reference in running:
            ray.cancel(reference)


def _call(function: Callable[[Job], None], job: Job) -> None:
    function(job)
