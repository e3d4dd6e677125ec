"""A lock between processes on one machine, so that two of them don't make the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgestill.runtime.errors import EdgestillError


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock that the file `path` stands for; the system gives it back when a process ends, however.

    Where the system has no such locks, the block runs at once: what it makes is made twice then.
    Errors: EdgestillError where another process holds it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise EdgestillError(
                f"another process works on {path}", "wait for it, or give another --output"
            ) from error
        yield
