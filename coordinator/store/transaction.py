"""What is read and written within one transaction of the store; nothing here decides anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, delete, func, insert, select, update

from edgestill.coordinator.rounds.round import FINAL_PHASES, Accepted, Round
from edgestill.coordinator.store import schema as s
from edgestill.coordinator.store.records import (
    Change,
    DeviceRecord,
    PartInRound,
    RefusalCount,
    ReportRecord,
    RoundRecord,
    TaskRecord,
    UploadRecord,
    json_object,
)
from edgestill.coordinator.store.references import References
from edgestill.coordinator.task.task import Task

CHANGES_KEPT = 10_000
_ROUND_0 = 0
_ROWS_AT_ONCE = 1000


class Transaction:
    """One transaction on a connection; `Store.write` and `Store.read` make it."""

    def __init__(self, connection: Connection, locks_rows: bool) -> None:
        self._connection = connection
        self._locks_rows = locks_rows
        self.references = References(connection)
        self._noted: list[dict[str, Any]] = []
        self.said: list[tuple[str, tuple[object, ...]]] = []

    # tasks

    def add_task(self, task: Task, now_s: float) -> None:
        definition = task.as_json()
        self._connection.execute(
            insert(s.tasks).values(name=task.name, definition=definition, created_s=now_s, finished=False)
        )

    def lock_task(self, name: str) -> bool:
        """Locks the task's row until this transaction ends; whether there is such a task."""
        query = select(s.tasks.c.name).where(s.tasks.c.name == name)
        return self._one(query.with_for_update() if self._locks_rows else query) is not None

    def lock_all_tasks(self) -> None:
        """Locks every task there is, in the one order in which all do; no other can be added meanwhile."""
        if self._locks_rows:  # a row of its own: the rows of tasks to come cannot be locked
            s.upsert(self._connection, s.counters, {"name": "tasks"}, {"value": 0})
        for name in sorted(self._connection.scalars(select(s.tasks.c.name))):
            self.lock_task(name)

    def is_finished(self, name: str) -> bool:
        """Whether a task has no rounds left."""
        return bool(self._connection.scalar(select(s.tasks.c.finished).where(s.tasks.c.name == name)))

    def unfinished_tasks(self) -> list[str]:
        query = select(s.tasks.c.name).where(s.tasks.c.finished.is_(False)).order_by(s.tasks.c.name)
        return list(self._connection.scalars(query))

    def task(self, name: str) -> TaskRecord | None:
        row = self._one(select(s.tasks).where(s.tasks.c.name == name))
        return None if row is None else TaskRecord.from_row(row)

    def tasks(self) -> list[TaskRecord]:
        query = select(s.tasks).order_by(s.tasks.c.created_s, s.tasks.c.name)
        return [TaskRecord.from_row(row) for row in self._connection.execute(query)]

    def set_task(self, name: str, **values: Any) -> None:
        self._connection.execute(update(s.tasks).where(s.tasks.c.name == name).values(**values))

    # everything

    def copy_from(self, other: Transaction) -> None:
        """Adds all rows of another store, which has this one's schema."""
        for table in s.metadata.sorted_tables:
            for rows in other._connection.execute(select(table)).partitions(_ROWS_AT_ONCE):
                self._connection.execute(insert(table), [dict(row._mapping) for row in rows])

    # codes and devices

    def add_code(self, code_hash: str, task: str, expires_s: float) -> None:
        """The next code of a task, numbered from 1."""
        tasks = s.tasks.c
        number = self._connection.scalar(
            update(s.tasks)
            .where(tasks.name == task)
            .values(codes=func.coalesce(tasks.codes, 0) + 1)
            .returning(tasks.codes)
        )
        self._connection.execute(
            insert(s.codes).values(
                code_hash=code_hash, task=task, expires_s=expires_s, device=None, number=number
            )
        )

    def use_code(self, code_hash: str, device: str, now_s: float) -> tuple[str, int | None] | None:
        """Task and number of the code, which is used up by this; None when it is unknown, used or expired."""
        codes = s.codes.c
        # one statement, so that of two devices with the same code only one gets a row
        row = self._connection.execute(
            update(s.codes)
            .where(codes.code_hash == code_hash, codes.device.is_(None), codes.expires_s > now_s)
            .values(device=device)
            .returning(codes.task, codes.number)
        ).one_or_none()
        return None if row is None else (str(row.task), row.number)

    def add_device(
        self,
        name: str,
        task: str,
        token_hash: str,
        info: Mapping[str, Any],
        now_s: float,
        number: int | None = None,
    ) -> None:
        """`number`: of the code with which it enrolled."""
        values = {"name": name, "task": task, "token_hash": token_hash, "info": dict(info), "status": {}}
        values |= {"number": number}
        times = {"enrolled_s": now_s, "seen_s": now_s}
        self._connection.execute(insert(s.devices).values(**values, **times, stored_bytes=0))

    def device_with_token(self, token_hash: str) -> DeviceRecord | None:
        row = self._one(select(s.devices).where(s.devices.c.token_hash == token_hash))
        return None if row is None else DeviceRecord.from_row(row)

    def device(self, name: str) -> DeviceRecord | None:
        row = self._one(select(s.devices).where(s.devices.c.name == name))
        return None if row is None else DeviceRecord.from_row(row)

    def devices(self, task: str) -> list[DeviceRecord]:
        query = select(s.devices).where(s.devices.c.task == task)
        rows = self._connection.execute(query.order_by(s.devices.c.enrolled_s, s.devices.c.name))
        return [DeviceRecord.from_row(row) for row in rows]

    def last_seen_s(self, task: str) -> float | None:
        """When any device of the task was last heard of."""
        return self._connection.scalar(select(func.max(s.devices.c.seen_s)).where(s.devices.c.task == task))

    def set_device(self, name: str, **values: Any) -> None:
        self._connection.execute(update(s.devices).where(s.devices.c.name == name).values(**values))

    # rounds

    def add_round(self, task: str, round: Round) -> None:
        self._connection.execute(
            insert(s.rounds).values(
                task=task,
                number=round.number,
                phase=round.phase,
                opened_s=round.opened_s,
                deadline_s=round.deadline_s,
                metrics={},
                version=1,
            )
        )

    def round_head(self, task: str, number: int | None = None) -> RoundRecord | None:
        """A round without its selected and accepted devices; the last one unless numbered."""
        rounds = s.rounds.c
        query = select(s.rounds).where(rounds.task == task)
        if number is None:
            query = query.order_by(rounds.number.desc()).limit(1)
        else:
            query = query.where(rounds.number == number)
        row = self._one(query)
        return None if row is None else RoundRecord.from_row(row)

    def round_heads(self, task: str) -> list[RoundRecord]:
        query = select(s.rounds).where(s.rounds.c.task == task).order_by(s.rounds.c.number)
        return [RoundRecord.from_row(row) for row in self._connection.execute(query)]

    def members(self, task: str, number: int) -> tuple[frozenset[str], dict[str, Accepted]]:
        """Who was selected for a round, and whose upload was accepted."""
        table, accepted = s.selections.c, {}
        query = select(table.device).where(table.task == task, table.number == number)
        selected = frozenset(self._connection.scalars(query))
        for upload in self.uploads(task, number):
            accepted[upload.device] = Accepted(upload.digest, upload.samples)
        return selected, accepted

    def part_in_round(self, task: str, number: int, device: str) -> PartInRound:
        """What one device has to do with a round: cheap, however many others there are."""
        devices, chosen, sent = s.devices.c, s.selections.c, s.uploads.c
        joined = s.devices.outerjoin(
            s.selections,
            and_(chosen.device == devices.name, chosen.task == task, chosen.number == number),
        ).outerjoin(s.uploads, and_(sent.device == devices.name, sent.task == task, sent.number == number))
        query = select(devices.stored_bytes, chosen.device, sent.digest, sent.samples).select_from(joined)
        row = self._one(query.where(devices.name == device))
        if row is None:
            return PartInRound(frozenset(), {}, 0)
        return PartInRound(
            frozenset() if row.device is None else frozenset([device]),
            {} if row.digest is None else {device: Accepted(row.digest, row.samples)},
            row.stored_bytes,
        )

    def save_round(self, task: str, round: Round, version: int, **values: Any) -> None:
        """Writes the round's own row after a transition; `version` is the one that was read."""
        self._connection.execute(
            update(s.rounds)
            .where(s.rounds.c.task == task, s.rounds.c.number == round.number)
            .values(
                phase=round.phase,
                deadline_s=round.deadline_s,
                begun_s=round.begun_s,
                reason=round.reason,
                published=round.published,
                version=version + 1,
                **values,
            )
        )

    def add_selection(self, task: str, number: int, device: str, now_s: float) -> None:
        self._connection.execute(
            insert(s.selections).values(task=task, number=number, device=device, selected_s=now_s)
        )

    def add_uploads(self, task: str, number: int, uploads: Sequence[UploadRecord]) -> None:
        """Adds accepted uploads, one or more, and their bytes to what their devices store."""
        rows = [
            {
                "task": task,
                "number": number,
                **asdict(upload),
                "class_counts": None if upload.class_counts is None else list(upload.class_counts),
            }
            for upload in uploads
        ]
        self._connection.execute(insert(s.uploads), rows)
        self._change_stored_bytes([(upload.device, upload.size_bytes) for upload in uploads])

    def _change_stored_bytes(self, changes: Sequence[tuple[str, int]]) -> None:
        devices = s.devices.c
        self._connection.execute(
            update(s.devices)
            .where(devices.name == bindparam("device"))
            .values(stored_bytes=devices.stored_bytes + bindparam("change")),
            [{"device": device, "change": change} for device, change in changes],
        )

    def uploads(self, task: str, number: int) -> list[UploadRecord]:
        """The accepted uploads of a round, ordered by device."""
        table = s.uploads.c
        query = select(s.uploads).where(table.task == task, table.number == number).order_by(table.device)
        return [UploadRecord.from_row(row) for row in self._connection.execute(query)]

    def numbers_of_uploads(self, task: str, number: int) -> dict[str, int]:
        """Of the devices whose uploads a round has accepted, those that have a number."""
        uploads, devices = s.uploads.c, s.devices.c
        query = select(devices.name, devices.number).join(s.uploads, uploads.device == devices.name)
        query = query.where(uploads.task == task, uploads.number == number, devices.number.is_not(None))
        return {row.name: row.number for row in self._connection.execute(query)}

    def selections(self, task: str) -> list[tuple[int, str]]:
        """Round and device of every selection of a task, ordered."""
        table = s.selections.c
        query = select(table.number, table.device).where(table.task == task)
        rows = self._connection.execute(query.order_by(table.number, table.device))
        return [(row.number, row.device) for row in rows]

    def sizes_of_uploads(self, task: str) -> list[tuple[int, str, int]]:
        """Round, device and bytes of every accepted upload of a task, ordered."""
        table = s.uploads.c
        query = select(table.number, table.device, table.size_bytes).where(table.task == task)
        rows = self._connection.execute(query.order_by(table.number, table.device))
        return [(row.number, row.device, row.size_bytes) for row in rows]

    def best_round(self, task: str) -> int | None:
        """The round whose global model is the best on the task's validation images."""
        return self._connection.scalar(select(s.tasks.c.best_round).where(s.tasks.c.name == task))

    def last_published(self, task: str, before: int | None = None) -> tuple[str, int] | None:
        """Digest and size of the newest global outputs, of rounds before `before` where it is given."""
        rounds = s.rounds.c
        query = select(rounds.published, rounds.published_bytes).where(
            rounds.task == task, rounds.published.is_not(None)
        )
        query = query if before is None else query.where(rounds.number < before)
        row = self._one(query.order_by(rounds.number.desc()).limit(1))
        return None if row is None else (row.published, row.published_bytes)

    def was_published(self, task: str, digest: str) -> bool:
        rounds = s.rounds.c
        query = select(rounds.number).where(rounds.task == task, rounds.published == digest).limit(1)
        return self._one(query) is not None

    # uploads of ended rounds

    def round_to_sweep(self) -> tuple[str, int] | None:
        """Task and number of a round that has ended and whose uploads' blobs may still be there."""
        rounds = s.rounds.c
        query = select(rounds.task, rounds.number).where(
            rounds.phase.in_(FINAL_PHASES), rounds.swept_s.is_(None)
        )
        row = self._one(query.order_by(rounds.task, rounds.number).limit(1))
        return None if row is None else (row.task, row.number)

    def end_sweep(self, task: str, number: int, now_s: float) -> None:
        """Notes that a round's uploads are deleted, and takes them off what their devices store; once."""
        rounds = s.rounds.c
        done = self._connection.execute(
            update(s.rounds)
            .where(rounds.task == task, rounds.number == number, rounds.swept_s.is_(None))
            .values(swept_s=now_s)
        )
        uploads = self.uploads(task, number)
        if done.rowcount and uploads:
            self._change_stored_bytes([(upload.device, -upload.size_bytes) for upload in uploads])

    # reports and refusals

    def put_report(
        self, task: str, number: int, device: str, report: Mapping[str, Any], now_s: float
    ) -> None:
        key = {"task": task, "number": number, "device": device}
        s.upsert(self._connection, s.reports, key, {"report": dict(report), "received_s": now_s})

    def reports(self, task: str) -> list[ReportRecord]:
        table = s.reports.c
        query = select(s.reports).where(table.task == task).order_by(table.number, table.device)
        rows = self._connection.execute(query)
        return [ReportRecord(row.number, row.device, json_object(row.report), row.received_s) for row in rows]

    def count_refusals(self, task: str, number: int | None, kind: str, count: int) -> None:
        table = s.refusals
        key = {"task": task, "number": number or _ROUND_0, "kind": kind}
        s.upsert(self._connection, table, key, {"count": count}, {"count": table.c.count + count})

    def refusals(self, task: str) -> list[RefusalCount]:
        table = s.refusals.c
        query = select(s.refusals).where(table.task == task).order_by(table.number, table.kind)
        return [RefusalCount(row.number, row.kind, row.count) for row in self._connection.execute(query)]

    # who runs step 5

    def take_lease(self, task: str, number: int, owner: str, now_s: float, expires_s: float) -> bool:
        """Gives or renews the right to run step 5, unless another owner's has not expired."""
        leases = s.leases.c
        row = self._one(select(s.leases).where(leases.task == task, leases.number == number))
        if row is not None and row.owner != owner and row.expires_s > now_s:
            return False
        s.upsert(
            self._connection,
            s.leases,
            {"task": task, "number": number},
            {"owner": owner, "expires_s": expires_s},
        )
        return True

    def lease(self, task: str, number: int) -> tuple[str, float] | None:
        """Owner and expiry of the right to run step 5."""
        leases = s.leases.c
        row = self._one(select(s.leases).where(leases.task == task, leases.number == number))
        return None if row is None else (row.owner, row.expires_s)

    def drop_lease(self, task: str, number: int) -> None:
        leases = s.leases.c
        self._connection.execute(delete(s.leases).where(leases.task == task, leases.number == number))

    # changes

    def note(
        self, task: str, kind: str, now_s: float, number: int | None = None, device: str | None = None
    ) -> None:
        """Announces a change; it gets its sequence when the transaction commits."""
        self._noted.append({"task": task, "kind": kind, "at_s": now_s, "number": number, "device": device})

    def say(self, message: str, *values: object) -> None:
        """A line for the log once the transaction is committed; never a token, a code, or what devices wrote."""
        self.said.append((message, values))

    def write_changes(self) -> None:
        """Numbers the changes noted so far.

        Last of all in a transaction: the counter's row then orders the commits themselves, so that whoever has
        seen a sequence will never see a smaller one appear.
        """
        if not self._noted:
            return
        count, counters = len(self._noted), s.counters
        s.upsert(
            self._connection,
            counters,
            {"name": "changes"},
            {"value": count},
            {"value": counters.c.value + count},
        )
        last = self._connection.scalar(select(counters.c.value).where(counters.c.name == "changes"))
        first = int(last or 0) - count + 1
        rows = [{"sequence": first + index, **change} for index, change in enumerate(self._noted)]
        self._connection.execute(insert(s.changes), rows)
        self._noted.clear()
        if first // 1000 != (first + count) // 1000:
            self._connection.execute(delete(s.changes).where(s.changes.c.sequence < first - CHANGES_KEPT))

    def changes(self, since: int, at_most: int) -> list[Change]:
        table = s.changes
        query = select(table).where(table.c.sequence > since).order_by(table.c.sequence).limit(at_most)
        return [Change(**row._mapping) for row in self._connection.execute(query)]

    def last_change(self) -> int:
        """The sequence of the newest change; 0 before the first."""
        counters = s.counters.c
        return int(self._connection.scalar(select(counters.value).where(counters.name == "changes")) or 0)

    def _one(self, query: Any) -> Row[Any] | None:
        return self._connection.execute(query).one_or_none()
