"""Registry databases for tests: a SQLite file or a schema of a PostgreSQL server, and those of older releases."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy


@contextmanager
def fresh_url(kind: str, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty registry, "sqlite" or "postgresql"; skip without RELORA_TEST_POSTGRES_URL."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/registry.db"
        return
    server = os.environ.get("RELORA_TEST_POSTGRES_URL")
    if server is None:
        pytest.skip("needs RELORA_TEST_POSTGRES_URL, e.g. postgresql+psycopg://user@127.0.0.1/test")
    engine = sqlalchemy.create_engine(server)
    schema = f"relora_{uuid.uuid4().hex}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"CREATE SCHEMA {schema}"))
    options = {"options": f"-csearch_path={schema}"}
    yield engine.url.update_query_dict(options).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()
