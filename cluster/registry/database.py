"""Opening the registry's database, SQLite or PostgreSQL, and bringing its schema up to date."""

import random
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, inspect, select, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from cluster.errors import StorageError
from cluster.registry.tables import REVISION, REVISION_TABLE, metadata, schema_version

_BUSY_TIMEOUT_S = 30.0
_WRITES = "relora_writes"  # execution option of the writing engine
_WRITE_LOCK = 0x72656C6F7261  # the PostgreSQL advisory lock that all writers take: "relora" in ASCII
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATING = threading.Lock()  # Alembic's context is global, so a process migrates one database at a time
_HAS_REVISIONS = 3  # the schema version of every database with a revision; releases without migrations refuse it
_STAMPS = {1: "0001", 2: "0002"}  # from the schema version that those releases wrote to its revision


def open_engines(url: str) -> tuple[Engine, Engine]:
    """Return (reading, writing) engines that share a connection pool; create the schema, or bring it up to date.

    A transaction of the writing engine takes the database's only write lock when it begins. So what it reads stays true
    until it commits, and events get their ids in the order of the commits. An older schema in a SQLite file is
    migrated. On a server, which other releases may be using, StorageError says how to do that.
    """
    reading, writing = _engines(url)
    _prepare(reading, writing, may_migrate=reading.dialect.name == "sqlite")
    return reading, writing


def migrate(url: str) -> tuple[str | None, str]:
    """Bring the schema up to date, on a server too; return the revisions before (None: no schema) and after."""
    reading, writing = _engines(url)
    before = _prepare(reading, writing, may_migrate=True)
    reading.dispose()
    return before, REVISION


def _engines(url: str) -> tuple[Engine, Engine]:
    try:
        reading = create_engine(url)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise StorageError(f"Registry {url.partition('://')[0]}://...: cannot be opened: {error}") from error
    if reading.dialect.name == "sqlite":
        event.listen(reading, "connect", _set_up_sqlite)
    event.listen(reading, "begin", _begin)
    return reading, reading.execution_options(**{_WRITES: True})


def _prepare(reading: Engine, writing: Engine, *, may_migrate: bool) -> str | None:
    """Create or migrate the schema in one transaction; return its revision before. Closes both engines on errors."""
    try:
        with writing.begin() as connection:
            return _create_or_migrate(connection, may_migrate)
    except SQLAlchemyError as error:
        reading.dispose()
        raise StorageError(f"Registry {reading.url!r}: cannot be opened: {error}") from error
    except StorageError:
        reading.dispose()
        raise


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


def _create_or_migrate(connection: Connection, may_migrate: bool) -> str | None:
    """Create the schema, or migrate it from an older revision. Return its revision before, None if it had none."""
    revision, is_stamped = _revision(connection)
    if revision is None:
        metadata.create_all(connection)
        _stamp(connection, REVISION)
        return None
    if revision > REVISION:
        raise StorageError(
            f"Registry {connection.engine.url!r} has revision {revision}, but this ReLoRA knows only {REVISION}: "
            "a newer release has migrated it. Install that release."
        )
    if revision < REVISION and not may_migrate:
        raise StorageError(
            f"Registry {connection.engine.url!r} has revision {revision}, but this ReLoRA needs {REVISION}. Stop all "
            "that uses it with an older release, then run `relora migrate` once with the fleet file."
        )
    if not is_stamped:
        _stamp(connection, revision)
    if revision < REVISION:
        _run_revisions(connection)
    return revision


def _revision(connection: Connection) -> tuple[str | None, bool]:
    """Return the revision of the schema, None if there is no schema, and whether the database says so itself."""
    tables = inspect(connection)
    if tables.has_table(REVISION_TABLE.name):
        return str(connection.execute(select(REVISION_TABLE.c.version_num)).scalar()), True
    if not tables.has_table(schema_version.name):
        return None, False
    number = connection.execute(select(schema_version.c.number)).scalar()
    if number not in _STAMPS:
        raise StorageError(f"Registry {connection.engine.url!r} has schema version {number}, which no release writes.")
    return _STAMPS[number], False


def _stamp(connection: Connection, revision: str) -> None:
    """Note the schema's revision in the database."""
    REVISION_TABLE.create(connection, checkfirst=True)
    for table, values in ((REVISION_TABLE, {"version_num": revision}), (schema_version, {"number": _HAS_REVISIONS})):
        connection.execute(delete(table))
        connection.execute(insert(table).values(values))


def _run_revisions(connection: Connection) -> None:
    """Run the revisions that the database lacks, within the connection's transaction."""
    from alembic import command  # imported here because it is seldom needed
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with _MIGRATING:
        command.upgrade(config, "head")
