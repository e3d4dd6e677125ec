"""Which device trains what, and when: its student, whether it may be selected, its work, its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgestill.coordinator import credentials
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.rounds.progress import may_open
from edgestill.coordinator.rounds.round import Ask, step
from edgestill.coordinator.store.records import DeviceRecord, RoundRecord
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.task.task import StudentEntry, Task

_HEARD_S = 15.0
"""How old the store's `seen_s` of a device may get: writing down every poll would cost a disk flush each."""
_STATUS_S = 1.0
_NEEDS_TOLD = 3


class Hearing:
    """What was last heard of each device, so that only news is written."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, dict[str, Any]]] = {}

    def is_news(self, device: DeviceRecord, status: Mapping[str, Any], now_s: float) -> bool:
        """Whether the status is worth writing down."""
        heard_s, known = self._heard.get(device.name, (device.seen_s, dict(device.status)))
        return now_s - heard_s >= (_HEARD_S if known == dict(status) else _STATUS_S)

    def hear(
        self, transaction: Transaction, device: DeviceRecord, status: Mapping[str, Any], now_s: float
    ) -> None:
        """Writes down that the device was heard of."""
        transaction.set_device(device.name, status=dict(status), seen_s=now_s)
        transaction.note(device.task, "device", now_s, device=device.name)
        self._heard[device.name] = (now_s, dict(status))


def check_unfinished(transaction: Transaction, task: str) -> None:
    """Errors: Problem `task_finished`."""
    if transaction.is_finished(task):
        raise Problem("task_finished", f"task {task} has no rounds left")


def student_of(task: Task, device: DeviceRecord) -> StudentEntry:
    """The largest student that fits what the device said last of its engines and memory, so that one that is moved into
    a smaller container does not keep what it cannot train. Errors: Problem `no_fitting_student`."""
    engines, memory_bytes = device.info.get("engines", ()), device.info.get("memory_bytes")
    student = task.fitting_student(engines, memory_bytes)
    if student is None:
        memory = "memory of unknown size" if memory_bytes is None else f"{_megabytes(memory_bytes)} of memory"
        raise Problem(
            "no_fitting_student",
            f"device {device.name} has engines {', '.join(engines) or 'none'} and {memory}; {_needs(task)}",
        )
    return student


def _needs(task: Task) -> str:
    """What the students that ask the least need."""
    entries = sorted(task.students, key=lambda entry: (entry.memory_bytes, entry.student))
    needs = [
        f"{entry.student} needs {_megabytes(entry.memory_bytes, up=True)} and {' or '.join(entry.engines)}"
        for entry in entries[:_NEEDS_TOLD]
    ]
    more = len(entries) - len(needs)
    return "; ".join(needs) + (f"; {more} more need as much or more memory" if more else "")


def _megabytes(size_bytes: int, up: bool = False) -> str:
    """Rounded so that what is said to be needed is enough, and what is there is not less."""
    tenths = -(-size_bytes // 10**5) if up else size_bytes // 10**5
    return f"{tenths / 10:.1f} MB"


def may_select(task: Task, record: RoundRecord | None, device: DeviceRecord, now_s: float) -> bool:
    """Whether asking could select the device, perhaps for a round still to be opened."""
    if may_open(None if record is None else record.round, task):
        return True
    if record is None:
        return False
    _, effects = step(record.round, Ask(device.name), now_s, task.rules())
    return bool(effects)


def work_for(
    transaction: Transaction, task: Task, device: DeviceRecord, record: RoundRecord | None, now_s: float
) -> dict[str, Any] | None:
    """WORK for a device that is selected and has not uploaded."""
    if record is None or not record.round.collects(now_s) or device.name in record.round.accepted:
        return None
    if device.name not in record.round.selected:
        return None
    digest, size_bytes = transaction.last_published(record.task, before=record.number) or (None, 0)
    return {
        "round": record.name,
        "number": record.number,
        "deadline_s": record.round.deadline_s - now_s,
        "global_outputs": digest,
        "size_bytes": size_bytes,
        # not from its name, which is drawn anew each time that it enrols
        "seed": credentials.derive_seed(task.seed, record.number, str(device.number or device.name)),
    }


def standing_of(
    task: Task, record: RoundRecord | None, now_s: float, best_round: int | None
) -> dict[str, Any]:
    """STANDING of docs/federation.md: how far the task's present round is, and which round is the best so far."""
    round = None if record is None else record.round
    return {
        "round": None if record is None else record.name,
        "phase": None if round is None else round.phase,
        "uploads": 0 if round is None else len(round.accepted),
        "goal": task.goal,
        "seconds_left": None if round is None or round.final else max(0.0, round.deadline_s - now_s),
        "best_round": best_round,
    }
