"""The search by Ray Tune and the workers by Ray Train, on one small local cluster."""

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.adapters.files import load_adapter
from cluster.config.readapt import LadderConfig, ReadaptConfig, SearchConfig, WorkersConfig
from cluster.config.settings import Fleet
from cluster.errors import ConfigError, TrainingError
from cluster.fleet import open_blobs
from cluster.on_ray import LocalCluster, connect
from cluster.registry.registry import Status, Version
from cluster.storage.checkpoints import open_checkpoint
from readapt.campaign.campaign import Campaign
from readapt.campaign.job_queue import MAX_CRASHES_PER_JOB, JobQueue
from readapt.campaign.jobs import AdapterJob, JobFailure, RungReached
from readapt.campaign.resources import check_room
from readapt.campaign.search_rounds import SearchRounds
from readapt.fusion.search import FusionObjective, SearchResult, find, split_valid
from readapt.lowrank.delta import base_evolution
from readapt.on_ray import RayExecutor, RoundSearcher, _Service
from readapt.training.data import encoder_for, load_task
from readapt.training.lora import load_base
from readapt.training.training_run import CurvePoint
from tests.worlds.fleets import make_fleet, registered


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(num_cpus=4) as running:
        connect(running.address)
        yield running


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet whose ladder has the search rung."""
    fleet = make_fleet(tmp_path)
    ladder = replace(fleet.readapt.ladder, rungs=("copy", "fused", "train", "scratch"))
    return replace(fleet, readapt=replace(fleet.readapt, ladder=ladder))


def make_job(version_id: int) -> AdapterJob:
    return AdapterJob(version_id, f"a{version_id}", (), "exact_match", "", None, Path(), Path())


@pytest.mark.ray
def test_a_campaign_on_ray_survives_a_killed_worker(cluster: LocalCluster, fleet: Fleet):
    valid = fleet.folder / "usual" / "data" / "valid.jsonl"
    valid.write_text((valid.read_text() + "\n") * 150)  # a second for each evaluation: time to be killed in
    registry = registered(fleet)
    killed = threading.Event()
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("usual@2: copy") and not killed.is_set():
            killed.set()
            for worker in _train_workers(cluster):
                worker.kill()

    started = time.monotonic()
    settled = Campaign(fleet, registry, open_blobs(fleet), "v2", RayExecutor(fleet), say=say).run()
    print("\n".join(lines), f"\n{time.monotonic() - started:.1f} s")
    assert killed.is_set()
    assert sorted(version.label for version in settled) == ["busy@2", "calm@2", "usual@2"]
    assert {version.status for version in settled} == {Status.CANDIDATE}
    for version in settled:
        _check_search(fleet, version)
    begun = [e.adapter for e in registry.events(kind="rung") if e.details["rung"] == "copy"]
    assert begun.count("busy") == 1
    assert begun.count("usual") == 2, "the interrupted job was done again"
    registry.close()


def _train_workers(cluster: LocalCluster) -> list[psutil.Process]:
    found = [p for p in cluster.processes() if "TrainWorker" in " ".join(p.cmdline())]
    assert found
    return found


def _check_search(fleet: Fleet, version: Version) -> None:
    """Check that trials and losses equal those of a search in this process, and that the best was taken."""
    config = fleet.readapt.search
    losses = {(t["point"]["alpha"], t["point"]["beta"]): t["loss"] for t in version.details["search"]}
    assert len(losses) == config.trials
    here = _search_here(fleet, version)
    assert losses == pytest.approx({(t.point.alpha, t.point.beta): t.loss for t in here.trials}, rel=1e-4)
    assert losses[version.details["alpha"], version.details["beta"]] == min(losses.values())
    assert all(0 <= alpha <= config.alpha_max and config.beta_min <= beta <= config.beta_max for alpha, beta in losses)


def _search_here(fleet: Fleet, version: Version) -> SearchResult:
    model, encoder = load_base(fleet.base("v2").path), encoder_for(fleet.base("v2").path, 32)
    spec = next(spec for spec in fleet.adapters if spec.name == version.adapter)
    bases = [open_checkpoint(fleet.base(name).path) for name in ("v1", "v2")]
    evolution, _ = base_evolution(*bases, rank=fleet.readapt.search.evolution_rank, energy=0.95)
    task, rows = load_adapter(spec.path), split_valid(load_task(spec.data).valid, fleet.readapt.search)[0]
    return find(FusionObjective(model, task, evolution, rows, encoder, fleet.readapt.search))


def test_a_service_that_ends_too_early_is_an_error():
    """Otherwise the campaign would wait forever for its results."""
    ended = _Service("the search", lambda: None)
    ended.join()
    with pytest.raises(TrainingError, match="the search ended before"):
        ended.check_alive()
    died = _Service("the search", lambda: {}["lost"])
    with pytest.raises(TrainingError, match="failed: 'lost'"):
        died.join()
    goes_on = threading.Event()
    alive = _Service("the search", goes_on.wait)
    alive.check_alive()
    goes_on.set()
    alive.join()


@pytest.mark.parametrize(
    ("rungs", "cluster", "words"),
    [
        (("copy", "fused"), {"CPU": 9.0, "GPU": 2.0}, "need 3 GPUs, the cluster has 2"),
        (("copy", "fused"), {"CPU": 2.0, "GPU": 3.0}, "need 2.5 CPUs, the cluster has 2"),
        (("copy", "train"), {"CPU": 2.0}, "need 2 GPUs, the cluster has 0"),
        (("copy", "train"), {"CPU": 2.0, "GPU": 2.0}, None),
        (("copy", "fused"), {"CPU": 2.5, "GPU": 3.0}, None),
    ],
)
def test_a_cluster_too_small_for_workers_and_search_is_refused_at_once(
    rungs: tuple[str, ...], cluster: dict[str, float], words: str | None
):
    """Otherwise the search would wait forever for the GPU of a worker that waits for the search."""
    config = ReadaptConfig(ladder=LadderConfig(rungs=rungs), workers=WorkersConfig(num_workers=2, gpus_per_worker=1.0))
    if words is None:
        check_room(config, cluster)
        return
    with pytest.raises(ConfigError, match=words):
        check_room(config, cluster)


# The queue and the search rounds need no Ray.


async def taken(queue: JobQueue, worker: int, life: int) -> int | None:
    job = await asyncio.wait_for(queue.take(worker, life), timeout=5)
    return None if job is None else job.version_id


async def waiting_for(queue: JobQueue, worker: int, life: int) -> asyncio.Task:
    task = asyncio.create_task(queue.take(worker, life))
    await asyncio.sleep(0.01)
    assert not task.done()
    return task


async def filled(*version_ids: int) -> JobQueue:
    queue = JobQueue()
    for version_id in version_ids:
        await queue.add(make_job(version_id))
    return queue


async def test_jobs_are_taken_in_order_until_the_queue_is_closed_and_none_is_held():
    queue = await filled(7, 5)
    await queue.close()
    lives = [await queue.enter(0), await queue.enter(1)]
    assert (await taken(queue, 0, lives[0]), await taken(queue, 1, lives[1])) == (7, 5)
    await queue.update(0, 7, JobFailure("its own fault"))
    idle = await waiting_for(queue, 0, lives[0])  # worker 1 may yet die with job 5
    await queue.update(1, 5, JobFailure("its own fault"))
    assert await idle is None
    assert [version_id for version_id, _ in await queue.updates(1.0)] == [7, 5]
    assert await queue.updates(0.01) == []


async def test_a_dead_workers_job_goes_to_its_successor_up_to_a_number_of_crashes():
    queue = await filled(7, 8)
    for _ in range(MAX_CRASHES_PER_JOB):
        assert await taken(queue, 0, await queue.enter(0)) == 7
    assert await taken(queue, 0, await queue.enter(0)) == 8
    ((version_id, report),) = await queue.updates(1.0)
    assert version_id == 7
    assert isinstance(report, JobFailure)
    assert "died" in report.error


async def test_a_dead_worker_that_was_waiting_gets_no_job():
    queue = JobQueue()
    first = await queue.enter(0)
    dead = await waiting_for(queue, 0, first)
    second = await queue.enter(0)
    successor = await waiting_for(queue, 0, second)
    await queue.add(make_job(7))
    assert await dead is None
    assert (await successor).version_id == 7
    await queue.add(make_job(8))
    assert await taken(queue, 0, first) is None, "the call was under way when its worker died"


async def test_a_late_update_of_a_dead_worker_does_not_end_its_successors_job():
    queue = await filled(7, 8)
    await taken(queue, 0, await queue.enter(0))
    for expected in (7, 8):
        life = await queue.enter(0)
        assert await taken(queue, 0, life) == expected
        await queue.update(0, 7, JobFailure("a late update"))
    assert await taken(queue, 0, await queue.enter(0)) == 8, "it was still held, so it is queued again"


async def test_a_dead_workers_jobs_are_retried_alone_and_only_the_cause_is_given_up():
    """Job 8 kills any worker; 7 and 9 only shared one with it. Later jobs share a worker again."""
    queue = await filled(7, 8, 9, 5, 6)
    life = await queue.enter(0)
    assert [await taken(queue, 0, life) for _ in range(3)] == [7, 8, 9]
    life = await queue.enter(0)
    assert await taken(queue, 0, life) == 7
    another = await waiting_for(queue, 0, life)
    await queue.update(0, 7, JobFailure("its own fault"))
    assert (await another).version_id == 8
    for _ in range(MAX_CRASHES_PER_JOB - 1):
        assert await taken(queue, 0, await queue.enter(0)) == 8
    life = await queue.enter(0)
    assert await taken(queue, 0, life) == 9
    await queue.update(0, 9, JobFailure("its own fault"))
    assert [await taken(queue, 0, life) for _ in range(2)] == [5, 6]
    failed = {version_id: report.error for version_id, report in await queue.updates(1.0)}
    assert {version_id for version_id, error in failed.items() if "died" in error} == {8}


async def test_a_suspect_waits_for_an_idle_worker_and_then_lets_the_next_jobs_pass():
    queue = await filled(7, 8, 9)
    lives = [await queue.enter(0), await queue.enter(1)]
    assert [await taken(queue, worker, lives[worker]) for worker in (0, 1)] == [7, 8]
    lives[1] = await queue.enter(1)
    full = await waiting_for(queue, 0, lives[0])
    assert await taken(queue, 1, lives[1]) == 8
    assert (await full).version_id == 9


async def test_workers_share_jobs_evenly():
    queue = JobQueue()
    lives = [await queue.enter(0), await queue.enter(1)]
    asked = [await waiting_for(queue, worker, lives[worker]) for worker in (0, 1)]
    for first in (5, 7):
        for version_id in (first, first + 1):
            await queue.add(make_job(version_id))
        assert [(await task).version_id for task in asked] == [first, first + 1]
        asked = [asyncio.create_task(queue.take(worker, lives[worker])) for worker in (0, 1)]
    for task in asked:
        task.cancel()


async def test_a_worker_waits_for_its_own_search_and_a_rung_does_not_end_a_job():
    queue = await filled(7)
    await queue.close()
    await taken(queue, 0, await queue.enter(0))
    await queue.update(0, 7, RungReached("copy", CurvePoint(0, 0.0, 1.0, 50.0), 0.1))
    waiting = asyncio.create_task(queue.found(7, ("mlp",)))
    await queue.set_found(8, "another's")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert await queue.wanted() == [(7, ("mlp",))]
    await queue.set_found(7, "nothing found")
    assert await waiting == await queue.found(7, ("mlp",)) == "nothing found"
    assert await queue.wanted() == [], "each search runs once"
    assert await taken(queue, 0, await queue.enter(0)) == 7, "it was still held, so it is queued again"


def play(rounds: SearchRounds, *names: str) -> list[tuple[int, int] | None]:
    """Begin rounds with these ids; return the adapter and the number of candidates of each."""
    asked = [rounds.begin(name) for name in names]
    return [(found.version_id, len(found.points)) if found is not None else None for found in asked]


def end(rounds: SearchRounds, **num_points: int) -> None:
    for name, number in num_points.items():
        rounds.end(name, [1.0] * number)


def test_rounds_serve_adapters_in_the_order_they_were_added():
    results: dict[int, SearchResult | str] = {}
    rounds = SearchRounds(SearchConfig(trials=12, batch=8), results.__setitem__)
    assert play(rounds, "idle") == [None]
    rounds.add(3)
    rounds.add(2)
    for name, expected in zip("abcd", [(3, 8), (3, 4), (2, 8), (2, 4)], strict=True):
        assert play(rounds, name) == [expected]
        end(rounds, **{name: expected[1]})
    assert play(rounds, "idle") == [None]
    assert list(results) == [3, 2]
    assert all(isinstance(found, SearchResult) and len(found.trials) == 12 for found in results.values())


def test_tune_gets_the_rounds_and_their_end():
    results: dict[int, SearchResult | str] = {}
    rounds = SearchRounds(SearchConfig(trials=3), results.__setitem__)
    searcher = RoundSearcher(rounds)
    assert searcher.suggest("idle") is None
    rounds.add(3)
    settings = searcher.suggest("a")
    assert (settings["version_id"], len(settings["points"])) == (3, 3)
    searcher.on_trial_complete("a", {"losses": [3.0, 1.0, 2.0]})
    assert results[3].point == settings["points"][1]
    rounds.close()
    assert searcher.suggest("over") == "FINISHED"


def test_no_round_begins_after_the_end():
    rounds = SearchRounds(SearchConfig(trials=3), lambda version_id, found: None)
    rounds.add(3)
    rounds.close()
    assert play(rounds, "late") == [None]


def test_the_first_rounds_are_empty_and_load_the_base():
    rounds = SearchRounds(SearchConfig(concurrency=2), lambda version_id, found: None)
    rounds.warm_up(7)
    rounds.warm_up(8)
    assert play(rounds, "a", "b", "c") == [(7, 0), (7, 0), None]
    end(rounds, a=0, b=0)
    assert play(rounds, "d") == [None]


def test_concurrent_rounds_are_of_different_adapters_if_possible():
    rounds = SearchRounds(SearchConfig(trials=24, batch=8, concurrency=3), lambda version_id, found: None)
    rounds.add(3)
    rounds.add(2)
    assert play(rounds, *"abcd") == [(3, 8), (2, 8), (3, 8), None]
    rounds.drop(3)
    end(rounds, a=8)
    assert play(rounds, "e") == [(2, 8)]


def test_a_search_without_any_result_reports_an_error():
    results: dict[int, SearchResult | str] = {}
    rounds = SearchRounds(SearchConfig(trials=3), results.__setitem__)
    rounds.add(3)
    assert play(rounds, "a") == [(3, 3)]
    rounds.end("a", None)
    assert "has no result: every round of candidates failed" in results[3]
