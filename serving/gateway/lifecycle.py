"""What the engines are told when routes change, and what they tell of the adapters that they have."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from cluster.errors import ReloraError
from serving.adapters.residency import Residency, Tier, summed
from serving.gateway.backend import Backend
from serving.gateway.routing import Snapshot, Target

HEALTH_TIMEOUT_S = 5.0


async def residencies(snapshot: Snapshot) -> list[tuple[Target, Residency]]:
    """Every live version and canary, and where its weights are."""
    reports = await asyncio.gather(*map(_reports, snapshot.backends.values()))
    known = dict(zip(snapshot.backends, map(summed, reports), strict=True))
    targets = [target for _, target in sorted(snapshot.adapters().items())]
    return [(target, _residency(target, known.get(target.base, {}))) for target in targets]


async def release_gone(before: Snapshot, now: Snapshot) -> None:
    """Tell the engines of adapters that no name leads to any more, so that they free what these take."""
    gone = before.adapters().keys() - now.adapters().keys()
    await asyncio.gather(*(release(now.backends[base], key) for base, key in gone if base in now.backends))


async def release(backend: Backend, adapter_key: str) -> None:
    """Tell a base's engines of one; those that do not answer free their memory in their own way."""
    with suppress(ReloraError, TimeoutError):
        await asyncio.wait_for(backend.release(adapter_key), HEALTH_TIMEOUT_S)


async def _reports(backend: Backend) -> list[Residency]:
    with suppress(ReloraError, TimeoutError):  # an engine that is starting anew has no adapters
        return await asyncio.wait_for(backend.residencies(), HEALTH_TIMEOUT_S)
    return []


def _residency(target: Target, known: Mapping[str, Residency]) -> Residency:
    assert target.adapter is not None, "a base is no adapter"
    return known.get(target.adapter.key, Residency(target.adapter.key, Tier.STORE))
