"""The stamp of a base's files, and the heartbeats of campaigns. Before Alembic this was schema version 2."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add both. An empty stamp makes the next command read the base's files again."""
    op.add_column("bases", sa.Column("stamp", sa.String, nullable=False, server_default=""))
    op.create_index("ix_events_kind", "events", ["kind"])
    op.create_table(
        "heartbeats",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("num_beats", sa.Integer, nullable=False),
    )
