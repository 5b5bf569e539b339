"""Re-adaptation on Ray: one worker group of Ray Train and one run of Ray Tune for a whole campaign, fed by an actor.

Workers and trial actors import torch and load the bases once. A trainer or a tuner per adapter would cost about ten
seconds each (ray 2.60, 4 cores, 2026-11), more than a small adapter's own training. A Tune trial is one round of one
adapter's search. A search begins when the adapter's worker reaches the fused rung; the trial actors have loaded the new
base by then.

Results travel through the queue actor, not through `ray.train.report`, which is a barrier over all workers and waits
for the controller's next poll. If a worker dies, Ray Train restarts the group and the unfinished jobs are queued again.
"""

import logging
import math
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import train, tune
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.tune.search import Searcher

from cluster.config.settings import Fleet
from cluster.errors import TrainingError
from readapt.campaign.concurrent_jobs import ConcurrentJobs
from readapt.campaign.job_queue import JobQueue
from readapt.campaign.jobs import AdapterJob, JobEnd, JobUpdates, RungReached
from readapt.campaign.resources import TRIAL_CPUS, check_room
from readapt.campaign.search_rounds import SearchRounds
from readapt.campaign.worker import Worker
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.fusion.refine import refine

MAX_WORKER_GROUP_RESTARTS = 16
TRAINING_NICENESS = 5  # engines run at 0: on shared cores a request goes before a training step
SEARCH_POLL_S = 0.01  # how long a worker waits for a search before it turns to its other jobs
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # a campaign resumes from the registry, not from Tune
    "RAY_AIR_NEW_OUTPUT": "0",
}

ItemT = TypeVar("ItemT")


class RayExecutor:
    """Runs jobs on the connected Ray cluster; see `campaign.jobs.Executor`.

    `storage` receives the small files that Ray Train and Tune write; on a cluster of several machines it must be a
    shared folder. Waits until `num_workers * cpus_per_worker + concurrency / 2` CPUs are free. `check_room` says what
    the cluster must have at least.
    """

    def __init__(self, fleet: Fleet, storage: Path | None = None):
        self._fleet = fleet
        self._storage = (storage or fleet.folder / ".cache" / "ray") / uuid.uuid4().hex  # removed after the run

    def run(self, jobs: Iterator[AdapterJob]) -> JobUpdates:
        """See `Executor.run`. Draws one job more than the workers hold, so that no worker waits for the campaign.

        Raises ConfigError if the cluster is too small, TrainingError if workers or the search cannot be kept alive.
        """
        check_room(self._fleet.readapt, ray.cluster_resources())
        os.environ.update(_SETTINGS)
        # Tune warns about each trial without a result file. Ours report to the searcher and write none.
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        queue = ray.remote(num_cpus=0)(JobQueue).remote()
        rounds = SearchRounds(self._fleet.readapt.search, lambda id, found: queue.set_found.remote(id, found))
        services = [_Service("the worker group", self._trainer(queue).fit)]
        if "fused" in self._fleet.readapt.ladder.rungs:  # the only rung that searches
            services.append(_Service("the search", self._tuner(queue, rounds).fit))
        unfinished: dict[int, AdapterJob] = {}
        try:
            while self._fill(jobs, unfinished, queue, rounds) or unfinished:
                updates = ray.get(queue.updates.remote(timeout_s=1.0))
                for version_id, groups in ray.get(queue.wanted.remote()):
                    rounds.add(version_id, groups)
                for version_id, update in updates:
                    if version_id not in unfinished:
                        continue  # from a worker presumed dead, whose successor has finished the job
                    yield unfinished[version_id], update
                    if not isinstance(update, RungReached):
                        del unfinished[version_id]
                        rounds.drop(version_id)
                for service in services:
                    service.check_alive()
                yield None
        finally:
            rounds.close()
            queue.close.remote()
        for service in services:
            service.join()
        shutil.rmtree(self._storage, ignore_errors=True)  # its trial folders only help to explain a failure

    def _fill(
        self, jobs: Iterator[AdapterJob], unfinished: dict[int, AdapterJob], queue: ActorHandle, rounds: SearchRounds
    ) -> bool:
        """Queue jobs until there is one too many for the workers; return False once `jobs` is exhausted."""
        workers = self._fleet.readapt.workers
        while len(unfinished) <= workers.num_workers * workers.adapters_per_worker:
            job = next(jobs, None)
            if job is None:
                return False
            unfinished[job.version_id] = job
            ray.get(queue.add.remote(job))
            rounds.warm_up(job.version_id)
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

    def _tuner(self, queue: ActorHandle, rounds: SearchRounds) -> tune.Tuner:
        trial = tune.with_parameters(FusionTrial, fleet=self._fleet, queue=queue)
        gpus = self._fleet.readapt.workers.gpus_per_worker
        return tune.Tuner(
            tune.with_resources(trial, {"cpu": TRIAL_CPUS, "gpu": gpus}),
            tune_config=tune.TuneConfig(search_alg=RoundSearcher(rounds), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=str(self._storage),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )


class _Service:
    """Something that runs in a daemon thread for as long as the campaign."""

    def __init__(self, name: str, run: Callable[[], object]):
        self._name = name
        self._error: Exception | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True, name=name)
        self._thread.start()

    def _run(self, run: Callable[[], object]) -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 (`join` raises it in the campaign's own thread)
            self._error = error
        self._has_ended = True

    def check_alive(self) -> None:
        """Raise TrainingError if it has died, or has ended although it is still needed."""
        if self._has_ended:
            self.join()
            raise TrainingError(f"On Ray, {self._name} ended before its work was done.")

    def join(self) -> None:
        """Wait for its end. Raises TrainingError if it died."""
        self._thread.join()
        if self._error is not None:
            raise TrainingError(f"On Ray, {self._name} failed: {self._error}") from self._error


def _device(fleet: Fleet) -> str:
    return "cuda" if fleet.readapt.workers.gpus_per_worker > 0 else "cpu"


def _work(config: dict[str, Any]) -> None:
    """Run one worker: take jobs from the queue, up to `workers.adapters_per_worker` at once, until there are no more.

    It asks for the next job only after the last one has arrived, so that the workers share the jobs evenly.
    """
    os.setpriority(os.PRIO_PROCESS, 0, TRAINING_NICENESS)
    fleet: Fleet = config["fleet"]
    queue: ActorHandle = config["queue"]
    rank = train.get_context().get_world_rank()
    jobs = ConcurrentJobs(Worker(fleet, _device(fleet)), partial(_poll_search, queue, {}))
    life = ray.get(queue.enter.remote(rank))
    asked: ray.ObjectRef | None = None
    is_over = False
    while True:
        if asked is None and not is_over and jobs.num_jobs < fleet.readapt.workers.adapters_per_worker:
            asked = queue.take.remote(rank, life)
        if is_over and not jobs.num_jobs:
            return
        ended: dict[Hashable, JobEnd] = {}
        if asked is not None and ray.wait([asked], timeout=0 if jobs.num_jobs else None)[0]:
            job = ray.get(asked)
            asked = None
            is_over = job is None
            if job is not None:
                ended |= jobs.begin(job, partial(queue.update.remote, rank, job.version_id))
        ended |= jobs.step() if jobs.num_jobs else {}
        for version_id, end in ended.items():
            ray.get(queue.update.remote(rank, version_id, end))


def _poll_search(
    queue: ActorHandle, searches: dict[int, ray.ObjectRef], job: AdapterJob, objective: FusionObjective
) -> SearchResult | None:
    """Start a job's search or return its result; None while it runs. `searches` holds the running ones, by version."""
    if job.version_id not in searches:
        searches[job.version_id] = queue.found.remote(job.version_id, objective.groups)
    if not ray.wait([searches[job.version_id]], timeout=SEARCH_POLL_S)[0]:
        return None
    found = ray.get(searches.pop(job.version_id))
    if isinstance(found, str):
        raise TrainingError(found)
    return refine(objective, found)


class FusionTrial(tune.Trainable):
    """One round of one adapter's search. Tune reuses the actor, which keeps the new base and the last objective."""

    def setup(self, config: dict[str, Any], fleet: Fleet, queue: ActorHandle) -> None:
        """Called once per actor."""
        self._worker = Worker(fleet, _device(fleet))
        self._queue = queue
        self._version_id: int | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Turn to another round, possibly of another adapter."""
        self._points = new_config["points"]
        if new_config["version_id"] != self._version_id:
            job = ray.get(self._queue.job.remote(new_config["version_id"]))
            self._objective = self._worker.objective(job)
            self._version_id = job.version_id
        return True

    def step(self) -> dict[str, Any]:
        """Score the whole round: return the losses on the search rows, and the lowest as Tune's metric."""
        losses = self._objective.losses(self._points)
        return {"loss": min(losses, default=math.inf), "losses": losses, tune.result.DONE: True}


class RoundSearcher(Searcher):
    """Presents the rounds of a campaign's searches to Tune as the trials of one long run."""

    def __init__(self, rounds: SearchRounds):
        super().__init__(metric="loss", mode="min")
        self._rounds = rounds

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's settings, None if there is none at present, or FINISHED."""
        if self._rounds.is_closed:
            return Searcher.FINISHED
        found = self._rounds.begin(trial_id)
        return None if found is None else {"version_id": found.version_id, "points": found.points}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass on a trial's losses."""
        self._rounds.end(trial_id, None if result is None or error else result["losses"])

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings to resume from; a campaign never does

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a campaign resumes from the registry."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing; see `save`."""


def spread(function: Callable[[ItemT], None], items: Sequence[ItemT], in_flight_per_cpu: int = 2) -> Iterator[ItemT]:
    """Call the function on every item, on all CPUs of the connected cluster; yield each item once it is done.

    The function is shipped once. The first error is raised when the calls under way have ended, so that none of them
    still writes files when the caller cleans up. We do not cancel them: if a call ends as `ray.cancel` arrives, Ray's
    core can end this process ("Tried to complete task that was not pending", ray 2.60).
    """
    shared = ray.put(function)
    call = ray.remote(num_cpus=1)(_call)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) * in_flight_per_cpu
    waiting: deque[ItemT] = deque(items)
    running: dict[ray.ObjectRef, ItemT] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                item = waiting.popleft()
                running[call.remote(shared, item)] = item
            done, _ = ray.wait(list(running))
            ray.get(done)
            yield from (running.pop(reference) for reference in done)
    finally:
        if running:
            ray.wait(list(running), num_returns=len(running))


def _call(function: Callable[[ItemT], None], item: ItemT) -> None:
    function(item)
