"""A small fault run, and tests that it notices the faults it looks for."""

import asyncio
import json
from pathlib import Path

import pytest

from bench.serving.chaos.clients import Clients
from bench.serving.chaos.events import WAVES, Ask, Wave, draw_events, faults_of
from bench.serving.chaos.run import is_clean, run_chaos
from bench.serving.chaos.tally import Tally
from bench.serving.chaos.watch import BoundWatch
from bench.serving.chaos.world import Disk, World, make_world
from cluster.errors import InvalidAdapterError, NotFoundError, StorageError
from serving.engine.request import AdapterRef, Request, SamplingParams
from serving.memory.prefixes import PrefixKeys
from tests.worlds.serving import make_sequence

QUIET = Wave("quiet", 1.0, {}, trouble=0.0, late=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), None, 11, 12, seed=3)


def play(world: World, wave: Wave, num_requests: int) -> Tally:
    tally = Tally(world)
    asyncio.run(Clients(world, wave, tally).play(draw_events(world, wave, num_requests, seed=0)))
    return tally


def test_a_small_run_is_clean(tmp_path: Path) -> None:
    records = run_chaos(None, 700, 0, tmp_path / "chaos.json")
    assert is_clean(records), {key: records[key] for key in ("unexplained", "wrong_examples", "requests_by_outcome")}
    assert sum(records["requests_by_outcome"].values()) == records["requests"] == 700
    assert records["requests_by_outcome"]["finished"] > 400
    assert records["tokens_checked"] > 2000
    assert records["integrity_checks"] > 10
    assert records["world"]["distinct_share"] > 0.9
    assert {wave["wave"] for wave in records["waves"]} == {wave.name for wave in WAVES}
    assert json.loads((tmp_path / "chaos.json").read_text())["faults_injected"] == records["faults_injected"]


def test_the_same_seed_draws_the_same_events(world: World) -> None:
    wave = WAVES[1]
    events = list(draw_events(world, wave, 300, seed=5))
    assert events == list(draw_events(world, wave, 300, seed=5)) != list(draw_events(world, wave, 300, seed=6))
    assert sum(isinstance(event, Ask) for event in events) == 300
    kinds = {kind for event in events for kind in faults_of(event)}
    assert kinds >= {"racing loads", "unload", "client leaves", "slow reader", "load of sound files"}


def test_swapped_adapters_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (content.key for content in world.by_fate("sound")[:2])
    swapped, fetch = {first: second, second: first}, Clients._fetch
    assert play(world, QUIET, 150).verdict()["wrong_adapter_tokens"] == 0
    monkeypatch.setattr(Clients, "_fetch", lambda self, key: fetch(self, swapped.get(key, key)))
    found = play(world, QUIET, 150).verdict()
    assert found["wrong_answers_of_another_adapter"] > 0
    assert found["wrong_adapter_tokens"] >= found["wrong_answers_of_another_adapter"] * 3
    assert found["wrong_answers_of_no_adapter"] == found["ties"] == 0


def test_kv_of_another_adapter_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix keys that ignore the adapter: a bug that engines have had in production."""
    monkeypatch.setattr(
        "serving.engine.sequence.PrefixKeys", lambda owner, salt, page_tokens: PrefixKeys(None, salt, page_tokens)
    )
    found = play(world, QUIET, 300).verdict()
    assert found["wrong_adapter_tokens"] > 0
    assert found["wrong_answers_of_no_adapter"] + found["wrong_answers_of_another_adapter"] > 0


def test_ties_differ_from_wrong_tokens(world: World) -> None:
    key = world.by_fate("sound")[0].key
    right = world.expected[key][0]
    assert world.is_tie(key, 0, right)
    assert not world.is_tie(key, 0, (*right[:-1], (right[-1] + 1) % 256))
    assert not world.is_tie(None, 0, right)


def test_errors_need_a_cause(world: World) -> None:
    tally = Tally(world)
    sound, poison = world.by_fate("sound")[0], world.by_fate("poison")[0]
    asks = [event for event in draw_events(world, QUIET, 400, 0) if isinstance(event, Ask)]
    plain = next(ask for ask in asks if ask.twist is None)
    refs = [AdapterRef(content.key, content.name, 1, content.key) for content in (sound, poison)]
    tally.record_error(plain, refs[1], InvalidAdapterError("NaN"))
    tally.record_error(next(ask for ask in asks if ask.twist == "not loaded"), refs[0], NotFoundError("gone"))
    assert not tally.unexplained
    tally.record_error(plain, refs[0], InvalidAdapterError("NaN"))
    tally.record_error(plain, refs[0], StorageError("down"))
    tally.record_error(plain, None, AssertionError("a bug"))
    assert len(tally.unexplained) == 3
    tally.doubtful.add(sound.key)
    tally.record_error(plain, refs[0], StorageError("down"))
    assert len(tally.unexplained) == 3
    assert tally.outcomes == {"adapter unusable": 2, "adapter not found": 1, "storage": 2, "AssertionError": 1}


@pytest.mark.parametrize(("num_overtakes", "num_seen"), [(2, 0), (3, 0), (4, 1)])
def test_the_watch_notices_requests_that_wait_too_long(num_overtakes: int, num_seen: int) -> None:
    """With K = 2 and one other flow, at most three admissions of others may come first."""
    watch = BoundWatch(max_overtakes=2)
    patient = make_sequence(Request("patient", (1,), SamplingParams()), 2)
    watch.came((0, None), patient)
    for number in range(num_overtakes):
        other = make_sequence(Request(f"{number}", (1,), SamplingParams()), 2)
        watch.came((0, "busy"), other)
        watch.check(other)
        watch.left((0, "busy"), other)
        watch.count_admission()
    watch.check(patient)
    assert watch.num_violations == num_seen
    assert watch.longest_share == num_overtakes / 3


@pytest.mark.parametrize("how", Disk.HARMS)
def test_every_harm_is_noticed_or_repaired(world: World, how: str) -> None:
    """A fetch of damaged files returns the right files, or fails."""
    disk, blobs, key = Disk(world), world.blobs(), world.by_fate("sound")[1].key
    before = {file.name: file.read_bytes() for file in blobs.fetch_folder(key).iterdir()}
    disk.hurt(key, how)
    if how in ("delete", "truncate", "corrupt"):
        with pytest.raises((NotFoundError, StorageError)):
            blobs.fetch_folder(key)
    else:
        assert {file.name: file.read_bytes() for file in blobs.fetch_folder(key).iterdir()} == before
    disk.mend(key)
    assert {file.name: file.read_bytes() for file in blobs.fetch_folder(key).iterdir()} == before
