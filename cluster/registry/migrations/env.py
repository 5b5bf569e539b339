"""How Alembic runs the revisions: on the connection of `cluster.registry.database`, within its transaction."""

from alembic import context

from cluster.registry.tables import REVISION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=REVISION_TABLE.name,
)
with context.begin_transaction():
    context.run_migrations()
