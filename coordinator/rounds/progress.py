"""How a round moves on in the store: read it under its task's lock, step the state machine, write what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgestill.coordinator.rounds.round import (
    Abandoned,
    Aggregate,
    Completed,
    Effect,
    Event,
    Round,
    open_round,
    step,
)
from edgestill.coordinator.store.records import RoundRecord
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.task.task import Task


class Progress:
    """Loads rounds and applies events to them; remembers the last round of each task by its version."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._remembered: dict[str, RoundRecord] = {}

    def task(self, transaction: Transaction, name: str) -> Task:
        """A task's definition, which never changes. `name` is that of a task there is."""
        if name not in self._tasks:
            record = transaction.task(name)
            assert record is not None
            self._tasks[name] = record.task
        return self._tasks[name]

    def load(self, transaction: Transaction, task: str, number: int | None = None) -> RoundRecord | None:
        """A round with its devices, the last one unless numbered; call it before writing to the round.

        Members are read only when the version is not the remembered one: a round of thousands of devices would
        otherwise be read anew for each of their requests.
        """
        head = transaction.round_head(task, number)
        if head is None:
            return None
        known = self._remembered.get(task)
        if known is not None and (known.number, known.version) == (head.number, head.version):
            return replace(
                head, round=replace(head.round, selected=known.round.selected, accepted=known.round.accepted)
            )
        selected, accepted = transaction.members(task, head.number)
        record = replace(head, round=replace(head.round, selected=selected, accepted=accepted))
        self.remember(record)
        return record

    def remember(self, record: RoundRecord) -> None:
        """Keeps a round as committed; older rounds than the one kept are not worth it."""
        known = self._remembered.get(record.task)
        if known is None or (record.number, record.version) > (known.number, known.version):
            self._remembered[record.task] = record

    def open_next(
        self, transaction: Transaction, task: Task, last: RoundRecord | None, now_s: float
    ) -> RoundRecord:
        """Opens the round after `last`, under the task's lock."""
        round = open_round(1 if last is None else last.number + 1, task.rules(), now_s)
        transaction.add_round(task.name, round)
        transaction.note(task.name, "round", now_s, round.number)
        record = RoundRecord(task.name, round, None, None, {}, 1)
        transaction.say("round %s is open, for %g s", record.name, task.deadline_s)
        return record

    def apply(
        self,
        transaction: Transaction,
        task: Task,
        record: RoundRecord,
        event: Event,
        now_s: float,
        **values: object,
    ) -> tuple[RoundRecord, tuple[Effect, ...]]:
        """`apply_all` for one event."""
        record, (effects,) = self.apply_all(transaction, task, record, [event], now_s, **values)
        return record, effects

    def apply_all(
        self,
        transaction: Transaction,
        task: Task,
        record: RoundRecord,
        events: Sequence[Event],
        now_s: float,
        **values: object,
    ) -> tuple[RoundRecord, list[tuple[Effect, ...]]]:
        """Steps the round through the events and writes what they changed, with `values` for its row; under the
        task's lock. The effects are those of each event.

        The last round's end is the task's end. `remember` the returned record once the transaction is committed.
        """
        before = after = record.round
        effects = []
        for event in events:
            after, caused = step(after, event, now_s, task.rules())
            effects.append(caused)
        if after == before:
            return record, effects
        for device in sorted(after.selected - before.selected):
            transaction.add_selection(task.name, after.number, device, now_s)
            transaction.note(task.name, "selected", now_s, after.number, device)
        for effect in (effect for caused in effects for effect in caused):
            _say(transaction, record.name, effect)
        if after.phase != before.phase:
            transaction.note(task.name, "round", now_s, after.number)
        if after.final:
            values["closed_s"] = now_s
            transaction.drop_lease(task.name, after.number)
            if after.number >= task.rounds:
                transaction.set_task(task.name, finished=True)
                transaction.note(task.name, "task", now_s)
        transaction.save_round(task.name, after, record.version, **values)
        return replace(record, round=after, version=record.version + 1), effects


def _say(transaction: Transaction, round_name: str, effect: Effect) -> None:
    match effect:
        case Aggregate(devices):
            transaction.say("round %s has collected %d uploads", round_name, len(devices))
        case Completed(published):
            transaction.say("round %s is completed, published %s", round_name, published)
        case Abandoned(reason):
            transaction.say("round %s is abandoned: %s", round_name, " ".join(reason.split()))


def may_open(round: Round | None, task: Task) -> bool:
    """Whether the task's next round may open, `round` being its last."""
    return round is None or (round.final and round.number < task.rounds)
