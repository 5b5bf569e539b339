"""Bases, adapters, versions and events. Before Alembic this was schema version 1."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table("schema_version", sa.Column("number", sa.Integer, primary_key=True, autoincrement=False))
    op.create_table(
        "bases",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "adapters",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("data", sa.String, nullable=False),
        sa.Column("metric", sa.String, nullable=False),
        sa.Column("traffic", sa.Float, nullable=False),
    )
    _create_versions()
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("version_id", sa.ForeignKey("versions.id"), index=True),
        sa.Column("adapter", sa.String),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )


def _create_versions() -> None:
    versions = op.create_table(
        "versions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("adapter", sa.ForeignKey("adapters.name"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("base", sa.ForeignKey("bases.name"), nullable=False),
        sa.Column("status", sa.String, nullable=False, index=True),
        sa.Column("blob_key", sa.String),
        sa.Column("content_hash", sa.String),
        sa.Column("parent_id", sa.ForeignKey("versions.id")),
        sa.Column("quality", sa.Float),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.UniqueConstraint("adapter", "number"),
    )
    is_live = versions.c.status == "live"
    op.create_index(
        "one_live_per_adapter", "versions", ["adapter"], unique=True, sqlite_where=is_live, postgresql_where=is_live
    )
