"""The service that a coordinator's settings name, for the server, its workers and the command line alike."""

from __future__ import annotations

from coordinator.blobs import open_blobs
from coordinator.service import Service
from coordinator.settings import Settings
from coordinator.store import Store
from edge_runtime.errors import UsageError


def open_service(settings: Settings) -> Service:
    """Opens or creates database and blobs. Errors: StoreError, BlobError, UsageError, OSError."""
    if not settings.database or not settings.blobs:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Service(
        Store(settings.database_url),
        open_blobs(settings.blobs_location),
        quota_bytes=settings.quota_bytes,
        max_body_bytes=settings.max_body_bytes,
        engine_threads=settings.distil_threads,
    )


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
