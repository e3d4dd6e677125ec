"""What the store holds, as figures for Prometheus: tasks, rounds, devices, accuracies, and room for more blobs.

A device is called by the name that the coordinator gave it, never by the one that it gave itself.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily

from edgestill.coordinator.dashboard.views import Means, TaskView, view_task
from edgestill.coordinator.liveness import STATES, Liveness
from edgestill.coordinator.rounds.round import PHASES
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs

DEVICES_NAMED = 1000
"""Of a task; where it has more, none is named, for every name makes series of its own."""

class Add(Protocol):
    """Adds a value with its labels to the family of a name; none for None."""

    def __call__(self, name: str, value: float | None, *labels: str) -> None: ...


_TASK, _DEVICE = ["task"], ["task", "device"]
_ABOUT = {
    "rounds": ("rounds by phase or outcome", ["task", "phase"]),
    "task_running": ("1 while the task has rounds left, 0 after its end", _TASK),
    "task_rounds": ("rounds that the task has in all", _TASK),
    "round_deadline_seconds": ("when the present round stops collecting, in seconds since the epoch", _TASK),
    "devices": ("devices by what they are at (docs/dashboard.md)", ["task", "state"]),
    "global_t_uni": ("accuracy of the newest global model on the task's test set, 0 to 1", _TASK),
    "devices_t_priv": ("accuracy on the classes of each device itself, the mean of the newest reports", _TASK),
    "devices_t_uni": ("accuracy on all classes alike, the mean of the newest reports", _TASK),
    "devices_alone_t_priv": ("the same of devices that compare, trained alone", _TASK),
    "devices_alone_t_uni": ("the same of devices that compare, trained alone", _TASK),
    "devices_gain_t_uni": ("the mean of together minus alone, over devices whose newest report has both", _TASK),
    "device_seen_seconds": ("when a device was last heard, in seconds since the epoch; of tasks that run", _DEVICE),
    "device_t_priv": ("accuracy on the device's own classes, of its newest report", _DEVICE),
    "device_t_uni": ("accuracy on all classes alike, of its newest report", _DEVICE),
    "blobs_free_bytes": ("free on the file system of the blobs, where they are in a folder", []),
}
"""Without `edgestill_`: what it is, and its labels."""


def figures_of(service: Service, liveness: Liveness) -> list[GaugeMetricFamily]:
    """Every family, those without a value too. Errors: StoreError."""
    families = {name: GaugeMetricFamily(f"edgestill_{name}", text, labels=labels)
                for name, (text, labels) in _ABOUT.items()}  # fmt: skip

    def add(name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            families[name].add_metric(list(labels), value)

    for record in service.tasks():
        task = view_task(record, service.rounds(record.name), service.devices(record.name), (), liveness)
        counts = Counter(one.phase for one in task.rounds)
        for phase in PHASES:  # each is there from the start, or nobody sees it begin
            add("rounds", counts[phase], task.name, phase)
        add("task_running", float(record.ended is None), task.name)
        add("task_rounds", task.rounds_planned, task.name)
        add("global_t_uni", task.latest_t_uni, task.name)
        for which in ("t_priv", "t_uni"):
            add(f"devices_{which}", _mean((one.after for one in task.devices), which), task.name)
            add(f"devices_alone_{which}", _mean((one.alone for one in task.devices), which), task.name)
        add("devices_gain_t_uni", task.gain.t_uni, task.name)
        if record.ended is None:
            _add_running(add, task)
    if isinstance(service.blobs, FileBlobs):
        add("blobs_free_bytes", shutil.disk_usage(service.blobs.folder).free)
    return list(families.values())


def _add_running(add: Add, task: TaskView) -> None:
    if task.current is not None and task.current.phase == "collecting":
        add("round_deadline_seconds", task.current.deadline_s, task.name)
    states = Counter(one.state for one in task.devices)
    for state in STATES:
        add("devices", states[state], task.name, state)
    if len(task.devices) <= DEVICES_NAMED:
        for one in task.devices:
            add("device_seen_seconds", one.last_seen_s, task.name, one.device)
            add("device_t_priv", one.after.t_priv, task.name, one.device)
            add("device_t_uni", one.after.t_uni, task.name, one.device)


def _mean(figures: Iterable[Means], name: str) -> float | None:
    known = [value for one in figures if (value := getattr(one, name)) is not None]
    return sum(known) / len(known) if known else None
