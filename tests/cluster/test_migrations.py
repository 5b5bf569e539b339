"""Registries of older releases keep their history: a file is migrated when it is opened, a server on request."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cluster.errors import StorageError
from cluster.registry import database, tables
from cluster.registry.registry import Registry, Status
from tests.worlds.registries import fresh_url

COMMON = """
CREATE TABLE schema_version (number INTEGER NOT NULL PRIMARY KEY);
CREATE TABLE adapters (name VARCHAR NOT NULL PRIMARY KEY, data VARCHAR NOT NULL, metric VARCHAR NOT NULL,
  traffic FLOAT NOT NULL);
CREATE TABLE versions (id {serial}, adapter VARCHAR NOT NULL REFERENCES adapters (name), number INTEGER NOT NULL,
  base VARCHAR NOT NULL REFERENCES bases (name), status VARCHAR NOT NULL, blob_key VARCHAR, content_hash VARCHAR,
  parent_id INTEGER REFERENCES versions (id), quality FLOAT, details JSON NOT NULL, created_at FLOAT NOT NULL,
  updated_at FLOAT NOT NULL, UNIQUE (adapter, number));
CREATE INDEX ix_versions_status ON versions (status);
CREATE UNIQUE INDEX one_live_per_adapter ON versions (adapter) WHERE status = 'live';
CREATE TABLE events (id {serial}, at FLOAT NOT NULL, version_id INTEGER REFERENCES versions (id), adapter VARCHAR,
  kind VARCHAR NOT NULL, details JSON NOT NULL);
CREATE INDEX ix_events_version_id ON events (version_id);
INSERT INTO schema_version VALUES ({number});
INSERT INTO adapters VALUES ('intent', 'tasks/intent', 'exact_match', 3.0);
INSERT INTO versions (adapter, number, base, status, details, created_at, updated_at)
  VALUES ('intent', 1, 'v1', 'live', '{{"rung": "copy"}}', 1.0, 2.0);
INSERT INTO events (at, version_id, adapter, kind, details) VALUES (1.0, 1, 'intent', 'added', '{{"status": "live"}}');
"""
OLD = {  # as the releases before migrations created it, with a fleet of one adapter
    1: "CREATE TABLE bases (name VARCHAR NOT NULL PRIMARY KEY, path VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL,"
    " created_at FLOAT NOT NULL); INSERT INTO bases VALUES ('v1', 'models/v1', 'f1', 1.0);" + COMMON,
    2: "CREATE TABLE bases (name VARCHAR NOT NULL PRIMARY KEY, path VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL,"
    " stamp VARCHAR NOT NULL, created_at FLOAT NOT NULL); INSERT INTO bases VALUES ('v1', 'models/v1', 'f1', '', 1.0);"
    + COMMON
    + "CREATE INDEX ix_events_kind ON events (kind);"
    + "CREATE TABLE heartbeats (owner VARCHAR NOT NULL PRIMARY KEY, num_beats INTEGER NOT NULL);",
}
SERIAL = {"sqlite": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "postgresql": "SERIAL PRIMARY KEY"}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with fresh_url(request.param, tmp_path) as url:
        yield url


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def write_old(url: str, number: int) -> None:
    script = OLD[number].format(serial=SERIAL[url.split(":")[0].split("+")[0]], number=number)
    with connected(url) as connection:
        for statement in filter(str.strip, script.split(";")):
            connection.exec_driver_sql(statement)


def check_history(url: str) -> None:
    registry = Registry(url)
    (version,) = registry.versions()
    assert (version.label, version.status, version.details) == ("intent@1", Status.LIVE, {"rung": "copy"})
    assert (version.created_at, registry.adapter("intent").traffic, registry.base("v1").stamp) == (1.0, 3.0, "")
    assert [event.kind for event in registry.events()] == ["added"]
    registry.beat("someone")
    assert registry.beats() == {"someone": 1}
    assert registry.add_version("intent", "v1", Status.PLANNED, parent_id=version.id).number == 2
    registry.close()


def differences(url: str) -> list:
    """What a database lacks, or has beyond `cluster.registry.tables`."""
    with connected(url) as connection:
        options = {"version_table": tables.REVISION_TABLE.name}
        return compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)


@pytest.mark.parametrize("number", OLD)
def test_an_older_registry_keeps_its_history(url: str, number: int):
    write_old(url, number)
    before, after = database.migrate(url)
    assert (before, after) == (f"000{number}", tables.REVISION)
    check_history(url)
    assert database.migrate(url) == (tables.REVISION, tables.REVISION)
    assert differences(url) == []


def test_an_older_file_is_migrated_when_it_is_opened(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/registry.db"
    write_old(url, 1)
    check_history(url)


def test_an_older_database_on_a_server_is_only_migrated_on_request(tmp_path: Path):
    with fresh_url("postgresql", tmp_path) as url:
        write_old(url, 1)
        with pytest.raises(StorageError, match=r"revision 0001.*needs 0003.*relora migrate"):
            Registry(url)
        database.migrate(url)
        check_history(url)


def open_and_close(url: str) -> bool:
    Registry(url).close()
    return True


def test_many_processes_can_migrate_the_same_file(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/registry.db"
    write_old(url, 1)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert all(task.result() for task in [pool.submit(open_and_close, url) for _ in range(8)])
    check_history(url)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/registry.db"
    write_old(url, 1)
    with connected(url) as connection:
        connection.exec_driver_sql("CREATE TABLE heartbeats (something_else INTEGER)")  # the revision cannot create it
        before = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master ORDER BY name").all()
    with pytest.raises(StorageError, match="heartbeats already exists"):
        Registry(url)
    with connected(url) as connection:
        assert connection.exec_driver_sql("SELECT name, sql FROM sqlite_master ORDER BY name").all() == before
        assert connection.exec_driver_sql("SELECT number FROM schema_version").scalar() == 1


def test_a_new_database_is_what_the_revisions_make_of_an_old_one(url: str):
    assert database.migrate(url) == (None, tables.REVISION)
    assert differences(url) == []
    assert database.migrate(url) == (tables.REVISION, tables.REVISION)


def test_the_revisions_are_one_line_up_to_the_tables():
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    revisions = [revision.revision for revision in script.walk_revisions()]
    assert script.get_heads() == [tables.REVISION] == revisions[:1]
    assert sorted(revisions, reverse=True) == revisions, "numbers rise"


def test_releases_without_migrations_refuse_the_database(tmp_path: Path):
    """They read only `schema_version`, and know 1 and 2."""
    url = f"sqlite:///{tmp_path}/registry.db"
    write_old(url, 2)
    Registry(url).close()
    with connected(url) as connection:
        assert connection.exec_driver_sql("SELECT number FROM schema_version").all() == [(3,)]


def test_a_newer_database_is_refused(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/registry.db"
    Registry(url).close()
    with connected(url) as connection:
        connection.exec_driver_sql("UPDATE registry_revision SET version_num = '9999'")
    with pytest.raises(StorageError, match=r"revision 9999.*knows only 0003.*newer release"):
        Registry(url)


def test_a_schema_that_no_release_wrote_is_refused(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/registry.db"
    write_old(url, 2)
    with connected(url) as connection:
        connection.exec_driver_sql("UPDATE schema_version SET number = 99")
    with pytest.raises(StorageError, match="schema version 99, which no release writes"):
        Registry(url)
