"""Which blobs the store refers to, and which may have been deleted because nothing did."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, select

from edgestill.coordinator.rounds.round import FINAL_PHASES
from edgestill.coordinator.store import schema as s


class References:
    """The blobs of one transaction, as `Transaction.references`; those that tasks name are in their definitions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def referred(self, digests: Collection[str]) -> set[str]:
        """Those of the digests that an upload of an open round, global outputs or a global student has."""
        queries = (query.where(query.selected_columns[0].in_(digests)) for query in self._referring())
        return {digest for query in queries for digest in self._connection.scalars(query)}

    def all_referred(self) -> set[str]:
        """Every digest that is referred to."""
        queries = (query.where(query.selected_columns[0].is_not(None)) for query in self._referring())
        return {digest for query in queries for digest in self._connection.scalars(query)}

    def _referring(self) -> tuple[Select[Any], ...]:
        """A query of one column for each place where a digest stands that is still needed."""
        uploads, rounds = s.uploads.c, s.rounds.c
        of_round = and_(rounds.task == uploads.task, rounds.number == uploads.number)
        return (
            select(uploads.digest).join(s.rounds, of_round).where(rounds.phase.not_in(FINAL_PHASES)),
            select(rounds.published),
            select(s.tasks.c.student_state),
            select(rounds.student_state).join(
                s.tasks, and_(s.tasks.c.name == rounds.task, s.tasks.c.best_round == rounds.number)
            ),
        )

    def perhaps_deleted(self, digests: Collection[str]) -> set[str]:
        """Those of the digests whose bytes may have been deleted: an accepted upload of any round has them, or nothing
        had."""
        uploads, orphans = s.uploads.c.digest, s.orphans.c.digest
        queries = (select(uploads).where(uploads.in_(digests)), select(orphans).where(orphans.in_(digests)))
        return {digest for query in queries for digest in self._connection.scalars(query)}

    def note_orphans(self, digests: Collection[str], now_s: float) -> None:
        """Makes `perhaps_deleted` name the digests, before they are deleted."""
        for digest in sorted(digests):
            s.upsert(self._connection, s.orphans, {"digest": digest}, {"found_s": now_s})

    def forget_orphans(self, before_s: float) -> None:
        """Those that were noted so long ago that whoever stored their bytes meanwhile is long done."""
        self._connection.execute(delete(s.orphans).where(s.orphans.c.found_s < before_s))
