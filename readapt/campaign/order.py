"""The order in which a fleet's adapters are carried over, and what the upgrade cost its users.

The cost is unready traffic: the integral over time of the traffic whose adapter is not ready yet. One worker minimises
it by taking adapters by falling traffic per second of work (Smith, Various optimizers for single-stage production,
1956). For several workers that take the next adapter when they are free, the same order is within (1 + sqrt 2) / 2 of
the optimum (Kawaguchi and Kyan, Worst case bound of an LRF schedule, 1986).

The expected time of an adapter comes from its assessment (`assess`) or else from its last upgrade. If it has neither,
it is the median of the others' times.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median

from cluster.registry.registry import Registry, Status, Version

ASSESSED = "assessed"
SETTLED = frozenset({Status.CANDIDATE, Status.REJECTED, Status.FAILED})


@dataclass(frozen=True)
class UnreadyTraffic:
    """The cost of one upgrade: `integral` in units of traffic times seconds; `mean_s` is that divided by all traffic.

    An adapter is unready from the planning of its first version until that version becomes a candidate. If it does not,
    it is unready until the last version is settled. If a campaign was killed and resumed, the time between counts too.
    """

    integral: float
    mean_s: float


def in_order(
    versions: Collection[Version], traffic: Mapping[str, float], expected_s: Mapping[str, float]
) -> list[Version]:
    """Sort by falling traffic per expected second; among equals the shorter first, then by name."""
    return sorted(
        versions, key=lambda v: (-traffic[v.adapter] / expected_s[v.adapter], expected_s[v.adapter], v.adapter)
    )


def expected_seconds(registry: Registry, versions: Collection[Version]) -> dict[str, float]:
    """Return how long each planned version will probably keep a worker busy, by adapter; all positive."""
    assessed = {(e.version_id, e.details["to"]): e.details["expected_s"] for e in registry.events(kind=ASSESSED)}
    last = {v.adapter: v.details["seconds"]["total"] for v in registry.versions() if "seconds" in v.details}
    known = {v.adapter: assessed.get((v.parent_id, v.base)) or last.get(v.adapter) for v in versions}
    usual = median([seconds for seconds in known.values() if seconds] or [1.0])
    return {adapter: seconds or usual for adapter, seconds in known.items()}


def unready_traffic(registry: Registry, target: str) -> UnreadyTraffic:
    """Return what the upgrade to `target` has cost so far, from the registry's log."""
    traffic = {record.name: record.traffic for record in registry.adapters()}
    newest_first = reversed([v for v in registry.versions(base=target) if v.parent_id is not None])
    versions = {v.id: v for v in {v.adapter: v for v in newest_first}.values()}
    moves = [e for e in registry.events(kind="moved") if e.version_id in versions and e.details["target"] in SETTLED]
    end_at = max((event.at for event in moves), default=0.0)
    ready_at = {event.version_id: event.at for event in moves if event.details["target"] == Status.CANDIDATE}
    waits = [(traffic[v.adapter], ready_at.get(id, end_at) - v.created_at) for id, v in versions.items()]
    integral = sum(share * max(0.0, seconds) for share, seconds in waits)
    return UnreadyTraffic(integral, integral / max(sum(share for share, _ in waits), 1e-9))
