"""The upgrade loop and the rollout loop of the `relora` command line: campaigns make candidates, rollouts move traffic.

Both loops need a running Ray cluster that this process has joined (`cluster.on_ray.join`). With `rollout.traffic =
"engines"` the rollout loop needs none.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import readapt.on_ray
import serving.on_ray
from cluster.config.settings import Fleet
from cluster.errors import ReloraError
from cluster.fleet import OpenFleet, open_blobs
from cluster.progress import Say
from cluster.registry.registry import Registry, Status, Version
from cluster.registry.rollout import Rollout
from readapt.campaign.campaign import Campaign, in_background
from serving.remote.pool import check_answering
from serving.remote.sync import EngineSync


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
    traffic = _traffic(config, opened.registry, say)
    mover = _rollout(config, opened.registry, base)
    with in_background(_campaign(opened, base, say)) as settled:
        try:
            traffic.start_engine(base)
            _move([mover], traffic, say, config.rollout.poll_s, settled.done)
        except ReloraError as error:
            say(f"stopping the campaign: {error}")  # said now, because running adapters may take a while to stop
            raise
    return _result(settled.result(), opened.registry)


def roll_out(config: Fleet, registry: Registry, base: str | None, say: Say) -> UpgradeResult:
    """Move traffic to all waiting candidates, or only to those on `base`; start the engines that are missing."""
    waiting = registry.versions(base=base, statuses=(Status.CANDIDATE, Status.READY, Status.CANARY))
    traffic = _traffic(config, registry, say)
    movers = []
    for name in sorted({version.base for version in waiting}):
        if not traffic.has_engine(name):
            traffic.start_engine(name)
        movers.append(_rollout(config, registry, name))
    _move(movers, traffic, say, config.rollout.poll_s)
    return _result(waiting, registry)


class _Gateway:
    """Our gateway moves the traffic: it follows the registry by itself."""

    def __init__(self, config: Fleet):
        serving.on_ray.check_gateway(config)
        self._config = config

    def has_engine(self, base: str) -> bool:
        """Whether an engine of ours runs the base."""
        return not self._config.engines_of(base) and serving.on_ray.has_engine(base)

    def start_engine(self, base: str) -> None:
        """Start the base's engine, or check that its servers answer and that the gateway knows them."""
        serving.on_ray.deploy_base(self._config, base)

    def follow(self) -> bool:
        """Return True: the gateway has nothing left to do that we would have to wait for."""
        return True


class _Engines:
    """Nobody here moves the traffic: the servers of `[[engines]]` get the adapters that are live."""

    def __init__(self, config: Fleet, registry: Registry, say: Say):
        self._config = config
        self._sync = EngineSync(config, registry, open_blobs(config), say)

    def has_engine(self, base: str) -> bool:
        """Return False: `start_engine` only checks."""
        return False

    def start_engine(self, base: str) -> None:
        """Raise BackendDiedError if no server of the base answers."""
        check_answering(self._config, base)

    def follow(self) -> bool:
        """Load and unload what the registry asks for. Return whether nothing is left to do."""
        return self._sync.run()


def _traffic(config: Fleet, registry: Registry, say: Say) -> _Gateway | _Engines:
    return _Gateway(config) if config.rollout.traffic == "gateway" else _Engines(config, registry, say)


def _campaign(opened: OpenFleet, base: str, say: Say) -> Campaign:
    executor = readapt.on_ray.RayExecutor(opened.config)
    return Campaign(opened.config, opened.registry, opened.blobs, base, executor, say=say)


def _rollout(config: Fleet, registry: Registry, base: str) -> Rollout:
    has_canaries = config.rollout.traffic == "gateway"
    settings = config.rollout if has_canaries else replace(config.rollout, canary_s=0.0)
    return Rollout(registry, base, lambda version: serving.on_ray.probe(config, version), settings)


def _move(
    movers: Sequence[Rollout],
    traffic: _Gateway | _Engines,
    say: Say,
    poll_s: float,
    has_ended: Callable[[], bool] = lambda: True,
) -> None:
    """Move versions, with their traffic behind them, until the source of candidates has ended and nothing is left.

    The traffic follows in each round: an adapter that is live does not wait for the others.
    """
    while True:
        for mover in movers:
            _tick(mover, say)
        has_followed = traffic.follow()
        if has_ended() and has_followed and not any(mover.is_busy() for mover in movers):
            return
        time.sleep(poll_s)


def _tick(mover: Rollout, say: Say) -> None:
    for version in mover.tick():
        say(f"{version.label}: {version.status}")


def _result(versions: Sequence[Version], registry: Registry) -> UpgradeResult:
    return UpgradeResult(tuple(registry.version(version.id).status for version in versions))
