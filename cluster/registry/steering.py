"""What a person may do to one adapter's versions: go back, go forward, try once more.

Each change is one of the registry's own moves, so it is safe beside a running campaign or rollout.
"""

from cluster.errors import ConflictError, NotFoundError
from cluster.registry.records import Status, Version
from cluster.registry.registry import Registry

ON_THEIR_WAY = (Status.CANDIDATE, Status.READY, Status.CANARY)
SETBACKS = (Status.REJECTED, Status.FAILED, Status.ROLLED_BACK)


def roll_back(registry: Registry, name: str, reason: str = "rolled back by hand") -> list[Version]:
    """Undo the adapter's newest step; return the versions that changed, with their new status.

    Versions on their way to LIVE become ROLLED_BACK. If there is none, the version that was LIVE before is LIVE again,
    and the present one RETIRED. Raises NotFoundError for an unknown adapter, ConflictError if nothing can be undone.
    """
    registry.adapter(name)
    details = {"rolled_back": reason}
    waiting = registry.versions(adapter=name, statuses=ON_THEIR_WAY)
    if waiting:
        return [registry.move(version.id, version.status, Status.ROLLED_BACK, details=details) for version in waiting]
    retired = registry.versions(adapter=name, statuses=(Status.RETIRED,))
    if not retired:
        raise ConflictError(f"{name} has nothing to roll back to: no version of it was live before.")
    live = registry.routes().get(name)
    previous = registry.promote(max(retired, key=lambda version: (version.updated_at, version.id)).id)
    return [previous] if live is None else [previous, registry.version(live.live.id)]


def promote(registry: Registry, name: str, number: int | None = None) -> Version:
    """Make a canary, or the given canary or retired version, LIVE now; the present LIVE version becomes RETIRED.

    Raises NotFoundError for an unknown adapter or version, ConflictError if it cannot go live.
    """
    if number is not None:
        return registry.promote(_promotable(registry.find(name, number)).id)
    registry.adapter(name)
    canaries = registry.versions(adapter=name, statuses=(Status.CANARY,))
    if not canaries:
        raise ConflictError(f"{name} has no canary. Name a version that was live before, as in {name}@1.")
    return registry.promote(canaries[-1].id)


def retry(registry: Registry, name: str, number: int | None = None) -> Version:
    """Try a version once more, by default the newest one with a setback; return it with its new status.

    A REJECTED or FAILED version is PLANNED again, for the next campaign. A ROLLED_BACK one keeps its files and is a
    CANDIDATE again, for the next rollout. Raises ConflictError if the adapter is already served by another version
    than the one it was made from, because campaigns ignore such versions.
    """
    registry.adapter(name)
    candidates = registry.versions(adapter=name, statuses=SETBACKS)
    if number is not None:
        candidates = [registry.find(name, number)]
    if not candidates or candidates[-1].status not in SETBACKS:
        raise ConflictError(f"{candidates[-1].label if candidates else name} has no setback to try again.")
    version = candidates[-1]
    route = registry.routes().get(name)
    if route is None or route.live.id != version.parent_id:
        raise ConflictError(f"{version.label} was not made from the live version. `relora upgrade` makes a new one.")
    target = Status.CANDIDATE if version.status is Status.ROLLED_BACK else Status.PLANNED
    return registry.move(version.id, version.status, target)


def _promotable(version: Version) -> Version:
    """Return the version if it may go live without a rollout; ConflictError says what to do instead."""
    match version.status:
        case Status.CANARY | Status.RETIRED:
            return version
        case Status.CANDIDATE | Status.READY:
            advice = "`relora rollout` checks it on an engine and then makes it live"
        case Status.REJECTED | Status.FAILED | Status.ROLLED_BACK:
            advice = f"`relora retry {version.label}` tries it once more"
        case _:
            advice = "only a canary or a retired version can be promoted"
    raise ConflictError(f"{version.label} is {version.status}: {advice}.")


def find(registry: Registry, name: str, number: int | None) -> Version:
    """Return the version of that number, or else the LIVE one. Raises NotFoundError if there is none."""
    if number is not None:
        return registry.find(name, number)
    registry.adapter(name)
    route = registry.routes().get(name)
    if route is None:
        raise NotFoundError(f"No version of {name} is live. Name one, as in {name}@1; `relora show {name}` lists them.")
    return route.live
