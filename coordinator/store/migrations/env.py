"""Alembic's entry point: migrates on the connection that `upgrade` opened."""

from __future__ import annotations

from alembic import context

from edgestill.coordinator.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot alter most of a table: Alembic copies it then
    render_as_batch=True,
)
# the transaction is `upgrade`'s own
context.run_migrations()
