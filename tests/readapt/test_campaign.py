"""The campaign's state machine on a real registry, blob store and ladder, without Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.adapters.files import load_adapter
from cluster.config.settings import Fleet
from cluster.errors import ConflictError, NotFoundError, StorageError
from cluster.fleet import open_blobs, register_base
from cluster.registry.records import jsonable
from cluster.registry.registry import Registry, Status
from cluster.storage.blobs import BlobStore, content_hash
from readapt.campaign.base_pair import EVOLUTION
from readapt.campaign.campaign import Campaign, in_background
from readapt.campaign.jobs import AdapterJob, JobFailure, JobUpdate, JobUpdates
from readapt.fusion.points import CORNERS
from tests.worlds.executors import LocalExecutor, Scripted, result_for
from tests.worlds.fleets import make_fleet
from tests.worlds.readapt import try_points
from tests.worlds.serving import make_adapter, make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ladder has the search rung, in which a test can pause."""
    folder = make_fleet(tmp_path_factory.mktemp("world")).folder
    with (folder / "fleet.toml").open("a") as file:
        file.write('\n[readapt.ladder]\nrungs = ["copy", "fused", "train", "scratch"]\n')
    return folder


def corners(objective):
    return try_points(objective, CORNERS)


def campaign(fleet: Fleet, registry: Registry, executor=None, target: str = "v2", lease_s: float = 10.0, say=None):
    executor = executor or LocalExecutor(fleet, corners)
    say = say or (lambda line: None)
    return Campaign(fleet, registry, open_blobs(fleet), target, executor, lease_s=lease_s, say=say)


def test_every_adapter_is_carried_over_the_busiest_first(fleet: Fleet, registry: Registry):
    lines: list[str] = []
    settled = campaign(fleet, registry, say=lines.append).run()
    assert [version.label for version in settled] == ["busy@2", "usual@2", "calm@2"]
    blobs = open_blobs(fleet)
    for version in settled:
        assert (version.status, version.base) == (Status.CANDIDATE, "v2")
        assert registry.version(version.parent_id).label == f"{version.adapter}@1"
        assert version.content_hash == content_hash(blobs.fetch_folder(version.blob_key))
        shipped = load_adapter(blobs.fetch_folder(version.blob_key))
        assert shipped.max_rank > 0
        assert shipped.base_model == str(fleet.base("v2").path), "its files name the new base"
        details = version.details
        assert details["rung"] in ("fused", "short", "full", "scratch"), "the copy fails in this world"
        assert details["copy_quality"] < version.quality
        assert version.quality >= details["reference_quality"] - 5.0
        assert len(details["golden"]) == fleet.rollout.golden_prompts
        assert len(details["search"]) == len(CORNERS)
        assert details["seconds"]["total"] >= details["seconds"]["climb"] > 0
        rungs = registry.events(kind="rung", version_id=version.id)
        assert [event.details["rung"] for event in rungs][:2] == ["copy", "fused"]
        assert registry.routes()[version.adapter].live.number == 1, "the old version stays live"
    assert any("busy@2: candidate" in line for line in lines)


def test_a_second_campaign_finds_nothing_to_do(fleet: Fleet, registry: Registry):
    campaign(fleet, registry, Scripted(lambda job: result_for(fleet, job))).run()
    again = Scripted(lambda job: result_for(fleet, job))
    assert campaign(fleet, registry, again).run() == []
    assert again.jobs == []
    assert len(registry.events(kind=EVOLUTION)) == 1


def test_one_bad_adapter_does_not_stop_the_others_and_is_tried_again_later(fleet: Fleet, registry: Registry):
    valid = fleet.folder / "usual" / "data" / "valid.jsonl"
    good = valid.read_text()
    valid.write_text("{oops\n")
    by_name = {version.adapter: version for version in campaign(fleet, registry).run()}
    assert by_name["usual"].status is Status.FAILED
    assert "valid.jsonl:1" in by_name["usual"].details["error"]
    assert by_name["busy"].status is by_name["calm"].status is Status.CANDIDATE
    valid.write_text(good)
    (again,) = campaign(fleet, registry).run()
    assert (again.label, again.status) == ("usual@2", Status.CANDIDATE)
    assert len(registry.events(kind=EVOLUTION)) == 1, "the evolution was kept"


def test_an_adapter_of_another_shape_fails_with_both_shapes(fleet: Fleet, registry: Registry):
    wide = make_checkpoint(fleet.folder / "wide", hidden_size=72, num_attention_heads=6, head_dim=12)
    fleet = replace(fleet, bases=(*fleet.bases, replace(fleet.bases[0], name="wide", path=wide)))
    register_base(fleet, registry, "wide")
    registry.add_adapter("stranger", data="rows", traffic=100.0)
    key = open_blobs(fleet).put_folder(make_adapter(fleet.folder / "stranger", wide))
    registry.add_version("stranger", "wide", Status.LIVE, blob_key=key)
    executor = Scripted(lambda job: result_for(fleet, job))
    first = campaign(fleet, registry, executor).run()[0]
    assert (first.label, first.status) == ("stranger@2", Status.FAILED)
    assert "hidden_size 60" in first.details["error"]
    assert "hidden_size 72" in first.details["error"]
    assert "from scratch" in first.details["error"]
    assert executor.jobs == ["busy", "usual", "calm"]


def test_an_adapter_without_rows_fails_with_a_clear_error(fleet: Fleet, registry: Registry):
    """A client may have uploaded it over HTTP. Rows in the current folder are not its own."""
    key = registry.routes()["busy"].live.blob_key
    registry.add_adapter("brought", traffic=100.0)
    registry.add_version("brought", "v1", Status.LIVE, blob_key=key)
    executor = Scripted(lambda job: result_for(fleet, job))
    first = campaign(fleet, registry, executor).run()[0]
    assert (first.label, first.status) == ("brought@2", Status.FAILED)
    assert "no rows to judge it by" in first.details["error"]
    assert executor.jobs == ["busy", "usual", "calm"]


def test_a_replaced_live_version_is_not_carried_over_but_its_successor_is(fleet: Fleet, registry: Registry):
    def fail(job: AdapterJob) -> JobUpdate:
        return JobFailure("the first campaign fails")

    campaign(fleet, registry, Scripted(fail)).run()
    old = registry.routes()["busy"].live
    new = registry.add_version("busy", "v1", Status.RETIRED, blob_key=registry.routes()["calm"].live.blob_key)
    registry.promote(new.id)
    jobs: list[AdapterJob] = []

    def keep(job: AdapterJob) -> JobUpdate:
        jobs.append(job)
        return result_for(fleet, job)

    campaign(fleet, registry, Scripted(keep)).run()
    assert [job.task_key for job in jobs if job.adapter == "busy"] == [new.blob_key]
    stale, fresh = registry.versions(adapter="busy", base="v2")
    assert (stale.parent_id, stale.status) == (old.id, Status.FAILED)
    assert (fresh.parent_id, fresh.status) == (new.id, Status.CANDIDATE)
    assert campaign(fleet, registry, Scripted(keep)).run() == []


def test_adapters_already_on_the_target_are_left_alone(fleet: Fleet, registry: Registry):
    executor = Scripted(lambda job: result_for(fleet, job))
    assert campaign(fleet, registry, executor, target="v1").run() == []
    assert executor.jobs == []


def test_an_adapter_that_cannot_be_stored_fails_alone(
    fleet: Fleet, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    store = BlobStore.put_folder
    puts: list[Path] = []

    def refuse_the_second(self: BlobStore, folder: Path) -> str:
        puts.append(folder)
        if len(puts) == 3:  # after the evolution and the first adapter
            raise StorageError("no space left")
        return store(self, folder)

    monkeypatch.setattr(BlobStore, "put_folder", refuse_the_second)
    settled = campaign(fleet, registry, Scripted(lambda job: result_for(fleet, job))).run()
    assert {version.adapter: version.status for version in settled} == {
        "busy": Status.CANDIDATE,
        "usual": Status.FAILED,
        "calm": Status.CANDIDATE,
    }
    assert "no space left" in registry.versions(adapter="usual", base="v2")[0].details["error"]


def test_a_changed_tokenizer_is_reported(fleet: Fleet, registry: Registry):
    file = fleet.base("v2").path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    lines: list[str] = []
    campaign(fleet, registry, Scripted(lambda job: result_for(fleet, job)), say=lines.append).run()
    assert any("another tokenizer: 0 tokens were added" in line for line in lines)


def test_a_version_that_misses_the_gate_is_rejected_and_not_tried_again(fleet: Fleet, registry: Registry):
    settled = campaign(
        fleet, registry, Scripted(lambda job: result_for(fleet, job, accepted=job.adapter != "busy"))
    ).run()
    assert {v.adapter: v.status for v in settled} == {
        "busy": Status.REJECTED,
        "usual": Status.CANDIDATE,
        "calm": Status.CANDIDATE,
    }
    assert settled[0].blob_key is None
    assert registry.routes()["busy"].live.number == 1
    assert campaign(fleet, registry, Scripted(lambda job: result_for(fleet, job))).run() == []


def test_changed_weights_under_an_old_name_are_refused(fleet: Fleet, registry: Registry):
    register_base(fleet, registry, "v2")
    make_checkpoint(fleet.folder / "v2", seed=7)
    with pytest.raises(ConflictError, match="other weights"):
        campaign(fleet, registry).run()
    with pytest.raises(NotFoundError, match="v9"):
        campaign(fleet, registry, target="v9").run()
    assert registry.versions(base="v2") == []


def test_an_interrupted_campaign_puts_its_adapters_back(fleet: Fleet, registry: Registry):
    def interrupt(job: AdapterJob) -> JobUpdate:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        campaign(fleet, registry, Scripted(interrupt)).run()
    assert {version.status for version in registry.versions(base="v2")} == {Status.PLANNED}


def test_concurrent_campaigns_share_the_work(fleet: Fleet, registry: Registry):
    def slowly(job: AdapterJob) -> JobUpdate:
        time.sleep(0.3)
        return result_for(fleet, job)

    executors = [Scripted(slowly) for _ in range(3)]
    threads = [threading.Thread(target=campaign(fleet, registry, e, lease_s=4.0).run) for e in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for e in executors for name in e.jobs) == ["busy", "calm", "usual"]
    done = registry.versions(base="v2", statuses=[Status.CANDIDATE])
    assert sorted(version.adapter for version in done) == ["busy", "calm", "usual"]


def test_a_dead_campaign_loses_its_adapter_and_a_living_one_does_not(fleet: Fleet, registry: Registry):
    campaign(fleet, registry, Scripted(lambda job: JobFailure("only to make the versions"))).run()
    busy, usual, _ = sorted(registry.versions(base="v2"), key=lambda version: version.adapter)[:3]
    for version, owner in ((busy, "dead"), (usual, "alive")):
        registry.move(version.id, Status.FAILED, Status.PLANNED)
        registry.move(version.id, Status.PLANNED, Status.ADAPTING, details={"campaign": owner})
    registry.beat("dead")
    registry.beat("alive")
    over = threading.Event()

    def live_for_a_while() -> None:
        for _ in range(20):
            registry.beat("alive")
            time.sleep(0.1)
        registry.move(usual.id, Status.ADAPTING, Status.FAILED, details={"error": "by its owner"})
        over.set()

    threading.Thread(target=live_for_a_while).start()
    executor = Scripted(lambda job: result_for(fleet, job))
    campaign(fleet, registry, executor, lease_s=0.6).run()
    assert over.is_set(), "it waited for the living campaign to settle its adapter"
    assert registry.version(busy.id).status is Status.CANDIDATE
    assert executor.jobs.count(busy.adapter) == 1


VICTIM = """
import sys, time
from pathlib import Path
from cluster.config.fleet_file import load_fleet
from cluster.fleet import open_blobs, open_registry
from readapt.campaign.campaign import Campaign
from readapt.fusion.points import CORNERS
from tests.worlds.executors import LocalExecutor, Scripted, result_for
from tests.worlds.readapt import try_points

fleet = load_fleet(Path(sys.argv[1]))
searches = []

def search(objective):
    searches.append(objective)
    if len(searches) == 2:
        print("SEARCHING", flush=True)
        time.sleep(600)
    return try_points(objective, CORNERS)

executor = LocalExecutor(fleet, search)
Campaign(fleet, open_registry(fleet), open_blobs(fleet), "v2", executor, lease_s=0.5).run()
"""


def test_a_killed_campaign_is_resumed_and_repeats_nothing_settled(fleet: Fleet, registry: Registry):
    command = [sys.executable, "-c", VICTIM, str(fleet.folder / "fleet.toml")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert any("SEARCHING" in line for line in victim.stdout)
        os.kill(victim.pid, signal.SIGKILL)
    before = {version.adapter: version for version in registry.versions(base="v2")}
    assert {name: version.status for name, version in before.items()} == {
        "busy": Status.CANDIDATE,
        "usual": Status.ADAPTING,
        "calm": Status.PLANNED,
    }
    settled = campaign(fleet, registry, lease_s=0.5).run()
    assert [version.adapter for version in settled] == ["calm", "usual"]
    after = {version.adapter: version for version in registry.versions(base="v2")}
    assert len(registry.versions(base="v2")) == 3, "no duplicates"
    assert after["busy"] == before["busy"], "settled versions stay as they are"
    assert {version.status for version in after.values()} == {Status.CANDIDATE}
    assert after["usual"].id == before["usual"].id
    assert len(registry.events(kind=EVOLUTION)) == 1
    moves = [(e.adapter, e.details["target"]) for e in registry.events(kind="moved")]
    assert moves.count(("usual", "adapting")) == 2
    assert moves.count(("busy", "adapting")) == 1


def with_stage(fleet: Fleet, registry: Registry, adapter: str, learned: str) -> Path:
    """Make a live version that has learned another task's classes, as `relora continual` records it."""
    first = registry.routes()[adapter].live
    stages = [
        {"name": name, "data": str(fleet.folder / of / "data")} for name, of in (("start", adapter), ("more", learned))
    ]
    files = {"blob_key": first.blob_key, "content_hash": first.content_hash}
    version = registry.add_version(
        adapter, "v1", Status.RETIRED, **files, parent_id=first.id, details={"stages": stages}
    )
    registry.promote(version.id)
    return fleet.folder / learned / "data"


def test_an_adapter_is_carried_over_with_all_its_stages(fleet: Fleet, registry: Registry):
    """It is evaluated on the rows of all stages. On its first task alone it could lose the later ones unnoticed."""
    more = with_stage(fleet, registry, "usual", learned="calm")
    jobs: list[AdapterJob] = []

    def answer(job: AdapterJob) -> JobUpdate:
        jobs.append(job)
        return result_for(fleet, job)

    campaign(fleet, registry, Scripted(answer)).run()
    by_name = {job.adapter: job.data for job in jobs}
    assert by_name["usual"] == (fleet.folder / "usual" / "data", more)
    assert by_name["busy"] == (fleet.folder / "busy" / "data",)
    carried = {version.adapter: version.details for version in registry.versions(base="v2")}
    assert [stage["name"] for stage in carried["usual"]["stages"]] == ["start", "more"], "for the next upgrade or stage"
    assert "stages" not in carried["busy"]


def test_missing_or_malformed_rows_of_a_stage_fail_the_adapter_and_are_named(fleet: Fleet, registry: Registry):
    more = with_stage(fleet, registry, "usual", learned="calm")
    (more / "valid.jsonl").write_text("{oops\n")
    only_usual = {"busy", "calm"}
    for version in [route.live for name, route in registry.routes().items() if name in only_usual]:
        registry.move(version.id, Status.LIVE, Status.RETIRED)
    (malformed,) = campaign(fleet, registry).run()
    assert f"{more / 'valid.jsonl'}:1" in malformed.details["error"]
    shutil.rmtree(more)
    (gone,) = campaign(fleet, registry).run()
    assert gone.status is Status.FAILED
    assert f"InvalidDataError: {more}: no such folder; usual@2 was trained on its rows" in gone.details["error"]


def test_a_stopped_campaign_puts_its_adapters_back(fleet: Fleet, registry: Registry):
    begun = threading.Event()

    class Endless(Scripted):
        def run(self, jobs: Iterator[AdapterJob]) -> JobUpdates:
            next(jobs)
            begun.set()
            while True:
                time.sleep(0.05)
                yield None

    started = campaign(fleet, registry, Endless(None))
    with pytest.raises(StorageError, match="no engine"), in_background(started) as settled:  # noqa: PT012
        assert begun.wait(20)
        assert not settled.done()
        raise StorageError("no engine")
    assert settled.result() == []
    assert {version.status for version in registry.versions(base="v2")} == {Status.PLANNED}
    assert registry.beats() == {}
    assert registry.events(kind="campaign_finished") == []


def test_a_rejected_version_says_why(fleet: Fleet, registry: Registry):
    version, *_ = campaign(fleet, registry, Scripted(lambda job: result_for(fleet, job, accepted=False))).run()
    assert version.setback == "it reached 50.0 points at rung copy; the gate asks for 90.0 less its tolerance"


def test_details_contain_no_infinity():
    details = jsonable({"loss": float("inf"), "trials": ({"loss": float("nan")}, {"loss": 0.5})})
    assert json.dumps(details, allow_nan=False) == '{"loss": null, "trials": [{"loss": null}, {"loss": 0.5}]}'
