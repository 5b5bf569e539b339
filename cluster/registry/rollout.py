"""How a new version takes over its adapter's traffic, step by step.

CANDIDATE -(loads on a replica of its base and answers its golden prompts)-> READY -> CANARY -(serves for `canary_s`
without a failure)-> LIVE; the first failure leads to ROLLED_BACK. All state is in the registry. So a rollout that was
killed continues where it stopped, and two rollouts at the same time do no harm.
"""

import time
from collections.abc import Callable

from cluster.config.settings import RolloutConfig
from cluster.errors import ConflictError, OverloadedError, ReloraError
from cluster.registry.records import Status, Version
from cluster.registry.registry import Registry

CANARY_FAILURE = "canary_failure"
"""The kind of event that serving logs if a canary version fails a request."""


class Rollout:
    """Moves versions for `base` from CANDIDATE to LIVE; call `tick` every `config.poll_s` seconds.

    Versions for other bases stay as they are, because these bases may have no engine. `probe` loads a version on a
    replica of its base and checks its answers to `version.details["golden"]`. It raises a ReloraError if that fails, or
    OverloadedError to be called again later. `clock` must be the registry's clock: seconds since the epoch.
    """

    def __init__(
        self,
        registry: Registry,
        base: str,
        probe: Callable[[Version], None],
        config: RolloutConfig,
        clock: Callable[[], float] = time.time,
    ):
        self._registry = registry
        self._base = base
        self._probe = probe
        self._config = config
        self._clock = clock

    def tick(self) -> list[Version]:
        """Move every version that is ready for it one step further; return the moved versions with their new status.

        Versions of a paused adapter stay as they are, except that a canary that fails is rolled back.
        """
        steps = {Status.CANDIDATE: self._check_readiness, Status.READY: self._start_canary, Status.CANARY: self._judge}
        paused = self._registry.paused()
        moved = []
        for version in self._registry.versions(base=self._base, statuses=steps):
            step = steps[version.status]
            if version.adapter in paused:
                step = self._keep if version.status is not Status.CANARY else self._roll_back_if_failed
            try:
                moved.append(step(version))
            except ConflictError:
                continue  # another process moved it first
        return [version for version in moved if version is not None]

    def is_busy(self) -> bool:
        """Whether a version is still on its way to LIVE; those of paused adapters do not count."""
        on_their_way = (Status.CANDIDATE, Status.READY, Status.CANARY)
        moving = {version.adapter for version in self._registry.versions(base=self._base, statuses=on_their_way)}
        return bool(moving - self._registry.paused())

    def _check_readiness(self, version: Version) -> Version | None:
        try:
            self._probe(version)
        except OverloadedError:
            return None
        except ReloraError as error:
            return self._roll_back(version, f"readiness: {error}")
        return self._registry.move(version.id, Status.CANDIDATE, Status.READY)

    def _start_canary(self, version: Version) -> Version | None:
        for canary in self._registry.versions(adapter=version.adapter, statuses=(Status.CANARY,)):
            # An adapter has one canary at a time. If this one is for another base, no rollout may be left to judge it.
            return None if canary.base == self._base else self._judge(canary)
        return self._registry.move(version.id, Status.READY, Status.CANARY)

    def _judge(self, version: Version) -> Version | None:
        failed = self._roll_back_if_failed(version)
        if failed is not None or self._clock() - version.updated_at < self._config.canary_s:
            return failed
        return self._registry.promote(version.id)

    def _roll_back_if_failed(self, version: Version) -> Version | None:
        """Roll a canary back if it has failed a request since it last became a canary."""
        events = self._registry.events(version_id=version.id)
        began = max((e.id for e in events if e.kind == "moved" and e.details["target"] == Status.CANARY), default=0)
        failures = [event for event in events if event.kind == CANARY_FAILURE and event.id > began]
        if not failures:
            return None
        return self._roll_back(version, f"canary: {failures[0].details.get('reason', 'a request failed')}")

    def _keep(self, version: Version) -> None:
        """Leave the version of a paused adapter as it is."""

    def _roll_back(self, version: Version, reason: str) -> Version:
        return self._registry.move(version.id, version.status, Status.ROLLED_BACK, details={"rolled_back": reason})
