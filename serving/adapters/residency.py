"""Reports where adapters are: on one engine, and summed up over all engines of a base."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class Tier(StrEnum):
    """Where an adapter's weights are. If several places have them, the fastest counts."""

    DEVICE = "device"  # in the arena of an engine
    HOST = "host"  # packed, in the host memory of an engine
    DISK = "disk"  # packed, in a file on an engine's machine; the next request maps it
    STORE = "store"  # in the blob store only; the next request fetches it


@dataclass(frozen=True)
class Residency:
    """One adapter on the engines that have it.

    `num_bytes` is its private host memory on all engines together. `num_hits` requests found it loaded, and
    `num_running` sequences run with it now. `load_s` is the time of the slowest load.
    """

    key: str
    tier: Tier
    num_bytes: int = 0
    num_hits: int = 0
    num_running: int = 0
    load_s: float = 0.0


def summed(reports: Iterable[Residency]) -> dict[str, Residency]:
    """Sum up the reports of several engines: one for each adapter, by key."""
    known: dict[str, Residency] = {}
    for report in reports:
        known[report.key] = _joined(known[report.key], report) if report.key in known else report
    return known


def _joined(a: Residency, b: Residency) -> Residency:
    return replace(
        a,
        tier=min(a.tier, b.tier, key=list(Tier).index),
        num_bytes=a.num_bytes + b.num_bytes,
        num_hits=a.num_hits + b.num_hits,
        num_running=a.num_running + b.num_running,
        load_s=max(a.load_s, b.load_s),
    )
