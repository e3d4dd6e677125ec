"""The coordinator's memory: SQLite or PostgreSQL behind transactions of small, named reads and writes.

A write transaction on a task is alone: on SQLite it begins IMMEDIATE, on PostgreSQL it locks the task's row. So a
round's transition (read, step, write) is one step for every replica. A commit is durable when `write` returns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from edgestill.coordinator.settings import place_words
from edgestill.coordinator.store import migrations
from edgestill.coordinator.store.migrations.definitions import CannotGoBack
from edgestill.coordinator.store.place import without_secrets
from edgestill.coordinator.store.schema import metadata
from edgestill.coordinator.store.transaction import Transaction
from edgestill.runtime.errors import EdgestillError

_LOG = logging.getLogger("coordinator")
_BUSY_S = 20


class StoreError(EdgestillError):
    """A database that cannot be opened or does not answer."""


class Store:
    """Opens the database and brings it to the newest schema; a `checked` one must be of it already, and with `any`
    there is nothing to do but `downgrade`.

    `url` as in SQLAlchemy: `sqlite:///FILE`, `sqlite://` (memory), `postgresql://USER@HOST/NAME`.
    Errors: StoreError, also for a database of a newer program.
    """

    def __init__(self, url: str = "sqlite://", schema: Literal["newest", "checked", "any"] = "newest") -> None:
        self.url = _parse_url(url)
        self._sqlite = self.url.get_backend_name() == "sqlite"
        self.in_memory = self._sqlite and self.url.database in (None, "", ":memory:")
        self.shown = without_secrets(self.url.render_as_string(hide_password=False))
        # SQLite has one writer: waiting here is fair and cheap, its own waiting polls
        self._lock = threading.RLock()
        try:
            self.engine = self._open()
            if schema == "newest":
                self._migrate()
            elif schema == "checked":
                self._check_version()
        except SQLAlchemyError as error:
            raise StoreError(f"{self.shown}: {_first_line(error)}", "check --database") from error
        except migrations.UnknownVersion as error:
            raise self._unknown(str(error)) from error

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that is committed durably at the end of the block, or not at all if the block raises."""
        with self._exclusive(self._sqlite), self._errors(), self.engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            transaction = Transaction(connection, locks_rows=not self._sqlite)
            try:
                yield transaction
                transaction.write_changes()
                self._commit(connection)
            except BaseException:
                connection.rollback()
                raise
        for message, values in transaction.said:
            _LOG.info(message, *values)

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A consistent view of the database, not to be written to."""
        with self._exclusive(self.in_memory), self._errors(), self.engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                # several statements see one moment; a writer, which waits for its lock, must see the newest
                connection.execution_options(isolation_level="REPEATABLE READ")
            try:
                yield Transaction(connection, locks_rows=False)
            finally:
                connection.rollback()

    def downgrade(self, version: str) -> list[str]:
        """Takes a database that nobody serves back to an older version; what is undone, a line each.

        Errors: StoreError.
        """
        try:
            with self._errors():
                return migrations.downgrade(self.engine, version)
        except CannotGoBack as error:
            task, field = error.args
            raise StoreError(
                f"{self.shown}: task {task} runs by {field}, which no version before has",
                f"`edgestill task stop {task}{self._place}` ends it; or restore the backup from before the upgrade",
            ) from error
        except migrations.UnknownVersion as error:
            if str(error) != version:
                raise self._unknown(str(error)) from error
            raise StoreError(
                f"{self.shown}: the database is of an older version than {version} already",
                "serve it with the older edgestill",
            ) from error

    @property
    def file(self) -> Path | None:
        """Of SQLite, unless it is in memory."""
        return Path(self.url.database or "") if self._sqlite and not self.in_memory else None

    def close(self) -> None:
        """Gives all connections back."""
        self.engine.dispose()

    def _commit(self, connection: Any) -> None:
        connection.commit()

    def _open(self) -> Engine:
        if not self._sqlite:
            return create_engine(self.url, pool_pre_ping=True, pool_size=8, max_overflow=8)
        options: dict[str, Any] = {"connect_args": {"check_same_thread": False, "timeout": _BUSY_S}}
        if self.in_memory:
            options["poolclass"] = StaticPool
        else:
            options["pool_size"] = (
                0  # as many as there are threads, and kept: each is opened with four pragmas
            )
        engine = create_engine(self.url, **options)
        event.listen(engine, "connect", _prepare_sqlite)
        return engine

    def _migrate(self) -> None:
        if self.in_memory:
            metadata.create_all(self.engine)  # nothing older can be there
        else:
            with self._exclusive(self._sqlite):
                migrations.upgrade(self.engine)

    def _check_version(self) -> None:
        found, newest = migrations.version_of(self.engine), migrations.versions()[-1]
        if found is not None and found not in migrations.versions():
            raise migrations.UnknownVersion(found)
        if found != newest:
            raise StoreError(
                f"{self.shown}: the database is of version {found}, this edgestill's is {newest}",
                "use the edgestill that serves it; or let this one bring it to its version, by serving it",
            )

    def _unknown(self, version: str) -> StoreError:
        """The error for a database whose version is not known here, with the way back to one that is."""
        newest = migrations.versions()[-1]
        return StoreError(
            f"{self.shown}: the database is of version {version}, this edgestill knows versions up to {newest}",
            f"use the newer edgestill that made it so; or with that one run `edgestill downgrade --to {newest}"
            f"{self._place}` and then this one",
        )

    @property
    def _place(self) -> str:
        return place_words({"database": self.url.render_as_string(hide_password=False)})

    @contextmanager
    def _exclusive(self, needed: bool) -> Iterator[None]:
        if not needed:
            yield
            return
        with self._lock:
            yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise StoreError(f"{self.shown}: {_first_line(error)}", "check the database server") from error


def _parse_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # the latter for a port that is no number
        raise StoreError(
            f"database {without_secrets(text)!r} is not a URL", "sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"database {without_secrets(text)}: not supported", "sqlite:///FILE or postgresql://USER@HOST/NAME")
    return url


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where `write` and `read` say, nowhere else
    for pragma in (
        f"busy_timeout={_BUSY_S * 1000}",  # first: changing the journal mode waits for others, too
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _first_line(error: SQLAlchemyError) -> str:
    # what SQLAlchemy adds, the statement and its parameters, is for no log
    return str(getattr(error, "orig", None) or error).splitlines()[0]
