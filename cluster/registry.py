"""The registry: which base models, adapters and versions exist, and what has happened to them.

Re-adaptation, rollout and serving communicate only through the registry. Threads and processes can use it at the same
time. Every change of a status is one compare-and-swap that is logged in the same transaction. So a process that is
killed at any point leaves a registry from which another can continue, and replaying the log gives the statuses.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from cluster.database import open_engines
from cluster.errors import ConflictError, NotFoundError, StorageError
from cluster.names import check_name
from cluster.records import TRANSITIONS, AdapterRecord, BaseModel, Event, Route, Status, Version
from cluster.tables import adapters, bases, events, heartbeats, versions

__all__ = ["AdapterRecord", "BaseModel", "Event", "Registry", "Route", "Status", "Version"]


class Registry:
    """The database of a fleet, and the only way to change a version's status.

    It owns a pool of connections: threads can share it, but another process needs its own (send the URL). Any call can
    raise StorageError if the database cannot be reached. `clock` gives the time of records in seconds since the epoch.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time):
        self._reading, self._writing = open_engines(url)
        self._clock = clock

    def close(self) -> None:
        """Close the connections; the registry is not usable afterwards."""
        self._reading.dispose()

    # Base models and adapters

    def add_base(self, name: str, path: str, fingerprint: str, stamp: str = "") -> BaseModel:
        """Register a base model, or update its path; ConflictError if the name is registered with other weights."""
        check_name(name)
        with self._write() as connection:
            row = connection.execute(select(bases).where(bases.c.name == name)).one_or_none()
            if row is None:
                base = BaseModel(name, path, fingerprint, stamp, self._clock())
                connection.execute(insert(bases).values(vars(base)))
                self._append(connection, "base_added", details={"name": name, "path": path})
                return base
            if row.fingerprint != fingerprint:
                raise ConflictError(
                    f"Base model {name!r} is registered with other weights (from {row.path}); use a new name."
                )
            connection.execute(update(bases).where(bases.c.name == name).values(path=path, stamp=stamp))
        return BaseModel(**{**row._mapping, "path": path, "stamp": stamp})

    def base(self, name: str) -> BaseModel:
        """Return a base model by name, or raise NotFoundError."""
        rows = self._select(select(bases).where(bases.c.name == name))
        return BaseModel(**_only(rows, f"base model {name!r}")._mapping)

    def bases(self) -> list[BaseModel]:
        """Return all base models in the order of their registration."""
        return [BaseModel(**row._mapping) for row in self._select(select(bases).order_by(bases.c.created_at))]

    def add_adapter(
        self, name: str, data: str = "", metric: str = "exact_match", traffic: float = 1.0
    ) -> AdapterRecord:
        """Register an adapter, or update its record."""
        record = AdapterRecord(check_name(name), data, metric, traffic)
        with self._write() as connection:
            changed = connection.execute(update(adapters).where(adapters.c.name == name).values(vars(record)))
            if changed.rowcount == 0:
                connection.execute(insert(adapters).values(vars(record)))
                self._append(connection, "adapter_added", adapter=name)
        return record

    def adapter(self, name: str) -> AdapterRecord:
        """Return an adapter by name, or raise NotFoundError."""
        rows = self._select(select(adapters).where(adapters.c.name == name))
        return AdapterRecord(**_only(rows, f"adapter {name!r}")._mapping)

    def adapters(self) -> list[AdapterRecord]:
        """Return all adapters by name."""
        return [AdapterRecord(**row._mapping) for row in self._select(select(adapters).order_by(adapters.c.name))]

    # Versions

    def add_version(
        self,
        adapter: str,
        base: str,
        status: Status,
        blob_key: str | None = None,
        content_hash: str | None = None,
        parent_id: int | None = None,
        quality: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> Version:
        """Add the adapter's next version; NotFoundError for an unknown adapter, base or parent.

        A second LIVE version of an adapter raises ConflictError: `promote` replaces the live version.
        """
        self.adapter(adapter)
        self.base(base)
        if parent_id is not None:
            self.version(parent_id)
        now = self._clock()
        with self._write() as connection:
            if status is Status.LIVE:
                _check_none_is_live(connection, adapter)
            newest = select(func.max(versions.c.number)).where(versions.c.adapter == adapter)
            number = (connection.execute(newest).scalar() or 0) + 1
            values = {
                "adapter": adapter,
                "number": number,
                "base": base,
                "status": status,
                "blob_key": blob_key,
                "content_hash": content_hash,
                "parent_id": parent_id,
                "quality": quality,
                "details": details or {},
                "created_at": now,
                "updated_at": now,
            }
            row = connection.execute(insert(versions).values(values).returning(versions)).one()
            version = _version(row)
            self._append(connection, "added", version, {"status": status, "base": base})
        return version

    def version(self, id: int) -> Version:
        """Return a version by id, or raise NotFoundError."""
        return _version(_only(self._select(select(versions).where(versions.c.id == id)), f"version with id {id}"))

    def find(self, adapter: str, number: int) -> Version:
        """Return an adapter's version by its number, or raise NotFoundError."""
        query = select(versions).where(versions.c.adapter == adapter, versions.c.number == number)
        return _version(_only(self._select(query), f"version {adapter}@{number}"))

    def versions(
        self, adapter: str | None = None, base: str | None = None, statuses: Collection[Status] | None = None
    ) -> list[Version]:
        """Return the versions that meet all given conditions, oldest first."""
        query = select(versions).order_by(versions.c.id)
        if adapter is not None:
            query = query.where(versions.c.adapter == adapter)
        if base is not None:
            query = query.where(versions.c.base == base)
        if statuses is not None:
            query = query.where(versions.c.status.in_(statuses))
        return [_version(row) for row in self._select(query)]

    def move(
        self,
        version_id: int,
        source: Status,
        target: Status,
        *,
        blob_key: str | None = None,
        content_hash: str | None = None,
        quality: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> Version:
        """Change a version's status from `source` to `target`, and set the other given values; `details` are merged.

        Raises ConflictError if the version is not in `source` (another process was first), if TRANSITIONS has no such
        step, or if the adapter would get a second LIVE version.
        """
        news = {"blob_key": blob_key, "content_hash": content_hash, "quality": quality}
        with self._write() as connection:
            version = _locked(connection, version_id)
            if target is Status.LIVE:
                _check_none_is_live(connection, version.adapter)
            news = {key: value for key, value in news.items() if value is not None}
            return self._swap(
                connection, version, source, target, news | {"details": version.details | (details or {})}
            )

    def promote(self, version_id: int) -> Version:
        """Make a CANARY version LIVE and retire the adapter's previous LIVE version, in one transaction.

        A RETIRED version becomes LIVE again in the same way. Raises ConflictError if the version has any other status.
        """
        with self._write() as connection:
            version = _locked(connection, version_id)
            if Status.LIVE not in TRANSITIONS[version.status]:
                raise ConflictError(
                    f"{version.label} is {version.status}; only a canary or retired version can go live."
                )
            live = (versions.c.adapter == version.adapter) & (versions.c.status == Status.LIVE)
            for row in connection.execute(select(versions).where(live)).all():
                self._swap(connection, _version(row), Status.LIVE, Status.RETIRED)
            return self._swap(connection, version, version.status, Status.LIVE)

    def routes(self) -> dict[str, Route]:
        """Return the route of each adapter that has a LIVE version, as one consistent view."""
        routed = self.versions(statuses=(Status.LIVE, Status.CANARY))
        canaries = {version.adapter: version for version in routed if version.status is Status.CANARY}
        return {v.adapter: Route(v, canaries.get(v.adapter)) for v in routed if v.status is Status.LIVE}

    # Events

    def log(self, kind: str, version_id: int | None = None, adapter: str | None = None, **details: Any) -> None:
        """Append an event; an event of a version is also one of its adapter. NotFoundError for an unknown version."""
        version = None if version_id is None else self.version(version_id)
        with self._write() as connection:
            self._append(connection, kind, version, details, adapter)

    def events(self, after_id: int = 0, kind: str | None = None, version_id: int | None = None) -> list[Event]:
        """Return the events that meet all given conditions, in order; `after_id` is the last event already seen."""
        query = select(events).where(events.c.id > after_id).order_by(events.c.id)
        if kind is not None:
            query = query.where(events.c.kind == kind)
        if version_id is not None:
            query = query.where(events.c.version_id == version_id)
        return [Event(**row._mapping) for row in self._select(query)]

    # Heartbeats

    def beat(self, owner: str) -> None:
        """Add one to the owner's heartbeats."""
        with self._write() as connection:
            one_more = (
                update(heartbeats).where(heartbeats.c.owner == owner).values(num_beats=heartbeats.c.num_beats + 1)
            )
            if connection.execute(one_more).rowcount == 0:
                connection.execute(insert(heartbeats).values(owner=owner, num_beats=1))

    def beats(self) -> dict[str, int]:
        """Return the number of heartbeats of each owner that has not ended them."""
        return {row.owner: row.num_beats for row in self._select(select(heartbeats))}

    def end_beats(self, owner: str) -> None:
        """Delete the heartbeats of an owner that is done or dead."""
        with self._write() as connection:
            connection.execute(delete(heartbeats).where(heartbeats.c.owner == owner))

    # Transactions

    def _swap(
        self,
        connection: Connection,
        version: Version,
        source: Status,
        target: Status,
        values: dict[str, Any] | None = None,
    ) -> Version:
        """Compare and swap a status. Every change of a status goes through here."""
        if target not in TRANSITIONS[source]:
            raise ConflictError(f"{version.label} cannot go from {source} to {target}.")
        swap = update(versions).where(versions.c.id == version.id, versions.c.status == source)
        swap = swap.values(status=target, updated_at=self._clock(), **(values or {})).returning(versions)
        row = connection.execute(swap).one_or_none()
        if row is None:
            raise ConflictError(f"{version.label} is {version.status}, not {source}: another process changed it first.")
        self._append(connection, "moved", version, {"source": source, "target": target})
        return _version(row)

    def _append(
        self,
        connection: Connection,
        kind: str,
        version: Version | None = None,
        details: dict[str, Any] | None = None,
        adapter: str | None = None,
    ) -> None:
        values = {
            "at": self._clock(),
            "version_id": version.id if version else None,
            "adapter": version.adapter if version else adapter,
            "kind": kind,
            "details": details or {},
        }
        connection.execute(insert(events).values(values))

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """Open a transaction with the database's write lock; it commits if the block ends without an error."""
        try:
            with self._writing.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StorageError(f"Registry {self._reading.url!r}: {error}") from error

    def _select(self, query: Select) -> list[Row]:
        try:
            with self._reading.connect() as connection:
                return list(connection.execute(query).all())
        except SQLAlchemyError as error:
            raise StorageError(f"Registry {self._reading.url!r}: {error}") from error


def _locked(connection: Connection, version_id: int) -> Version:
    """Return the version within a writing transaction, so that no other process can change it meanwhile."""
    rows = connection.execute(select(versions).where(versions.c.id == version_id)).all()
    return _version(_only(rows, f"version with id {version_id}"))


def _check_none_is_live(connection: Connection, adapter: str) -> None:
    live = select(versions.c.number).where(versions.c.adapter == adapter, versions.c.status == Status.LIVE)
    number = connection.execute(live).scalar()
    if number is not None:
        raise ConflictError(f"{adapter}@{number} is live; another version can only replace it by promotion.")


def _only(rows: Collection[Row], what: str) -> Row:
    if not rows:
        raise NotFoundError(f"There is no {what}.")
    return next(iter(rows))


def _version(row: Row) -> Version:
    return Version(**{**row._mapping, "status": Status(row.status)})
