"""Alembic migrations, run by the coordinator itself when it starts; each version is a module in `versions`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

_ADVISORY_LOCK = 0x6564676573  # "edges": replicas that start together migrate one after another


def upgrade(engine: Engine) -> None:
    """Brings the database to the newest version, in one transaction where the database can."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        command.upgrade(alembic_config(connection), "head")


def alembic_config(connection: object) -> Config:
    """The configuration that an alembic.ini would hold, on an open connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
