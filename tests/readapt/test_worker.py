"""Several jobs in one process: their bases are kept apart, and each job ends as it would alone."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.adapters.files import save_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs
from readapt.campaign.concurrent_jobs import ConcurrentJobs
from readapt.campaign.jobs import AdapterJob, AdapterResult, JobEnd, JobFailure, JobUpdate, RungReached
from readapt.campaign.worker import Worker, has_labels
from readapt.fusion.objective import FusionObjective, SearchResult
from readapt.fusion.points import CORNERS
from readapt.ladder.outcome import Outcome
from readapt.training.data import Encoder, Row, encoder_for
from tests.worlds.executors import LocalExecutor
from tests.worlds.readapt import MAX_TOKENS, evolve, make_task, train_specialist, try_points, write_task
from tests.worlds.serving import make_checkpoint

SETTINGS = f"""
name = "two-old-bases"
[readapt.train]
full_steps = 60
short_steps = 20
scratch_steps = 40
eval_every = 10
learning_rate = 4e-3
max_tokens = {MAX_TOKENS}
[readapt.gate]
tolerance_points = 2.0
"""


@dataclass(frozen=True)
class Scenario:
    """A fleet, and a job from each of two old bases; the new base is close to the second."""

    fleet: Fleet
    from_v1: AdapterJob
    from_v2: AdapterJob


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("workbench")
    (folder / "fleet.toml").write_text(SETTINGS)
    fleet = load_fleet(folder / "fleet.toml")
    v1 = make_checkpoint(folder / "v1", std=0.08)
    v2 = evolve(v1, folder / "v2", rank=4, scale=1.0)
    v3 = evolve(v2, folder / "v3", rank=1, scale=0.01, seed=8)
    task, encoder = make_task(), encoder_for(v1, MAX_TOKENS)
    data = write_task(folder / "data", task)
    jobs = []
    for version_id, old in enumerate((v1, v2)):
        save_adapter(train_specialist(old, encoder, task), folder / f"adapter{version_id}")
        key = open_blobs(fleet).put_folder(folder / f"adapter{version_id}")
        jobs.append(AdapterJob(version_id, f"a{version_id}", (data,), "exact_match", key, None, old, v3))
    return Scenario(fleet, *jobs)


def configured(fleet: Fleet, rungs: tuple[str, ...], adapters_per_worker: int = 1) -> Fleet:
    ladder = replace(fleet.readapt.ladder, rungs=rungs)
    workers = replace(fleet.readapt.workers, adapters_per_worker=adapters_per_worker)
    return replace(fleet, readapt=replace(fleet.readapt, ladder=ladder, workers=workers))


def run(
    fleet: Fleet, jobs: Sequence[AdapterJob], rungs: tuple[str, ...], adapters_per_worker: int = 1
) -> dict[int, list[JobUpdate]]:
    fleet = configured(fleet, rungs, adapters_per_worker)
    updates: dict[int, list[JobUpdate]] = {job.version_id: [] for job in jobs}

    def refuse(objective: object) -> None:
        raise AssertionError("no rung here is searched for")

    for job, update in filter(None, LocalExecutor(fleet, refuse).run(iter(jobs))):
        updates[job.version_id].append(update)
    return updates


def outcome(updates: Sequence[JobUpdate]) -> Outcome:
    *reached, last = updates
    assert all(isinstance(update, RungReached) for update in reached)
    assert isinstance(last, AdapterResult), last
    return last.outcome


def assert_same_climb(one: Outcome, other: Outcome) -> None:
    assert (one.rung, one.accepted, one.reference) == (other.rung, other.accepted, other.reference)
    assert one.quality == pytest.approx(other.quality, abs=2.0)
    for mine, theirs in zip(one.attempts, other.attempts, strict=True):
        assert mine.rung == theirs.rung
        assert [p.step for p in mine.curve] == [p.step for p in theirs.curve]
        assert [p.loss for p in mine.curve] == pytest.approx([p.loss for p in theirs.curve], rel=1e-2)


def test_adapters_of_two_old_bases_are_evaluated_on_the_model_they_are_trained_on(scenario: Scenario) -> None:
    jobs = [scenario.from_v1, scenario.from_v2]
    together = run(scenario.fleet, jobs, ("scratch",))
    for job in jobs:
        mine = outcome(together[job.version_id])
        assert_same_climb(mine, outcome(run(scenario.fleet, [job], ("scratch",))[job.version_id]))
        [attempt] = mine.attempts
        assert attempt.curve[-1].loss < 0.7 * attempt.curve[0].loss, "evaluations see the trained weights"


def test_rows_of_all_folders_are_joined_and_prompts_without_rows_are_answered(
    scenario: Scenario, tmp_path: Path
) -> None:
    task = make_task()
    more = write_task(tmp_path / "more", replace(task, train=[Row("zz=", "zed")], valid=[Row("z9=", "zed")]))
    (more / "test.jsonl").unlink()  # a stage of `relora continual` has none
    logged = tmp_path / "logged"
    logged.mkdir()
    prompts = [row.prompt for row in task.test[:20]]
    (logged / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    job = replace(scenario.from_v2, data=(*scenario.from_v2.data, more, logged))
    found = Worker(scenario.fleet)._task(job)
    assert found.train[:301] == [*task.train, Row("zz=", "zed")]
    assert found.valid[:121] == [*task.valid, Row("z9=", "zed")]
    answered = {row.prompt: row.completion for row in (*found.train[301:], *found.valid[121:])}
    assert answered.keys() <= set(prompts)
    assert len(answered) > 10
    assert not has_labels(job)
    assert has_labels(replace(job, data=job.data[:2]))


def test_a_result_carries_only_one_adapter(scenario: Scenario) -> None:
    done = outcome(run(scenario.fleet, [scenario.from_v2], ("copy",))[1])
    assert done.accepted
    assert done.ready is None


def test_there_are_as_many_golden_completions_as_configured(scenario: Scenario) -> None:
    fleet = replace(scenario.fleet, rollout=replace(scenario.fleet.rollout, golden_prompts=2))
    result = run(fleet, [scenario.from_v2], ("copy",))[1][-1]
    assert isinstance(result, AdapterResult)
    prompts = list(dict.fromkeys(row.prompt for row in make_task().valid))
    assert [answer["prompt"] for answer in result.golden] == prompts[:2]
    assert result.golden[0]["completion"] == make_task().valid[0].completion


def test_concurrent_jobs_end_as_they_would_alone_though_one_fails(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job trains, one passes as a copy, and one has a row that cannot be encoded, late in its training."""
    monkeypatch.setattr(Encoder, "fault", lambda encoder, row: None)  # otherwise the row is left out
    task = make_task()
    bad_rows = [*task.train[:80], Row("too long", "x" * MAX_TOKENS)]
    data = write_task(tmp_path / "bad", replace(task, train=bad_rows))
    jobs = [scenario.from_v1, scenario.from_v2, replace(scenario.from_v1, version_id=2, data=(data,))]
    together, alone = (run(scenario.fleet, jobs, ("copy", "train"), number) for number in (3, 1))
    for updates in (together, alone):
        failed = updates[2][-1]
        assert isinstance(failed, JobFailure)
        assert "InvalidDataError: a completion leaves no room" in failed.error
        assert any(isinstance(update, RungReached) for update in updates[2]), "it had reached some rungs"
    assert [outcome(together[key]).rung for key in (0, 1)][1] == "copy"
    assert outcome(together[0]).rung in ("short", "full")
    for key in (0, 1):
        assert_same_climb(outcome(together[key]), outcome(alone[key]))


def test_other_jobs_train_while_one_waits_for_its_search(scenario: Scenario) -> None:
    reached: dict[int, list[RungReached]] = {0: [], 1: []}
    num_asked = 0

    def search(job: AdapterJob, objective: FusionObjective) -> SearchResult | None:
        nonlocal num_asked
        num_asked += job.version_id
        is_found = job.version_id == 0 or any(update.point.step == 20 for update in reached[0])
        return try_points(objective, CORNERS) if is_found else None

    concurrent = ConcurrentJobs(Worker(configured(scenario.fleet, ("fused", "train"))), search)
    ended: dict[Hashable, JobEnd] = {}
    for job in (scenario.from_v2, scenario.from_v1):  # the search of the first takes its time
        assert concurrent.begin(job, reached[job.version_id].append) == {}
    while concurrent.num_jobs:
        ended |= concurrent.step()
    assert num_asked > 20
    assert all(isinstance(end, AdapterResult) and end.search is not None for end in ended.values())
    assert len(ended) == 2
