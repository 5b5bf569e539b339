"""The registry's tables, and opening its database: SQLite by default, PostgreSQL by URL."""

import random
import sqlite3
import time
from contextlib import closing
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from cluster.errors import StorageError

SCHEMA_VERSION = 2
_BUSY_TIMEOUT_S = 30.0
_WRITES = "relora_writes"  # execution option of the writing engine
_WRITE_LOCK = 0x72656C6F7261  # the PostgreSQL advisory lock that all writers take: "relora" in ASCII

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("number", Integer, primary_key=True, autoincrement=False))

bases = Table(
    "bases",
    metadata,
    Column("name", String, primary_key=True),
    Column("path", String, nullable=False),
    Column("fingerprint", String, nullable=False),
    Column("stamp", String, nullable=False),
    Column("created_at", Float, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String, primary_key=True),
    Column("data", String, nullable=False),
    Column("metric", String, nullable=False),
    Column("traffic", Float, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("adapter", ForeignKey("adapters.name"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("base", ForeignKey("bases.name"), nullable=False),
    Column("status", String, nullable=False, index=True),
    Column("blob_key", String),
    Column("content_hash", String),
    Column("parent_id", ForeignKey("versions.id")),
    Column("quality", Float),
    Column("details", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    UniqueConstraint("adapter", "number"),
)
_is_live = versions.c.status == "live"
Index("one_live_per_adapter", versions.c.adapter, unique=True, sqlite_where=_is_live, postgresql_where=_is_live)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("version_id", ForeignKey("versions.id"), index=True),
    Column("adapter", String),
    Column("kind", String, nullable=False, index=True),
    Column("details", JSON, nullable=False),
    sqlite_autoincrement=True,
)

heartbeats = Table(
    "heartbeats",
    metadata,
    Column("owner", String, primary_key=True),
    Column("num_beats", Integer, nullable=False),
)


def open_engines(url: str) -> tuple[Engine, Engine]:
    """Return (reading, writing) engines that share a connection pool; create the schema, or check its version.

    A transaction of the writing engine takes the database's only write lock when it begins. So what it reads stays true
    until it commits, and events get their ids in the order of the commits.
    """
    try:
        reading = create_engine(url)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise StorageError(f"Registry {url.partition('://')[0]}://...: cannot be opened: {error}") from error
    if reading.dialect.name == "sqlite":
        event.listen(reading, "connect", _set_up_sqlite)
    event.listen(reading, "begin", _begin)
    writing = reading.execution_options(**{_WRITES: True})
    try:
        with writing.begin() as connection:
            _create_or_check(connection)
    except SQLAlchemyError as error:
        reading.dispose()
        raise StorageError(f"Registry {reading.url!r}: cannot be opened: {error}") from error
    except StorageError:
        reading.dispose()
        raise
    return reading, writing


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # _begin starts the transactions, not the driver
    with closing(connection.cursor()) as cursor:
        cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_S * 1000)}")
        _keep_write_ahead_log(cursor)
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")


def _keep_write_ahead_log(cursor: sqlite3.Cursor) -> None:
    """Switch the file to a write-ahead log; retry if other processes do the same.

    If several processes switch a new file at once, SQLite refuses all but one immediately, without the busy timeout,
    because they would wait for each other.
    """
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.001, 0.02))


def _begin(connection: Connection) -> None:
    is_writing = connection.get_execution_options().get(_WRITES, False)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")
    elif is_writing:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _WRITE_LOCK})


def _create_or_check(connection: Connection) -> None:
    if not inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(number=SCHEMA_VERSION))
        return
    found = connection.execute(select(schema_version.c.number)).scalar()
    if found != SCHEMA_VERSION:
        raise StorageError(
            f"Registry {connection.engine.url!r} has schema version {found}, but this ReLoRA reads {SCHEMA_VERSION}. "
            "Use the ReLoRA that wrote it, or set another `registry` in the fleet file and register again."
        )
