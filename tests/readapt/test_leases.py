"""Heartbeats and leases of campaigns."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.registry.registry import Registry
from readapt.campaign.leases import LeaseWatch, heartbeat


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    yield registry
    registry.close()


def test_beats_are_counted_in_one_row_without_events(registry: Registry):
    for owner in ("a", "b", "a", "a"):
        registry.beat(owner)
    assert registry.beats() == {"a": 3, "b": 1}
    registry.end_beats("a")
    registry.end_beats("a")
    assert registry.beats() == {"b": 1}
    assert registry.events() == [], "a long campaign does not fill the log with heartbeats"


def test_a_beating_campaign_is_alive_and_a_silent_one_dead_after_a_lease(registry: Registry):
    watch = LeaseWatch(registry, lease_s=0.3)
    registry.beat("silent")
    with heartbeat(registry, "alive", every_s=0.05):
        assert not watch.is_dead("silent"), "the watch has just begun"
        deadline_s = time.monotonic() + 0.6
        while time.monotonic() < deadline_s:
            assert not watch.is_dead("alive")
            time.sleep(0.05)
        assert watch.is_dead("silent")
        assert watch.is_dead("silent"), "a dead campaign stays dead"
        assert set(registry.beats()) == {"alive"}, "its beats are deleted"
    assert registry.beats() == {}, "a campaign that ends deletes its beats"


def test_a_campaign_that_never_beat_is_dead_after_a_lease(registry: Registry):
    watch = LeaseWatch(registry, lease_s=0.1)
    assert not watch.is_dead("unknown")
    time.sleep(0.15)
    assert watch.is_dead("unknown")


def test_events_are_found_by_their_kind_without_reading_all(registry: Registry, tmp_path: Path):
    registry.log("note")
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        plan = connection.execute("EXPLAIN QUERY PLAN SELECT * FROM events WHERE kind = 'note'").fetchall()
    connection.close()
    assert "USING INDEX" in str(plan)
