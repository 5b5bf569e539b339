"""The rule by which a new version takes over its adapter's traffic, one careful step at a time.

CANDIDATE -(loads on a replica of its base and answers its golden prompts)-> READY -> CANARY -(held for `canary_s`
without a failure)-> LIVE; at the first failure ROLLED_BACK. Where each version stands is in the registry and nowhere
else, so a rollout that was killed goes on where it stopped, and two that run at once do no harm.
"""

import time
from collections.abc import Callable

from cluster.config import RolloutConfig
from cluster.errors import ConflictError, OverloadedError, ReloraError
from cluster.records import TRANSITIONS, Status, Version
from cluster.registry import Registry

__all__ = ["CANARY_FAILURE", "TRANSITIONS", "Rollout"]

CANARY_FAILURE = "canary_failure"
"""The kind of event by which serving says that a canary version failed a request."""


class Rollout:
    """Moves versions for `base` from CANDIDATE to LIVE; call `tick` every `config.poll_s` seconds.

    Those of other bases are left alone, for these may have no engine to ask. `probe` loads a version on a replica of
    its base and lets it answer `version.details["golden"]`; it raises a ReloraError when that fails, or OverloadedError
    when it should be asked again later. `clock` has to be the registry's: seconds since the epoch.
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
        """Take every version that can go on one step further; return those that moved, as they are now."""
        steps = {Status.CANDIDATE: self._check_readiness, Status.READY: self._start_canary, Status.CANARY: self._judge}
        moved = []
        for version in self._registry.versions(base=self._base, statuses=steps):
            try:
                moved.append(steps[version.status](version))
            except ConflictError:
                continue  # somebody else moved it first, which is as good
        return [version for version in moved if version is not None]

    def is_busy(self) -> bool:
        """Whether a version is still on its way to LIVE."""
        on_their_way = (Status.CANDIDATE, Status.READY, Status.CANARY)
        return bool(self._registry.versions(base=self._base, statuses=on_their_way))

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
            # An adapter tries one at a time. One for another base may have no rollout any more that would end it.
            return None if canary.base == self._base else self._judge(canary)
        return self._registry.move(version.id, Status.READY, Status.CANARY)

    def _judge(self, version: Version) -> Version | None:
        failures = self._registry.events(kind=CANARY_FAILURE, version_id=version.id)
        if failures:
            return self._roll_back(version, f"canary: {failures[0].details.get('reason', 'a request failed')}")
        if self._clock() - version.updated_at < self._config.canary_s:
            return None
        return self._registry.promote(version.id)

    def _roll_back(self, version: Version, reason: str) -> Version:
        return self._registry.move(version.id, version.status, Status.ROLLED_BACK, details={"rolled_back": reason})
