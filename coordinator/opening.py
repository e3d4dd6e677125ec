"""The service that a coordinator's settings name, for the server, its workers and the command line alike."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import STORE_SETTINGS, Settings, place_words
from edgestill.coordinator.store.blobs import open_blobs
from edgestill.coordinator.store.database import Store
from edgestill.runtime.errors import UsageError


def open_service(settings: Settings) -> Service:
    """Opens or creates database and blobs. Errors: StoreError, BlobError, UsageError, OSError."""
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
    url = settings.database_url
    file = url.removeprefix("sqlite:///").partition("?")[0]
    if file != url and not Path(file).exists():
        flag, where = ("--database", url) if settings.database else ("--data-dir", settings.data_dir)
        place = place_words({name: getattr(settings, name) for name in STORE_SETTINGS})
        raise UsageError(
            f"no coordinator's data in {where}",
            f"check {flag}; `edgestill serve{place}` makes a place that is new",
        )


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
