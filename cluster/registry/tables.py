"""The registry's tables. A change here needs a revision in `cluster/registry/migrations`."""

from sqlalchemy import (
    JSON,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

REVISION = "0003"
"""The newest revision in `cluster/registry/migrations`: the schema that this file describes."""

REVISION_TABLE = Table("registry_revision", MetaData(), Column("version_num", String(32), primary_key=True))
"""Alembic's table of the database's own revision."""

metadata = MetaData()

# Releases without migrations read only this number. It stays at 3, which they refuse.
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

pauses = Table(
    "pauses",
    metadata,
    Column("adapter", ForeignKey("adapters.name"), primary_key=True),
    Column("at", Float, nullable=False),
)
