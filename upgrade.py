"""The upgrade loop and the rollout loop of the `relora` command line: campaigns make candidates, rollouts move traffic.

Both loops need a running Ray cluster that this process has joined (`cluster.on_ray.join`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import readapt.on_ray
import serving.on_ray
from cluster.config import Fleet
from cluster.errors import ReloraError
from cluster.fleet import OpenFleet
from cluster.progress import Say
from cluster.registry import Registry, Status, Version
from cluster.rollout import Rollout
from readapt.campaign.campaign import Campaign, in_background


@dataclass(frozen=True)
class UpgradeResult:
    """The final status of each version that an upgrade or a rollout handled."""

    statuses: tuple[Status, ...]

    @property
    def needs_attention(self) -> bool:
        """Whether a version failed or was rolled back, so that a person should look at it."""
        return not {Status.FAILED, Status.ROLLED_BACK}.isdisjoint(self.statuses)

    def __str__(self) -> str:
        counts = [f"{self.statuses.count(status)} {status}" for status in Status if status in self.statuses]
        return ", ".join(counts) or "nothing was left to do"


def make_candidates(opened: OpenFleet, base: str, say: Say) -> UpgradeResult:
    """Run a campaign that carries every adapter over to `base`, and leave the traffic where it is."""
    return _result(_campaign(opened, base, say).run(), opened.registry)


def upgrade_fleet(opened: OpenFleet, base: str, say: Say) -> UpgradeResult:
    """Carry every adapter over to `base`, and move an adapter's traffic as soon as its new version is ready.

    The campaign runs in a background thread. An error of the rollout stops the campaign and is raised: a later upgrade
    resumes both. `say` gets a line for each step of an adapter and each move of a version.
    """
    config = opened.config
    serving.on_ray.check_gateway(config)
    mover = _rollout(config, opened.registry, base)
    with in_background(_campaign(opened, base, say)) as settled:
        try:
            serving.on_ray.deploy_base(config, base)
            while not settled.done() or mover.is_busy():
                _tick(mover, say)
                time.sleep(config.rollout.poll_s)
        except ReloraError as error:
            say(f"stopping the campaign: {error}")  # said now, because running adapters may take a while to stop
            raise
    return _result(settled.result(), opened.registry)


def roll_out(config: Fleet, registry: Registry, base: str | None, say: Say) -> UpgradeResult:
    """Move traffic to all waiting candidates, or only to those on `base`; start the engines that are missing."""
    waiting = registry.versions(base=base, statuses=(Status.CANDIDATE, Status.READY, Status.CANARY))
    serving.on_ray.check_gateway(config)
    movers = []
    for name in sorted({version.base for version in waiting}):
        if not serving.on_ray.has_engine(config, name):
            serving.on_ray.deploy_base(config, name)
        movers.append(_rollout(config, registry, name))
    while any(mover.is_busy() for mover in movers):
        for mover in movers:
            _tick(mover, say)
        time.sleep(config.rollout.poll_s)
    return _result(waiting, registry)


def _campaign(opened: OpenFleet, base: str, say: Say) -> Campaign:
    executor = readapt.on_ray.RayExecutor(opened.config)
    return Campaign(opened.config, opened.registry, opened.blobs, base, executor, say=say)


def _rollout(config: Fleet, registry: Registry, base: str) -> Rollout:
    return Rollout(registry, base, lambda version: serving.on_ray.probe(config, version), config.rollout)


def _tick(mover: Rollout, say: Say) -> None:
    for version in mover.tick():
        say(f"{version.label}: {version.status}")


def _result(versions: Sequence[Version], registry: Registry) -> UpgradeResult:
    return UpgradeResult(tuple(registry.version(version.id).status for version in versions))
