"""Copies of a coordinator, taken while it serves: a SQLite file of everything in the database, and the blobs it needs.

A blob is there before the database refers to it, and is deleted only when nothing refers to it any more. So whoever
reads the database first and then finds every blob that it names has a consistent copy; who misses one has read
something that is over by now, and reads again.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edgestill.coordinator.store.blobs import BlobError, Blobs, FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.sweep import blobs_of
from edgestill.coordinator.store.transaction import Transaction
from edgestill.runtime.errors import UsageError
from edgestill.runtime.files import sync

DATABASE, BLOBS = "coordinator.db", "blobs"
_ATTEMPTS = 20
_ALL_AGES = -1e12


@dataclass(frozen=True)
class Contents:
    """What a backup holds."""

    tasks: int
    devices: int
    blobs: int
    copied_blobs: int
    """Those that were not there from an earlier backup in the same folder."""
    size_bytes: int


def write_backup(store: Store, blobs: Blobs, folder: Path) -> Contents:
    """Makes the folder a backup, or brings one up to date; until its end the earlier one stays as it was.

    Errors: BlobError for a blob that is missing or damaged; StoreError; OSError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = FileBlobs(folder / BLOBS)
    for attempt in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as incoming:
            file = Path(incoming) / DATABASE
            needed, counts = _copy_database(store, file)
            try:
                copied = sum(_copy_blob(blobs, kept, digest) for digest in sorted(needed))
            except _Gone:
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            _put_in_place(file, folder / DATABASE)
        for digest in [one for one in kept.older_than(_ALL_AGES) if one not in needed]:
            kept.delete(digest)
        size_bytes = (folder / DATABASE).stat().st_size + sum(kept.size(digest) or 0 for digest in needed)
        return Contents(*counts, len(needed), copied, size_bytes)
    raise AssertionError("unreachable: the last attempt returns or raises")


def restore_backup(folder: Path, store: Store, blobs: Blobs) -> Contents:
    """Fills a new place with a backup, which may be older than this program and stays as it is.

    Blobs first: whatever fails leaves a database without tasks. Errors: UsageError for what is no backup, and for a
    place that has tasks; BlobError; StoreError.
    """
    if not (folder / DATABASE).is_file() or not (folder / BLOBS).is_dir():
        raise UsageError(
            f"{folder}: no backup: {DATABASE} and {BLOBS} are not there",
            "give a folder that `edgestill backup` wrote with --output",
        )
    with store.read() as transaction:
        if transaction.tasks():
            raise UsageError(
                f"{store.url!r} has tasks already", "restore into a new --data-dir, or a new database and new blobs"
            )
    with tempfile.TemporaryDirectory(prefix="edgestill-restore-") as copy:
        shutil.copyfile(folder / DATABASE, Path(copy) / DATABASE)
        backup, kept = Store(f"sqlite:///{Path(copy) / DATABASE}"), FileBlobs(folder / BLOBS)
        try:
            with backup.read() as found:
                needed, counts = _needed(found), _counts(found)
                copied = sum(_copy_blob(kept, blobs, digest) for digest in sorted(needed))
                with store.write() as transaction:
                    transaction.copy_from(found)
        finally:
            backup.close()
    return Contents(*counts, len(needed), copied, sum(blobs.size(digest) or 0 for digest in needed))


class _Gone(BlobError):
    """A blob that is not there any more."""


def _copy_database(store: Store, file: Path) -> tuple[set[str], tuple[int, int]]:
    """Writes all rows of one moment; the blobs that they refer to, and how many tasks and devices there are."""
    copy = Store(f"sqlite:///{file}")
    try:
        with store.read() as found, copy.write() as transaction:
            transaction.copy_from(found)
        with copy.read() as found:
            return _needed(found), _counts(found)
    finally:
        copy.close()


def _needed(transaction: Transaction) -> set[str]:
    named = (blobs_of(record.task) for record in transaction.tasks())
    return transaction.references.all_referred().union(*named)


def _counts(transaction: Transaction) -> tuple[int, int]:
    names = [record.name for record in transaction.tasks()]
    return len(names), sum(len(transaction.devices(name)) for name in names)


def _copy_blob(source: Blobs, target: Blobs, digest: str) -> bool:
    """Whether the blob was not there yet. Errors: BlobError."""
    if target.size(digest) is not None:
        return False
    hint = "the store's blobs are not complete: restore it from an earlier backup"
    if source.size(digest) is None:
        raise _Gone(f"blob {digest} is missing", hint)
    try:
        chunks = source.open_range(digest)
        found = target.put(chunks)
    except (BlobError, FileNotFoundError) as error:
        if source.size(digest) is None:
            raise _Gone(f"blob {digest} is missing", hint) from error
        raise
    if found != digest:
        target.delete(found)
        raise BlobError(f"blob {digest} is damaged: its bytes are those of {found}", hint)
    return True


def _put_in_place(file: Path, place: Path) -> None:
    # one file, which can be read where nothing can be written
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    for left in ("-wal", "-shm"):  # of somebody who looked into the earlier one
        place.with_name(f"{place.name}{left}").unlink(missing_ok=True)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    os.replace(file, place)
    sync(place.parent)
