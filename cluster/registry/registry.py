"""The registry: which base models, adapters and versions exist, and what has happened to them.

Re-adaptation, rollout and serving communicate only through the registry. Threads and processes can use it at the same
time. Every change of a status is one compare-and-swap that is logged in the same transaction. So a process that is
killed at any point leaves a registry from which another can continue, and replaying the log gives the statuses.
"""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from cluster.errors import ConflictError
from cluster.names import check_name
from cluster.registry.records import TRANSITIONS, AdapterRecord, BaseModel, Event, Route, Status, Version
from cluster.registry.tables import adapters, bases, events, heartbeats, pauses, versions
from cluster.registry.transactions import Transactions, locked, only, version_of

__all__ = ["AdapterRecord", "BaseModel", "Event", "Registry", "Route", "Status", "Version"]


class Registry(Transactions):
    """The database of a fleet, and the only way to change a version's status.

    It owns a pool of connections: threads can share it, but another process needs its own (send the URL). Any call can
    raise StorageError if the database cannot be reached. `clock` gives the time of records in seconds since the epoch.
    """

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
        return BaseModel(**only(rows, f"base model {name!r}")._mapping)

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
        return AdapterRecord(**only(rows, f"adapter {name!r}")._mapping)

    def adapters(self) -> list[AdapterRecord]:
        """Return all adapters by name."""
        return [AdapterRecord(**row._mapping) for row in self._select(select(adapters).order_by(adapters.c.name))]

    def pause(self, name: str) -> None:
        """Keep campaigns and rollouts from moving the adapter's versions forward; NotFoundError if it is unknown."""
        self.adapter(name)
        with self._write() as connection:
            if not connection.execute(select(pauses).where(pauses.c.adapter == name)).all():
                connection.execute(insert(pauses).values(adapter=name, at=self._clock()))
                self._append(connection, "paused", adapter=name)

    def resume(self, name: str) -> None:
        """End the adapter's pause, if it has one; NotFoundError if it is unknown."""
        self.adapter(name)
        with self._write() as connection:
            if connection.execute(delete(pauses).where(pauses.c.adapter == name)).rowcount:
                self._append(connection, "resumed", adapter=name)

    def paused(self) -> set[str]:
        """Return the names of the adapters that are paused."""
        return {row.adapter for row in self._select(select(pauses))}

    def remove_adapter(self, name: str) -> list[Version]:
        """Delete an adapter and its versions; return these. Their events stay, without their ids.

        Raises NotFoundError if it is unknown, and ConflictError while a campaign works on one of its versions.
        """
        self.adapter(name)
        with self._write() as connection:
            rows = connection.execute(select(versions).where(versions.c.adapter == name).order_by(versions.c.id)).all()
            removed = [version_of(row) for row in rows]
            for version in removed:
                if version.status is Status.ADAPTING:
                    raise ConflictError(f"{version.label} is being adapted: stop its campaign first, or wait.")
            ids = [version.id for version in removed]
            connection.execute(update(events).where(events.c.version_id.in_(ids)).values(version_id=None, adapter=name))
            connection.execute(update(versions).where(versions.c.adapter == name).values(parent_id=None))
            for table, column in (
                (versions, versions.c.adapter),
                (pauses, pauses.c.adapter),
                (adapters, adapters.c.name),
            ):
                connection.execute(delete(table).where(column == name))
            details = {version.label: version.status for version in removed}
            self._append(connection, "adapter_removed", adapter=name, details={"versions": details})
        return removed

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
            version = version_of(row)
            self._append(connection, "added", version, {"status": status, "base": base})
        return version

    def version(self, id: int) -> Version:
        """Return a version by id, or raise NotFoundError."""
        return version_of(only(self._select(select(versions).where(versions.c.id == id)), f"version with id {id}"))

    def find(self, adapter: str, number: int) -> Version:
        """Return an adapter's version by its number, or raise NotFoundError."""
        query = select(versions).where(versions.c.adapter == adapter, versions.c.number == number)
        return version_of(only(self._select(query), f"version {adapter}@{number}"))

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
        return [version_of(row) for row in self._select(query)]

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
            version = locked(connection, version_id)
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
            version = locked(connection, version_id)
            if Status.LIVE not in TRANSITIONS[version.status]:
                raise ConflictError(
                    f"{version.label} is {version.status}; only a canary or retired version can go live."
                )
            live = (versions.c.adapter == version.adapter) & (versions.c.status == Status.LIVE)
            for row in connection.execute(select(versions).where(live)).all():
                self._swap(connection, version_of(row), Status.LIVE, Status.RETIRED)
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


def _check_none_is_live(connection: Connection, adapter: str) -> None:
    live = select(versions.c.number).where(versions.c.adapter == adapter, versions.c.status == Status.LIVE)
    number = connection.execute(live).scalar()
    if number is not None:
        raise ConflictError(f"{adapter}@{number} is live; another version can only replace it by promotion.")
