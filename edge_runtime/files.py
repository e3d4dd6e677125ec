"""Files that are either the old or the new content, whatever moment the power fails at."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_STALE_AFTER_S = 3600.0


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """Replaces `path` by the chunks: temporary file in the same folder, fsync, rename, fsync of the folder.

    `mode`, less the umask, are its rights. What killed processes left of `path` over an hour ago is removed.
    Errors: OSError; the temporary file is gone then, and `path` is as it was.
    """
    import tempfile  # imported when first needed: it delays the start

    folder = path.parent
    _remove_stale(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            # mkstemp makes the file private; a checkpoint gets the rights of any new file.
            os.fchmod(file.fileno(), mode & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(folder)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_stale(path: Path) -> None:
    """Removes temporary files of `path` that nobody has written to for an hour: others may belong to a writer."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.partial")
    with suppress(OSError):  # what cannot be removed hinders nobody
        for entry in [entry for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)]:
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_AFTER_S:
                    os.unlink(entry.path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Makes a file's bytes durable, or a folder's names, such as those that `os.replace` has just changed."""
    if os.name != "posix":  # Windows cannot open a folder; its rename is durable on its own journal
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
