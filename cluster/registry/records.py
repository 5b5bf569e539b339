"""The registry's frozen records, and the statuses of a version."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class Status(StrEnum):
    """The status of an adapter version."""

    PLANNED = "planned"  # a campaign is going to make it
    ADAPTING = "adapting"  # a worker is making it
    CANDIDATE = "candidate"  # passed the gate; its files are in the blob store
    READY = "ready"  # loads on a replica of its base and answers its golden prompts
    CANARY = "canary"  # takes a share of the adapter's requests
    LIVE = "live"  # takes the adapter's requests; at most one version of each adapter
    RETIRED = "retired"  # was live; still served by its pinned name, and can become live again
    REJECTED = "rejected"  # did not pass the gate on any rung
    ROLLED_BACK = "rolled_back"  # failed its readiness check or as a canary
    FAILED = "failed"  # an error occurred while it was made


TRANSITIONS: Mapping[Status, frozenset[Status]] = MappingProxyType(
    {
        Status.PLANNED: frozenset({Status.ADAPTING}),
        Status.ADAPTING: frozenset({Status.CANDIDATE, Status.REJECTED, Status.FAILED, Status.PLANNED}),
        Status.CANDIDATE: frozenset({Status.READY, Status.ROLLED_BACK}),
        Status.READY: frozenset({Status.CANARY, Status.ROLLED_BACK}),
        Status.CANARY: frozenset({Status.LIVE, Status.ROLLED_BACK}),
        Status.LIVE: frozenset({Status.RETIRED}),
        Status.RETIRED: frozenset({Status.LIVE}),
        Status.REJECTED: frozenset({Status.PLANNED}),
        Status.ROLLED_BACK: frozenset({Status.CANDIDATE}),
        Status.FAILED: frozenset({Status.PLANNED}),
    }
)
"""The statuses that may follow each status.

ADAPTING -> PLANNED lets another worker take up interrupted work. Only a person asks for REJECTED -> PLANNED and
ROLLED_BACK -> CANDIDATE (`relora retry`).
"""

WARNINGS = "warnings"
"""The key of a version's details that has what people should know about its files."""

_SETBACKS = {Status.REJECTED: "rejected", Status.FAILED: "error", Status.ROLLED_BACK: "rolled_back"}
"""The key of a version's details that has the reason for its status."""


@dataclass(frozen=True)
class BaseModel:
    """A base model; `fingerprint` identifies its weights, so that a name always means the same weights.

    `stamp` identifies its files as last read, by names, sizes and times: as long as it is the same, so are the weights.
    """

    name: str
    path: str
    fingerprint: str
    stamp: str
    created_at: float


@dataclass(frozen=True)
class AdapterRecord:
    """What all versions of an adapter share: its rows, its metric and its share of the traffic."""

    name: str
    data: str
    metric: str
    traffic: float


@dataclass(frozen=True)
class Version:
    """One version of an adapter, for one base model. Times are in seconds since the epoch.

    `blob_key` and `content_hash` are None until the files exist. `parent_id` is the version it was made from.
    """

    id: int
    adapter: str
    number: int
    base: str
    status: Status
    blob_key: str | None
    content_hash: str | None
    parent_id: int | None
    quality: float | None
    details: dict[str, Any]
    created_at: float
    updated_at: float

    @property
    def label(self) -> str:
        """The name that pins this version in a request: `adapter@number`."""
        return f"{self.adapter}@{self.number}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What people should know about the version's files, in words."""
        return tuple(self.details.get(WARNINGS, ()))

    @property
    def setback(self) -> str | None:
        """Why the version was rejected, failed or was rolled back, in words; None in any other status."""
        key = _SETBACKS.get(self.status)
        return None if key is None else str(self.details.get(key, "no reason was recorded"))


@dataclass(frozen=True)
class Event:
    """One entry of the registry's log; ids increase in the order in which events become visible."""

    id: int
    at: float
    version_id: int | None
    adapter: str | None
    kind: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Route:
    """The versions that answer an adapter's requests."""

    live: Version
    canary: Version | None


def jsonable(value: Any) -> Any:
    """Return the value with lists instead of tuples, and None instead of infinities and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
