"""Files that are either the old or the new content, whatever moment the power fails at."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """Replaces `path` by the chunks: temporary file in the same folder, fsync, rename, fsync of the folder.

    `mode`, less the umask, are its rights. Errors: OSError; the temporary file is gone then, and `path` is as it was.
    """
    folder = path.parent
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
    sync_folder(folder)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Makes the folder's names durable, such as those that `os.replace` has just changed."""
    if os.name != "posix":  # Windows cannot open a folder; its rename is durable on its own journal
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
