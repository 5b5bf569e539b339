"""The history of the registry's schema, one Alembic revision per file in `versions`.

To change the schema:

1. Change `cluster/registry/tables.py`, and set `REVISION` there to the next number.
2. Add `versions/rNNNN_what.py` with an `upgrade` that takes a database from the previous revision to the new one.
3. Run `pytest tests/cluster/test_migrations.py`: it compares a migrated database with a new one.

Older releases may have the database open meanwhile. So only add tables, indexes, and columns that are nullable or have
a server default: SQLite can do nothing else within a transaction while foreign keys are checked. A revision that has
been released never changes. There are no downgrades: restore a backup instead.
"""
