"""Re-adaptation on Ray: one worker group of Ray Train and one run of Ray Tune for a whole campaign, fed by an actor.

Workers and trial actors import torch and load the bases once. A trainer or a tuner for each adapter would cost about
ten seconds each (ray 2.60, 4 cores, 2026-11), more than a small adapter's own training. Jobs are searched in the order
of the queue, ahead of the workers: by the time that a copy has failed its gate, its (alpha, beta) is mostly there.

Results travel through the queue actor, not `ray.train.report`, which is a barrier over all workers and waits for the
controller's next poll. When a worker dies, Ray Train restarts the group and the jobs in the air are queued again.
"""

import logging
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.tune.search import Searcher
from ray.tune.search.hyperopt import HyperOptSearch

from cluster.config import Fleet, SearchConfig
from cluster.errors import TrainingError
from readapt.job_queue import JobQueue
from readapt.search import CORNERS, FusionObjective, SearchResult, Trial, best_of, space
from readapt.workbench import AdapterJob, Report, RungReached, Workbench, attempt

MAX_WORKER_GROUP_RESTARTS = 16
TRIAL_CPUS = 0.5  # trials are short and share the cores with the workers
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the registry is what a campaign resumes from
    "RAY_AIR_NEW_OUTPUT": "0",
}


class RayExecutor:
    """Runs jobs on the connected Ray cluster; see `workbench.Executor`.

    `storage` takes the small files that Ray Train and Tune write; on a cluster of several machines a shared folder.
    Needs `num_workers * cpus_per_worker + concurrency / 2` CPUs free, or it waits for them.
    """

    def __init__(self, fleet: Fleet, storage: Path | None = None):
        self._fleet = fleet
        self._storage = (storage or fleet.folder / ".cache" / "ray") / uuid.uuid4().hex  # its own, to be removed after

    def run(self, jobs: Iterator[AdapterJob]) -> Iterator[tuple[AdapterJob, Report]]:
        """See `Executor.run`. One job more than there are workers is drawn, so that its search can run ahead.

        TrainingError when the worker group or the search cannot be kept alive.
        """
        os.environ.update(_SETTINGS)
        # Its warning is a line for each trial that has no result file; ours report to the searcher and write none.
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        queue = ray.remote(num_cpus=0)(JobQueue).remote()
        search = FleetSearch(self._fleet.readapt.search, lambda id, found: queue.set_found.remote(id, found))
        services = [
            _Service("the worker group", self._trainer(queue).fit),
            _Service("the search", self._tuner(queue, search).fit),
        ]
        in_the_air: dict[int, AdapterJob] = {}
        try:
            while self._fill(jobs, in_the_air, queue, search) or in_the_air:
                for version_id, report in ray.get(queue.reports.remote(timeout_s=1.0)):
                    if version_id not in in_the_air:
                        continue  # the last word of a worker whose successor has settled the job meanwhile
                    yield in_the_air[version_id], report
                    if not isinstance(report, RungReached):
                        del in_the_air[version_id]
                        search.drop(version_id)
                for service in services:
                    service.check_alive()
        finally:
            search.close()
            queue.close.remote()
        for service in services:
            service.join()
        shutil.rmtree(self._storage, ignore_errors=True)  # a folder for each trial, of no use but to explain a failure

    def _fill(
        self, jobs: Iterator[AdapterJob], in_the_air: dict[int, AdapterJob], queue: ActorHandle, search: "FleetSearch"
    ) -> bool:
        while len(in_the_air) <= self._fleet.readapt.workers.num_workers:
            job = next(jobs, None)
            if job is None:
                return False
            in_the_air[job.version_id] = job
            ray.get(queue.add.remote(job))
            search.add(job.version_id)
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


def _device(fleet: Fleet) -> str:
    return "cuda" if fleet.readapt.workers.gpus_per_worker > 0 else "cpu"


def _work(config: dict[str, Any]) -> None:
    """One worker's life: job after job from the queue, with the bases held."""
    queue, rank = config["queue"], train.get_context().get_world_rank()
    bench = Workbench(config["fleet"], _device(config["fleet"]))

    def search(job: AdapterJob, objective: FusionObjective) -> SearchResult:
        found = ray.get(queue.found.remote(job.version_id))
        if isinstance(found, str):
            raise TrainingError(found)
        return found

    while (job := ray.get(queue.take.remote(rank))) is not None:
        report = partial(queue.report.remote, rank, job.version_id)
        ray.get(report(attempt(bench, job, search, report)))


class FusionTrial(tune.Trainable):
    """One (alpha, beta) of one adapter. The actor is reused, and keeps the new base and the last adapter's fusion."""

    def setup(self, config: dict[str, Any], fleet: Fleet, queue: ActorHandle) -> None:
        """Called once for each actor."""
        self._bench = Workbench(fleet, _device(fleet))
        self._queue = queue
        self._version_id: int | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Turns to another trial, maybe of another adapter."""
        self._point = new_config["alpha"], new_config["beta"]
        if new_config["version_id"] != self._version_id:
            job = ray.get(self._queue.job.remote(new_config["version_id"]))
            self._objective = self._bench.objective(job)
            self._version_id = job.version_id
        return True

    def step(self) -> dict[str, Any]:
        """The whole trial: the loss on the search rows."""
        return {"loss": self._objective.loss(*self._point), tune.result.DONE: True}


class _AdapterSearch:
    """One adapter's search: TPE that starts with the corners."""

    def __init__(self, version_id: int, config: SearchConfig):
        self.version_id = version_id
        self._num_trials = max(config.trials, len(CORNERS))
        self._num_suggested = 0
        self._num_ended = 0
        self._trials: dict[str, Trial] = {}
        self._points: dict[str, dict[str, float]] = {}
        bounds = {name: tune.uniform(low, high) for name, (low, high) in space(config).items()}
        corners = [{"alpha": alpha, "beta": beta} for alpha, beta in CORNERS]
        # HyperOpt's default is 20 random points before the model of the losses is asked at all.
        num_random = (self._num_trials - len(CORNERS)) // 3
        self._tpe = HyperOptSearch(
            points_to_evaluate=corners,
            n_initial_points=len(CORNERS) + num_random,
            random_state_seed=config.seed,
        )
        self._tpe.set_search_properties("loss", "min", bounds)

    @property
    def can_suggest(self) -> bool:
        return self._num_suggested < self._num_trials

    @property
    def is_over(self) -> bool:
        return self._num_ended == self._num_trials

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self._num_suggested += 1
        point = {name: float(value) for name, value in (self._tpe.suggest(trial_id) or {}).items()}
        self._points[trial_id] = point
        return {**point, "version_id": self.version_id}

    def end(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        self._num_ended += 1
        self._tpe.on_trial_complete(trial_id, result, error)
        if result is not None and not error:
            self._trials[trial_id] = Trial(**self._points[trial_id], loss=result["loss"])

    def found(self) -> SearchResult | str:
        if not self._trials:
            return "no trial of the search for (alpha, beta) could be carried out"
        return best_of(list(self._trials.values()))


class FleetSearch(Searcher):
    """Makes one long run of Tune out of the searches of many adapters, one after the other; `report` gets each result.

    Called by Tune's thread and by the campaign's.
    """

    def __init__(self, config: SearchConfig, report: Callable[[int, SearchResult | str], None]):
        super().__init__(metric="loss", mode="min")
        self._config = config
        self._report = report
        self._lock = threading.Lock()
        self._searches: deque[_AdapterSearch] = deque()
        self._by_trial: dict[str, _AdapterSearch] = {}
        self._is_closed = False

    def add(self, version_id: int) -> None:
        """An adapter whose (alpha, beta) will be wanted."""
        with self._lock:
            self._searches.append(_AdapterSearch(version_id, self._config))

    def drop(self, version_id: int) -> None:
        """The adapter's (alpha, beta) is not wanted any more."""
        with self._lock:
            self._searches = deque(search for search in self._searches if search.version_id != version_id)

    def close(self) -> None:
        """Nothing will be wanted any more."""
        with self._lock:
            self._is_closed = True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Tune asks for the next trial: None for none at present, FINISHED for the end of the run."""
        with self._lock:
            if self._is_closed:
                return Searcher.FINISHED
            if len(self._by_trial) >= self._config.concurrency:
                return None
            search = next((search for search in self._searches if search.can_suggest), None)
            if search is None:
                return None
            self._by_trial[trial_id] = search
            return search.suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune says that a trial is over."""
        with self._lock:
            search = self._by_trial.pop(trial_id)
            search.end(trial_id, result, error)
            if search.is_over:
                self._report(search.version_id, search.found())

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a pickled copy of its settings for a resume that a campaign never asks for

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a campaign resumes from the registry."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
