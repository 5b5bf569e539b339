"""Campaigns killed at random points: only unfinished work is lost, and settled work is not repeated."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cluster.adapters.files import load_adapter
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.fleet import open_blobs
from cluster.registry.registry import Registry, Status
from readapt.campaign.base_pair import EVOLUTION
from tests.worlds.fleets import make_fleet, registered

ROOT = Path(__file__).parents[2]
NAMES = ("busy", "usual", "calm", "delta", "echo", "fox")
LEASE_S = 0.4

CAMPAIGN = """
import sys
from pathlib import Path
from cluster.config.fleet_file import load_fleet
from cluster.fleet import open_blobs, open_registry
from readapt.campaign.campaign import Campaign
from readapt.fusion.points import CORNERS
from tests.worlds.executors import LocalExecutor
from tests.worlds.readapt import try_points

fleet = load_fleet(Path(sys.argv[1]))
executor = LocalExecutor(fleet, lambda objective: try_points(objective, CORNERS))
print("READY", flush=True)
Campaign(fleet, open_registry(fleet), open_blobs(fleet), "v2", executor, lease_s=float(sys.argv[2])).run()
print("DONE", flush=True)
"""


def start(fleet: Fleet) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CAMPAIGN, str(fleet.folder / "fleet.toml"), str(LEASE_S)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "READY"
    return process


def settled(registry: Registry) -> dict[str, object]:
    return {v.adapter: v for v in registry.versions(base="v2", statuses=[Status.CANDIDATE])}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fleet(tmp_path_factory.mktemp("world"), NAMES).folder


@pytest.mark.parametrize("seed", [1, 2])
def test_after_repeated_kills_each_adapter_is_done_once(world: Path, tmp_path: Path, seed: int):
    shutil.copytree(world, tmp_path / "fleet")
    fleet = load_fleet(tmp_path / "fleet" / "fleet.toml")
    registry, rng = registered(fleet), random.Random(seed)
    num_kills = 3
    for _ in range(num_kills):
        before = settled(registry)
        with start(fleet) as victim:
            time.sleep(rng.uniform(0.0, 1.6))
            os.kill(victim.pid, signal.SIGKILL)
        after = settled(registry)
        assert before.items() <= after.items(), "settled versions stay as they are"
        assert all(route.live.number == 1 for route in registry.routes().values()), "the old versions stay live"
    with start(fleet) as last:
        out, _ = last.communicate(timeout=120)
    assert "DONE" in out
    versions = registry.versions(base="v2")
    assert Counter(v.adapter for v in versions) == dict.fromkeys(NAMES, 1), "one version for each, no duplicates"
    assert {v.status for v in versions} == {Status.CANDIDATE}
    moves = Counter((e.adapter, e.details["target"]) for e in registry.events(kind="moved"))
    assert all(moves[name, "candidate"] == 1 for name in NAMES), "settled exactly once"
    num_begun = sum(moves[name, "adapting"] for name in NAMES)
    assert num_begun <= len(NAMES) + num_kills, "a kill loses no more than the adapter in flight"
    assert len(registry.events(kind=EVOLUTION)) == 1
    blobs = open_blobs(fleet)
    assert all(load_adapter(blobs.fetch_folder(v.blob_key)).factors for v in versions)
    assert registry.events(kind="campaign_finished")[-1].details["unready_traffic"] > 0
    registry.close()
