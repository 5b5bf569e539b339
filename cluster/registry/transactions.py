"""The registry's transactions: reading, writing under the database's lock, and the one way to change a status."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Row, Select, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import ConflictError, NotFoundError, StorageError
from cluster.registry.database import open_engines
from cluster.registry.records import TRANSITIONS, Status, Version
from cluster.registry.tables import events, versions


class Transactions:
    """What `Registry` builds on."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time):
        self._reading, self._writing = open_engines(url)
        self._clock = clock

    def close(self) -> None:
        """Close the connections; the registry is not usable afterwards."""
        self._reading.dispose()

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
        return version_of(row)

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


def locked(connection: Connection, version_id: int) -> Version:
    """Return the version within a writing transaction, so that no other process can change it meanwhile."""
    rows = connection.execute(select(versions).where(versions.c.id == version_id)).all()
    return version_of(only(rows, f"version with id {version_id}"))


def only(rows: Collection[Row], what: str) -> Row:
    """Return the first of the rows, or raise NotFoundError that names `what`."""
    if not rows:
        raise NotFoundError(f"There is no {what}.")
    return next(iter(rows))


def version_of(row: Row) -> Version:
    """Return a row of `versions` as a record."""
    return Version(**{**row._mapping, "status": Status(row.status)})
