"""The order of a fleet's upgrade, and the unready traffic that it minimises."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.registry.registry import Registry, Status, Version
from readapt.campaign.order import ASSESSED, expected_seconds, in_order, unready_traffic


class Clock:
    """A clock for the registry, set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", clock)
    for base in ("v1", "v2", "v3"):
        registry.add_base(base, base, base)
    for name, traffic in (("busy", 8.0), ("usual", 2.0), ("calm", 0.0)):
        registry.add_adapter(name, traffic=traffic)
        registry.add_version(name, "v1", Status.LIVE)
    yield registry
    registry.close()


def planned(registry: Registry, target: str = "v2") -> dict[str, Version]:
    live = {name: route.live.id for name, route in registry.routes().items()}
    return {name: registry.add_version(name, target, Status.PLANNED, parent_id=id) for name, id in live.items()}


def settle(registry: Registry, version: Version, target: Status, **details: object) -> None:
    registry.move(version.id, Status.PLANNED, Status.ADAPTING)
    registry.move(version.id, Status.ADAPTING, target, details=details)


def version(name: str) -> Version:
    return Version(1, name, 2, "v2", Status.PLANNED, None, None, 1, None, {}, 0.0, 0.0)


def cost(order: list[str], traffic: dict[str, float], seconds: dict[str, float]) -> float:
    """Return the unready-traffic integral of one worker that takes the jobs in this order."""
    now_s, total = 0.0, 0.0
    for name in order:
        now_s += seconds[name]
        total += traffic[name] * now_s
    return total


@settings(max_examples=60, deadline=None)
@given(jobs=st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 50)), min_size=1, max_size=6))
def test_no_other_order_leaves_less_traffic_unready(jobs: list[tuple[float, float]]) -> None:
    names = [f"a{index}" for index in range(len(jobs))]
    traffic = {name: weight for name, (weight, _) in zip(names, jobs, strict=True)}
    seconds = {name: time for name, (_, time) in zip(names, jobs, strict=True)}
    found = [v.adapter for v in in_order([version(name) for name in names], traffic, seconds)]
    best = min(cost(list(order), traffic, seconds) for order in permutations(names))
    assert cost(found, traffic, seconds) <= best * (1 + 1e-9) + 1e-9


def test_a_short_adapter_goes_before_a_busier_long_one(registry: Registry) -> None:
    found = in_order([version("busy"), version("usual")], {"busy": 8.0, "usual": 2.0}, {"busy": 100.0, "usual": 1.0})
    assert [v.adapter for v in found] == ["usual", "busy"]


def test_expected_seconds_come_from_the_assessment_the_last_upgrade_or_the_median(registry: Registry) -> None:
    first = planned(registry)
    settle(registry, first["busy"], Status.REJECTED, seconds={"total": 40.0})
    settle(registry, first["usual"], Status.REJECTED, seconds={"total": 10.0})
    again = planned(registry, "v3")
    assert expected_seconds(registry, again.values()) == {"busy": 40.0, "usual": 10.0, "calm": 25.0}
    registry.log(ASSESSED, again["usual"].parent_id, to="v3", expected_s=70.0, rung="scratch")
    registry.log(ASSESSED, again["usual"].parent_id, to="v2", expected_s=5.0, rung="copy")
    assert expected_seconds(registry, again.values()) == {"busy": 40.0, "usual": 70.0, "calm": 55.0}


def test_without_any_estimates_traffic_decides(registry: Registry) -> None:
    versions = planned(registry).values()
    seconds = expected_seconds(registry, versions)
    assert set(seconds.values()) == {1.0}
    traffic = {record.name: record.traffic for record in registry.adapters()}
    assert [v.adapter for v in in_order(versions, traffic, seconds)] == ["busy", "usual", "calm"]


def test_the_integral_counts_from_planning_to_candidate_or_to_the_end(registry: Registry, clock: Clock) -> None:
    versions = planned(registry)
    clock.now_s = 103.0
    settle(registry, versions["busy"], Status.CANDIDATE)
    clock.now_s = 110.0
    settle(registry, versions["usual"], Status.REJECTED)
    clock.now_s = 114.0
    settle(registry, versions["calm"], Status.CANDIDATE)
    found = unready_traffic(registry, "v2")
    assert found.integral == pytest.approx(8.0 * 3.0 + 2.0 * 14.0 + 0.0)
    assert found.mean_s == pytest.approx(found.integral / 10.0)
    assert unready_traffic(registry, "v3").integral == 0.0


def test_nothing_counts_after_a_version_is_settled(registry: Registry, clock: Clock) -> None:
    """Neither the rollout nor a second version of the same adapter counts."""
    versions = planned(registry)
    clock.now_s = 103.0
    settle(registry, versions["busy"], Status.CANDIDATE)
    clock.now_s = 110.0
    settle(registry, versions["usual"], Status.REJECTED)
    found = unready_traffic(registry, "v2")
    clock.now_s = 500.0
    registry.move(versions["busy"].id, Status.CANDIDATE, Status.READY)
    registry.add_version("usual", "v2", Status.PLANNED, parent_id=versions["usual"].parent_id)
    assert unready_traffic(registry, "v2") == found


def test_version_ids_do_not_affect_the_order(registry: Registry) -> None:
    one, other = version("usual"), replace(version("busy"), id=7)
    assert in_order([one, other], {"busy": 1.0, "usual": 1.0}, {"busy": 1.0, "usual": 1.0}) == [other, one]
