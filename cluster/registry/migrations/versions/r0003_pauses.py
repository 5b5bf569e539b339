"""Adapters that a person has paused."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "pauses",
        sa.Column("adapter", sa.String, sa.ForeignKey("adapters.name"), primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
    )
