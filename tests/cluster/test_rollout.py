from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.config.settings import RolloutConfig
from cluster.errors import InvalidAdapterError, OverloadedError
from cluster.registry.records import TRANSITIONS
from cluster.registry.registry import Registry, Status, Version
from cluster.registry.rollout import Rollout

S = Status


@dataclass
class ManualRollout:
    """A real registry, a clock that tests set, and a probe whose answers tests choose."""

    registry: Registry
    rollout: Rollout = field(init=False)
    now: float = 1000.0
    faults: dict[str, Exception] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)

    def probe(self, version: Version) -> None:
        self.probed.append(version.label)
        if version.label in self.faults:
            raise self.faults[version.label]

    def candidate(self, adapter: str, base: str = "v2") -> Version:
        self.registry.add_adapter(adapter)
        return self.registry.add_version(adapter, base, S.CANDIDATE, details={"golden": []})

    def status(self, version: Version) -> Status:
        return self.registry.version(version.id).status

    def tick(self) -> dict[str, Status]:
        return {version.label: version.status for version in self.rollout.tick()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ManualRollout]:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", clock=lambda: world.now)
    world = ManualRollout(registry)
    registry.add_base("v1", "models/v1", "f1")
    registry.add_base("v2", "models/v2", "f2")
    registry.add_adapter("intent")
    registry.add_version("intent", "v1", S.LIVE)
    world.rollout = Rollout(registry, "v2", world.probe, RolloutConfig(canary_s=3.0), clock=lambda: world.now)
    yield world
    registry.close()


def test_a_good_version_goes_live_step_by_step(world: ManualRollout):
    version = world.candidate("intent")
    assert world.tick() == {"intent@2": S.READY}
    assert world.probed == ["intent@2"]
    assert world.tick() == {"intent@2": S.CANARY}
    world.now += 2.9
    assert world.tick() == {}
    assert world.registry.routes()["intent"].canary.id == version.id
    world.now += 0.2
    assert world.tick() == {"intent@2": S.LIVE}
    assert world.registry.find("intent", 1).status is S.RETIRED
    assert world.tick() == {}
    assert world.probed == ["intent@2"]


def test_a_version_that_fails_its_probe_is_rolled_back(world: ManualRollout):
    version = world.candidate("intent")
    world.faults["intent@2"] = InvalidAdapterError("golden prompt 1 answered differently")
    assert world.tick() == {"intent@2": S.ROLLED_BACK}
    assert "golden prompt 1" in world.registry.version(version.id).details["rolled_back"]
    assert world.registry.version(version.id).details["golden"] == []
    assert world.registry.find("intent", 1).status is S.LIVE
    assert world.tick() == {}


def test_a_busy_replica_is_probed_again(world: ManualRollout):
    world.candidate("intent")
    world.faults["intent@2"] = OverloadedError("queue full")
    assert world.tick() == {}
    world.faults.clear()
    assert world.tick() == {"intent@2": S.READY}
    assert world.probed == ["intent@2", "intent@2"]


def test_a_bug_of_ours_does_not_roll_a_version_back(world: ManualRollout):
    version = world.candidate("intent")
    world.faults["intent@2"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        world.tick()
    assert world.status(version) is S.CANDIDATE


@pytest.mark.parametrize("waited_s", [0.5, 3.5])
def test_a_failed_canary_is_rolled_back_even_after_its_time(world: ManualRollout, waited_s: float):
    version = world.candidate("intent")
    world.tick()
    world.tick()
    world.registry.log("canary_failure", version_id=version.id, reason="replica died")
    world.now += waited_s
    assert world.tick() == {"intent@2": S.ROLLED_BACK}
    assert "replica died" in world.registry.version(version.id).details["rolled_back"]
    assert world.registry.routes()["intent"].live.number == 1


def test_failures_of_other_versions_do_not_count(world: ManualRollout):
    first, second = world.candidate("intent"), world.candidate("other")
    world.tick()
    world.tick()
    world.registry.log("canary_failure", version_id=second.id)
    world.registry.log("slow_request", version_id=first.id)
    world.now += 5
    assert world.tick() == {"intent@2": S.LIVE, "other@1": S.ROLLED_BACK}


def test_versions_advance_independently(world: ManualRollout):
    a, b, c = world.candidate("a"), world.candidate("b"), world.candidate("c")
    world.faults["b@1"] = InvalidAdapterError("rank")
    assert world.tick() == {"a@1": S.READY, "b@1": S.ROLLED_BACK, "c@1": S.READY}
    late = world.candidate("late")
    assert world.tick() == {"a@1": S.CANARY, "c@1": S.CANARY, "late@1": S.READY}
    world.now += 3
    assert world.tick() == {"a@1": S.LIVE, "c@1": S.LIVE, "late@1": S.CANARY}
    assert [world.status(v) for v in (a, b, c, late)] == [S.LIVE, S.ROLLED_BACK, S.LIVE, S.CANARY]


def test_an_adapter_has_one_canary_at_a_time(world: ManualRollout):
    first, second = world.candidate("intent"), world.candidate("intent")
    world.tick()
    assert world.tick() == {"intent@2": S.CANARY}
    world.now += 3
    assert world.tick()["intent@2"] is S.LIVE
    world.tick()
    world.now += 3
    world.tick()
    assert (world.status(first), world.status(second)) == (S.RETIRED, S.LIVE)


def test_a_version_that_another_process_moves_is_left_alone(world: ManualRollout):
    version = world.candidate("intent")

    def probe(_: Version) -> None:
        world.registry.move(version.id, S.CANDIDATE, S.ROLLED_BACK)

    other = world.candidate("other")
    rollout = Rollout(world.registry, "v2", lambda v: probe(v) if v.id == version.id else None, RolloutConfig())
    assert [moved.id for moved in rollout.tick()] == [other.id]
    assert world.status(version) is S.ROLLED_BACK


def test_another_rollout_continues_where_one_stopped(world: ManualRollout):
    version = world.candidate("intent")
    for _ in range(2):
        world.tick()
    world.now += 3
    successor = Rollout(world.registry, "v2", world.probe, RolloutConfig(canary_s=3.0), clock=lambda: world.now)
    assert [moved.status for moved in successor.tick()] == [S.LIVE]
    assert world.tick() == {}
    assert world.status(version) is S.LIVE


def test_candidates_of_other_bases_neither_move_nor_keep_it_busy(world: ManualRollout):
    """Their base may have no engine, so that they would be probed forever."""
    elsewhere, here = world.candidate("other", base="v1"), world.candidate("intent")
    assert world.tick() == {here.label: S.READY}
    assert world.tick() == {here.label: S.CANARY}
    world.now += 4
    assert world.tick() == {here.label: S.LIVE}
    assert not world.rollout.is_busy()
    assert world.status(elsewhere) is S.CANDIDATE
    assert world.probed == [here.label]


def test_a_canary_that_a_dead_rollout_left_on_another_base_does_not_block_its_adapter(world: ManualRollout):
    left = world.candidate("intent", base="v1")
    world.registry.move(left.id, S.CANDIDATE, S.READY)
    world.registry.move(left.id, S.READY, S.CANARY)
    version = world.candidate("intent")
    assert world.tick() == {"intent@3": S.READY}
    assert world.tick() == {}, "one canary at a time"
    world.now += 4
    assert world.tick() == {"intent@2": S.LIVE}
    assert world.tick() == {"intent@3": S.CANARY}
    world.now += 4
    world.tick()
    assert (world.status(left), world.status(version)) == (S.RETIRED, S.LIVE)


def test_a_rollout_uses_only_allowed_transitions():
    path = [S.CANDIDATE, S.READY, S.CANARY, S.LIVE, S.RETIRED]
    assert all(after in TRANSITIONS[before] for before, after in pairwise(path))
    assert all(S.ROLLED_BACK in TRANSITIONS[status] for status in path[:3])
