"""Which blobs the store refers to, and which may have been deleted because nothing did."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, and_, delete, select

from edgestill.coordinator.rounds.round import FINAL_PHASES
from edgestill.coordinator.store import schema as s


class References:
    """The blobs of one transaction, as `Transaction.references`; those that tasks name are in their definitions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def referred(self, digests: Collection[str]) -> set[str]:
        """Those of the digests that an upload of an open round, global outputs or a global student has."""
        uploads, rounds = s.uploads.c, s.rounds.c
        of_round = and_(rounds.task == uploads.task, rounds.number == uploads.number)
        queries = (
            select(uploads.digest)
            .join(s.rounds, of_round)
            .where(uploads.digest.in_(digests), rounds.phase.not_in(FINAL_PHASES)),
            select(rounds.published).where(rounds.published.in_(digests)),
            select(s.tasks.c.student_state).where(s.tasks.c.student_state.in_(digests)),
            select(rounds.student_state)
            .join(s.tasks, and_(s.tasks.c.name == rounds.task, s.tasks.c.best_round == rounds.number))
            .where(rounds.student_state.in_(digests)),
        )
        return {digest for query in queries for digest in self._connection.scalars(query)}

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
