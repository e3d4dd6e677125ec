"""Copies of a coordinator, taken while it serves: a SQLite file of everything in the database, and the blobs it needs.

A blob is there before the database refers to it, and is deleted only when nothing refers to it any more. So whoever
reads the database first and then finds every blob that it names has a consistent copy; who misses one has read
something that is over by now, and reads again.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgestill.coordinator.store.blobs import BlobError, Blobs, FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.place import BACKUP_MARK
from edgestill.coordinator.store.sweep import blobs_of
from edgestill.coordinator.store.transaction import Transaction
from edgestill.runtime.errors import EdgestillError, UsageError
from edgestill.runtime.files import sync

DATABASE, BLOBS = "coordinator.db", "blobs"
_MARK_TEXT = b"A backup of a coordinator: `edgestill restore` makes a coordinator of it, none serves it as it is.\n"
_INCOMING = ".incoming-"
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

    Errors: UsageError for a folder of anything else; EdgestillError while another run writes it; BlobError for a blob
    that is missing or damaged; StoreError; OSError.
    """
    _check_apart(store, blobs, folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder):
        for left in folder.glob(f"{_INCOMING}*"):  # of a run that was killed
            shutil.rmtree(left)
        return _write(store, blobs, folder)


def _write(store: Store, blobs: Blobs, folder: Path) -> Contents:
    kept, missing = FileBlobs(folder / BLOBS), set[str]()
    for attempt in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(dir=folder, prefix=_INCOMING) as incoming:
            file = Path(incoming) / DATABASE
            needed, counts = _copy_database(store, file)
            try:
                copied = sum(_copy_blob(blobs, kept, digest) for digest in sorted(needed))
            except _Gone as gone:
                if gone.digest in missing or attempt == _ATTEMPTS - 1:
                    raise
                missing.add(gone.digest)  # and if a newer copy of the database names it too, it is lost
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
    place that has tasks; EdgestillError while the backup is being written; BlobError; StoreError.
    """
    for name in (BACKUP_MARK, DATABASE, BLOBS):
        if not (folder / name).exists():
            raise UsageError(
                f"{folder}: no backup: {name} is not there",
                "give a folder that `edgestill backup` wrote with --output",
            )
    with store.read() as transaction:
        if transaction.tasks():
            raise UsageError(
                f"{store.shown} has tasks already", "restore into a new --data-dir, or a new database and new blobs"
            )
    with _locked(folder, reading=True), tempfile.TemporaryDirectory(prefix="edgestill-restore-") as copy:
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


def _check_apart(store: Store, blobs: Blobs, folder: Path) -> None:
    """Errors: UsageError for a folder in which the coordinator itself keeps something, or that is no backup's."""
    own = [] if store.file is None else [(store.file.parent, f"the database {store.file}")]
    if isinstance(blobs, FileBlobs):
        own += [(place, f"the blobs in {blobs.folder}") for place in (blobs.folder, blobs.folder.parent)]
    hint = "give --output a folder that is new or empty, or that an earlier `edgestill backup` wrote"
    for place, what in own:
        if folder.resolve() == place.resolve():
            raise UsageError(f"--output {folder}: the coordinator keeps {what} there", hint)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found and BACKUP_MARK not in found:
        raise UsageError(
            f"--output {folder}: it is not empty, and no backup: {BACKUP_MARK} is not there",
            f"{hint}; a backup by an edgestill that made no such file becomes one by "
            f"`touch {shlex.quote(str(folder / BACKUP_MARK))}`",
        )


@contextmanager
def _locked(folder: Path, reading: bool = False) -> Iterator[None]:
    """Marks the folder as a backup, and keeps those out who write it, or with `reading` only them."""
    mark = folder / BACKUP_MARK
    with mark.open("rb" if reading else "ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if reading else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EdgestillError(
                f"{folder}: another `edgestill backup` or `edgestill restore` is at work there",
                "run the same command again when that one has ended",
            ) from error
        if not reading and not file.tell():
            file.write(_MARK_TEXT)
            file.flush()
            os.fsync(file.fileno())
        yield


class _Gone(BlobError):
    """A blob that is not there any more."""

    def __init__(self, digest: str, hint: str) -> None:
        super().__init__(f"blob {digest} is missing", hint)
        self.digest = digest


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
        raise _Gone(digest, hint)
    try:
        chunks = source.open_range(digest)
        found = target.put(chunks)
    except (BlobError, FileNotFoundError) as error:
        if source.size(digest) is None:
            raise _Gone(digest, hint) from error
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
