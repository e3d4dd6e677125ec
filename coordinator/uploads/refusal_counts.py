"""How often which problem was raised, counted in memory and written now and then."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.uploads.checks import parse_round_name
from edgestill.runtime.errors import EdgestillError


class RefusalCounts:
    """Refusing must cost less than being refused: no disk flush each. A crash may lose the last second's counts."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, task: str, round_name: str, kind: str) -> None:
        """Counts one; a name that is no round of the task counts under round 0."""
        try:
            number = parse_round_name(round_name, task)
        except Problem:
            number = 0
        with self._lock:
            self._counts[task, number, kind] += 1

    def write(self) -> None:
        """Adds what was counted to the store; a round that is not open yet counts as round 0.

        So a device that makes up a billion names of rounds adds no rows. Errors: StoreError; the counts are kept for
        the next time then.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            with self._store.write() as transaction:
                for (task, number, kind), count in sorted(_of_open_rounds(transaction, counts).items()):
                    transaction.count_refusals(task, number, kind, count)
                for task in sorted({task for task, _, _ in counts}):
                    transaction.note(task, "refusal", self._clock())
        except EdgestillError:
            with self._lock:
                self._counts.update(counts)
            raise


def _of_open_rounds(
    transaction: Transaction, counts: Counter[tuple[str, int, str]]
) -> Counter[tuple[str, int, str]]:
    last = {task: transaction.round_head(task) for task, _, _ in counts}
    found: Counter[tuple[str, int, str]] = Counter()
    for (task, number, kind), count in counts.items():
        head = last[task]
        found[task, number if head is not None and number <= head.number else 0, kind] += count
    return found
