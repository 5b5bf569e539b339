"""What a person may do to one adapter: roll back, promote, retry, pause, remove."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config.settings import RolloutConfig
from cluster.errors import ConflictError, NotFoundError
from cluster.registry.registry import Registry, Status, Version
from cluster.registry.rollout import CANARY_FAILURE, Rollout
from cluster.registry.steering import promote, retry, roll_back
from tests.worlds.registries import fresh_url

S = Status


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """Bases v1 and v2, and the adapter "intent", which is live on v1."""
    with fresh_url(request.param, tmp_path) as url:
        registry = Registry(url)
        for base in ("v1", "v2"):
            registry.add_base(base, base, base)
        registry.add_adapter("intent")
        registry.add_version("intent", "v1", S.LIVE, blob_key="k1", content_hash="k1")
        yield registry
        registry.close()


def add(registry: Registry, status: Status, **details: str) -> Version:
    return registry.add_version("intent", "v2", status, "k2", "k2", parent_id=1, details=details)


def statuses(registry: Registry) -> list[Status]:
    return [version.status for version in registry.versions()]


@pytest.mark.parametrize("status", [S.CANDIDATE, S.READY, S.CANARY])
def test_a_rollback_first_takes_back_what_is_on_its_way(registry: Registry, status: Status):
    add(registry, status)
    (changed,) = roll_back(registry, "intent")
    assert (changed.label, changed.status, changed.setback) == ("intent@2", S.ROLLED_BACK, "rolled back by hand")
    assert registry.routes()["intent"].live.number == 1


def test_a_rollback_makes_the_version_before_live_again(registry: Registry):
    promote(registry, "intent", add(registry, S.CANARY).number)
    assert statuses(registry) == [S.RETIRED, S.LIVE]
    assert [(v.label, v.status) for v in roll_back(registry, "intent")] == [
        ("intent@1", S.LIVE),
        ("intent@2", S.RETIRED),
    ]
    assert statuses(registry) == [S.LIVE, S.RETIRED]
    roll_back(registry, "intent")
    assert statuses(registry) == [S.RETIRED, S.LIVE], "a second rollback takes back the first"


def test_a_rollback_of_a_withdrawn_adapter_makes_its_last_version_live(registry: Registry):
    registry.move(1, S.LIVE, S.RETIRED)
    assert [(v.label, v.status) for v in roll_back(registry, "intent")] == [("intent@1", S.LIVE)]


def test_without_an_earlier_version_nothing_can_be_rolled_back(registry: Registry):
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        roll_back(registry, "intent")
    with pytest.raises(NotFoundError):
        roll_back(registry, "absent")


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (S.CANDIDATE, "relora rollout"),
        (S.READY, "relora rollout"),
        (S.REJECTED, "relora retry intent@2"),
        (S.ROLLED_BACK, "relora retry intent@2"),
        (S.PLANNED, "only a canary or a retired version"),
    ],
)
def test_what_cannot_be_promoted_says_what_to_do(registry: Registry, status: Status, advice: str):
    add(registry, status)
    with pytest.raises(ConflictError, match=f"intent@2 is {status}: .*{advice}"):
        promote(registry, "intent", 2)
    with pytest.raises(ConflictError, match="no canary"):
        promote(registry, "intent")
    assert registry.routes()["intent"].live.number == 1


def test_promote_takes_the_canary(registry: Registry):
    add(registry, S.CANARY)
    assert promote(registry, "intent").label == "intent@2"
    assert statuses(registry) == [S.RETIRED, S.LIVE]


@pytest.mark.parametrize(
    ("status", "after"), [(S.REJECTED, S.PLANNED), (S.FAILED, S.PLANNED), (S.ROLLED_BACK, S.CANDIDATE)]
)
def test_a_setback_can_be_tried_once_more(registry: Registry, status: Status, after: Status):
    add(registry, status)
    assert retry(registry, "intent").status is after
    with pytest.raises(ConflictError, match="no setback"):
        retry(registry, "intent")


def test_a_version_of_an_earlier_live_version_cannot_be_retried(registry: Registry):
    rejected = add(registry, S.REJECTED)
    promote(registry, "intent", add(registry, S.CANARY).number)
    with pytest.raises(ConflictError, match="intent@2 was not made from the live version"):
        retry(registry, "intent", rejected.number)


def rollout(registry: Registry) -> Rollout:
    return Rollout(registry, "v2", lambda version: None, RolloutConfig(canary_s=0.0))


def test_a_retried_canary_is_not_judged_by_its_old_failures(registry: Registry):
    version = add(registry, S.CANDIDATE)
    moves = rollout(registry)
    moves.tick()
    moves.tick()
    registry.log(CANARY_FAILURE, version.id, reason="the replica died")
    moves.tick()
    assert registry.version(version.id).setback == "canary: the replica died"
    retry(registry, "intent")
    for _ in range(3):
        moves.tick()
    assert registry.version(version.id).status is S.LIVE


@pytest.mark.parametrize("status", [S.CANDIDATE, S.READY, S.CANARY])
def test_a_paused_adapter_stays_where_it_is(registry: Registry, status: Status):
    version = add(registry, status)
    moves = rollout(registry)
    registry.pause("intent")
    registry.pause("intent")
    assert registry.paused() == {"intent"}
    assert (moves.tick(), moves.is_busy()) == ([], False)
    assert registry.version(version.id).status is status
    registry.resume("intent")
    registry.resume("intent")
    assert registry.paused() == set()
    assert moves.is_busy()
    assert len(moves.tick()) == 1
    kinds = [event.kind for event in registry.events()]
    assert [kind for kind in kinds if kind in ("paused", "resumed")] == ["paused", "resumed"], "one event per change"


def test_a_paused_canary_that_fails_is_still_rolled_back(registry: Registry):
    version = add(registry, S.CANDIDATE)
    moves = rollout(registry)
    moves.tick()
    moves.tick()
    registry.pause("intent")
    registry.log(CANARY_FAILURE, version.id, reason="timeout")
    assert [(v.id, v.status) for v in moves.tick()] == [(version.id, S.ROLLED_BACK)]


def test_an_unknown_adapter_cannot_be_paused(registry: Registry):
    for call in (registry.pause, registry.resume, registry.remove_adapter):
        with pytest.raises(NotFoundError, match="absent"):
            call("absent")


def test_a_removed_adapter_leaves_its_events_and_frees_its_name(registry: Registry):
    registry.pause("intent")
    add(registry, S.REJECTED)
    registry.log("note", version_id=1)
    assert [version.label for version in registry.remove_adapter("intent")] == ["intent@1", "intent@2"]
    assert (registry.versions(), registry.adapters(), registry.paused(), registry.routes()) == ([], [], set(), {})
    last = registry.events()[-1]
    assert (last.kind, last.adapter) == ("adapter_removed", "intent")
    assert last.details == {"versions": {"intent@1": "live", "intent@2": "rejected"}}
    assert [event.adapter for event in registry.events(kind="note")] == ["intent"]
    registry.add_adapter("intent")
    assert registry.add_version("intent", "v1", S.LIVE).label == "intent@1"


def test_an_adapter_under_way_cannot_be_removed(registry: Registry):
    add(registry, S.ADAPTING)
    with pytest.raises(ConflictError, match="intent@2 is being adapted"):
        registry.remove_adapter("intent")
    assert len(registry.versions()) == 2
