"""Group commit: one durable write for all callers that wait at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    done: bool = False
    result: Result | None = None
    error: BaseException | None = None


class GroupCommit(Generic[Item, Result]):
    """Group commit: the items of threads that call while `run` is busy go to its next call all at once.

    `run` returns a result for each item in order. What it raises, all of its callers get, each a copy of its own that
    names the original as its cause: nothing of theirs was done.
    """

    def __init__(self, run: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        self._run = run
        self._waiting: list[_Entry[Item, Result]] = []
        self._waiting_lock = threading.Lock()
        self._turn = threading.Lock()

    def __call__(self, item: Item) -> Result:
        """The item's own result, as soon as the run that included it has ended."""
        entry: _Entry[Item, Result] = _Entry(item)
        with self._waiting_lock:
            self._waiting.append(entry)
        with self._turn:
            if not entry.done:  # the turn before may have included it
                self._run_waiting()
        if entry.error is not None:
            raise _copy_of(entry.error) from entry.error
        return cast(Result, entry.result)

    def _run_waiting(self) -> None:
        with self._waiting_lock:
            entries, self._waiting = self._waiting, []
        try:
            results = self._run([entry.item for entry in entries])
            for entry, result in zip(entries, results, strict=True):
                entry.result = result
        except BaseException as error:
            for entry in entries:
                entry.error = error
        for entry in entries:
            entry.done = True


def _copy_of(error: BaseException) -> BaseException:
    """The same error without its traceback and context, which belong to one thread."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy
