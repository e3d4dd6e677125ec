"""Alembic migrations, run by the coordinator itself when it starts; each version is a module in `versions`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

_ADVISORY_LOCK = 0x6564676573  # "edges": replicas that start together migrate one after another


class UnknownVersion(Exception):
    """A database of a version that this program does not know: the argument."""


def upgrade(engine: Engine) -> None:
    """Brings the database to the newest version, in one transaction where the database can. Errors: UnknownVersion."""
    with _alone(engine) as connection:
        _check_known(connection)
        command.upgrade(alembic_config(connection), "head")


def downgrade(engine: Engine, version: str) -> list[str]:
    """Takes the database back to an older version, and says what each version was that is undone, the newest first.

    Errors: UnknownVersion, of the database or as the one wanted.
    """
    with _alone(engine) as connection:
        current = _check_known(connection)
        if version not in versions() or current is None or version > current:
            raise UnknownVersion(version)
        script = _scripts()
        undone = [script.get_revision(one) for one in versions() if version < one <= current]
        command.downgrade(alembic_config(connection), version)
        return [f"{one.revision}: {one.doc}" for one in reversed(undone)]


def version_of(engine: Engine) -> str | None:
    """The version of the database; None before the first."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def versions() -> list[str]:
    """Every version that this program knows, the oldest first."""
    return sorted(one.revision for one in _scripts().walk_revisions())


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A transaction in which no other replica migrates."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def _check_known(connection: Connection) -> str | None:
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in versions():
        raise UnknownVersion(current)
    return current


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(alembic_config(None))


def alembic_config(connection: object) -> Config:
    """The configuration that an alembic.ini would hold, on an open connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
