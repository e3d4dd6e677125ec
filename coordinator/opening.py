"""The service that a coordinator's settings name, for the server, its workers and the command line alike."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import STORE_SETTINGS, Settings, place_words
from edgestill.coordinator.store.blobs import open_blobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.place import check_no_backup
from edgestill.coordinator.store.records import TaskRecord
from edgestill.runtime.errors import UsageError


def open_service(settings: Settings) -> Service:
    """Opens or creates database and blobs. Errors: StoreError, BlobError, UsageError, OSError."""
    _check_places(settings)
    if not settings.database or not settings.blobs:
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(
                f"--data-dir {settings.data_dir}: cannot be a folder: {error.strerror}",
                "give a folder that is there, or that can be made",
            ) from error
    return Service(
        Store(settings.database_url),
        open_blobs(settings.blobs_location),
        quota_bytes=settings.quota_bytes,
        max_body_bytes=settings.max_body_bytes,
        engine_threads=settings.distil_threads,
    )


def open_existing(settings: Settings) -> Service:
    """`open_service` for a command that works on what is there: a mistyped place must not become an empty one.

    Errors: those of `check_existing` and `open_service`.
    """
    check_existing(settings)
    return open_service(settings)


def check_existing(settings: Settings) -> None:
    """Errors: UsageError where no coordinator has kept anything, or where the store is in memory."""
    check_shared(settings)
    _check_places(settings)
    if (file := _sqlite_file(settings)) is not None and not file.exists():
        flag, where = ("--database", settings.database) if settings.database else ("--data-dir", settings.data_dir)
        place = place_words({name: getattr(settings, name) for name in STORE_SETTINGS})
        raise UsageError(
            f"no coordinator's data in {where}",
            f"check {flag}; `edgestill serve{place}` makes a place that is new",
        )


def _check_places(settings: Settings) -> None:
    """Errors: UsageError where the settings name what lies in a backup."""
    file = _sqlite_file(settings)
    if file is not None:
        check_no_backup(file.parent)
    if "://" not in settings.blobs_location:
        check_no_backup(Path(settings.blobs_location).parent)


def _sqlite_file(settings: Settings) -> Path | None:
    url = settings.database_url
    file = url.removeprefix("sqlite:///").partition("?")[0]
    return None if file == url else Path(file)


def task_creation(place: str) -> str:
    """What makes the first task; `place`: from `place_words`."""
    return f"`edgestill task create --name TASK --bundle BUNDLE --transfer NAME_OR_PATH{place}`"


def start_logging(settings: Settings) -> None:
    """Lets the server and its workers log alike, for people and on stderr."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("alembic").setLevel(
        logging.WARNING
    )  # it tells at every start that it has nothing to do


def is_shared(settings: Settings) -> bool:
    """Whether another process that opens the same settings sees the same store and blobs."""
    in_memory = settings.database_url in ("sqlite://", "sqlite:///:memory:")
    return not in_memory and not settings.blobs_location.startswith("memory:")


def check_shared(settings: Settings) -> None:
    """Errors: UsageError where a command could not change what a server serves."""
    if not is_shared(settings):
        raise UsageError(
            "the store is in memory, where a command and a server do not meet",
            "give --data-dir, or --database",
        )


def find_task(service: Service, name: str, place: str) -> TaskRecord:
    """A task by its name; `place` as for `task_creation`. Errors: UsageError with the names that there are."""
    records = {record.name: record for record in service.tasks()}
    if name not in records:
        hint = f"there are: {', '.join(records)}" if records else f"there is none yet: {task_creation(place)}"
        raise UsageError(f"no task {name!r}", hint)
    return records[name]
