"""Where adapters are, as told to people: by one engine, and summed up over a base's engines."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class Tier(StrEnum):
    """Where an adapter's weights are, the quickest place that has them."""

    DEVICE = "device"  # in an engine's pages
    HOST = "host"  # packed, in an engine's host memory
    DISK = "disk"  # packed, in a file of a machine that has an engine; the next request maps it
    STORE = "store"  # in the blob store only; the next request fetches it


@dataclass(frozen=True)
class Residency:
    """One adapter on the engines that have it.

    `num_bytes` is what it takes of private host memory, all engines together. `num_hits` is how many requests found it
    there, `num_running` how many run with it now. `load_s` is the slowest load: mapped, or fetched, checked and packed.
    """

    key: str
    tier: Tier
    num_bytes: int = 0
    num_hits: int = 0
    num_running: int = 0
    load_s: float = 0.0


def summed(reports: Iterable[Residency]) -> dict[str, Residency]:
    """The reports of several engines as one for each adapter, by key."""
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
