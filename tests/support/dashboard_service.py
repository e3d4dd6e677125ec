"""A service with made-up but plausible records, for the dashboard's tests: reads only, changed by `advance`."""

from __future__ import annotations

import math
import time

from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import Change, DeviceRecord, RefusalCount, TaskRecord
from edgestill.coordinator.task.task import StudentEntry, Task, TransferEntry

NAMES = ("raspberry-pi-5", "Anna's phone", "office desktop", "d'été 🌞", "jetson-orin-nano-super-kit-00017")
STUDENTS = ("cnn3", "cnn4", "cnn5")
ENGINES = ("onnxruntime", "executorch")


def make_task(name: str = "birds", rounds: int = 12, goal: int = 4) -> Task:
    students = tuple(
        StudentEntry(student, f"{i:064x}", 900_000, ENGINES, 2 * 10**8, f"{i + 9:064x}", 10_000 * (i + 1))
        for i, student in enumerate(STUDENTS)
    )
    return Task(
        name, students, TransferEntry("a" * 64, 1000, 3_072_000, True), exchange="both", mode="global",
        global_student=students[0], test=TransferEntry("b" * 64, 2000, 6_144_000, True), rounds=rounds, goal=goal,
    )  # fmt: skip


def device_name(index: int) -> str:
    return "d-" + "".join("abcdefghijklmnopqrstuvwxyz234567"[(index * 7 + i * i) % 32] for i in range(16))


class DashboardService:
    """The reading half of `edgestill.coordinator.service.Service`."""

    def __init__(
        self, rounds: int = 5, devices: int = 5, planned: int = 12, names: tuple[str, ...] = NAMES
    ) -> None:
        self.reads = 0
        self._task, self._start_s = make_task(rounds=planned), time.time() - 300.0 * rounds
        self._changes: list[Change] = []
        self.device_records = [
            DeviceRecord(
                device_name(i), "birds",
                {"name": names[i % len(names)], "engines": list(ENGINES), "memory_bytes": (4 + 4 * (i % 2)) * 10**9,
                 "processor": "aarch64", "version": "0.1.0"},
                {"battery": 0.31 + 0.13 * i, "charging": i == 2, "memory_free_bytes": 1_900_000_000}
                if i % 2 else {}, STUDENTS[i % 3], f"{i % 3:064x}", self._start_s,
                time.time() - (3, 42, 700, 9000, 200_000)[i % 5], 10**6,
            )
            for i in range(devices)
        ]  # fmt: skip
        self.round_records = [self._round(n, n < rounds) for n in range(1, rounds + 1)]
        self.refusal_counts = [RefusalCount(2, "late", 3), RefusalCount(3, "wrong_outputs", 1),
                               RefusalCount(4, "late", 1), RefusalCount(0, "code_refused", 2)]  # fmt: skip
        self.note("task")

    def tasks(self) -> list[TaskRecord]:
        self.reads += 1
        return [
            TaskRecord("birds", self._task, self._start_s, False, None),
            TaskRecord("empty", make_task("empty"), self._start_s - 9, False, None),
        ]

    def rounds(self, task: str) -> list[RoundOverview]:
        return list(self.round_records) if task == "birds" else []

    def devices(self, task: str) -> list[DeviceRecord]:
        return list(self.device_records) if task == "birds" else []

    def refusals(self, task: str) -> list[RefusalCount]:
        return list(self.refusal_counts) if task == "birds" else []

    def changes(self, since: int) -> list[Change]:
        return [one for one in self._changes if one.sequence > since]

    def last_change(self) -> int:
        return len(self._changes)

    def note(self, kind: str, task: str = "birds") -> None:
        """Announces a change as the store does."""
        self._changes.append(Change(len(self._changes) + 1, task, None, kind, None, time.time()))

    def advance(self) -> None:
        """The current round completes and the next one opens."""
        number = len(self.round_records)
        self.round_records[-1] = self._round(number, True)
        self.round_records.append(self._round(number + 1, False))
        self.note("round")

    def _round(self, number: int, over: bool) -> RoundOverview:
        opened_s = self._start_s + 300.0 * (number - 1)
        names = tuple(one.name for one in self.device_records)
        abandoned = over and number == 3
        grown = 1 - math.exp(-number / 4)
        reports = {
            name: {
                "engine": ENGINES[i % 2], "step_ms": 18.4 + 23.7 * i, "peak_rss_bytes": 210_000_000 + 10**7 * i,
                "bytes_up": 141_312, "bytes_down": 412_000 + 1000 * number, "samples": 400 + 100 * i,
                "class_counts": [max(0, int(90 * math.cos(k - 2 * i) + 40)) for k in range(10)],
                "before": {"t_priv": 0.3 + 0.45 * grown, "t_uni": 0.15 + 0.3 * grown, "loss": 2.3 - 1.2 * grown},
                "after": {"t_priv": 0.38 + 0.47 * grown, "t_uni": 0.17 + 0.36 * grown, "loss": 2.0 - 1.3 * grown},
                **({"alone": {"t_priv": 0.36 + 0.46 * grown, "t_uni": 0.16 + 0.28 * grown}} if i < 2 else {}),
            }
            for i, name in enumerate(names)
        }  # fmt: skip
        done = over and not abandoned
        return RoundOverview(
            "birds", number, "abandoned" if abandoned else "completed" if over else "collecting",
            opened_s, time.time() + 85 if not over else opened_s + 290, opened_s + 280 if over else None,
            "1 accepted at the deadline, at least 2 are needed" if abandoned else None,
            names, names[:4] if done else names[:1], 141_312 * (4 if done else 1),
            "c" * 64 if done else None, 412_000 if done else None,
            {"t_uni": 0.18 + 0.5 * grown, "loss": 2.1 - 1.25 * grown} if done else {}, reports if done else {},
        )  # fmt: skip
