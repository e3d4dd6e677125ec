"""The simulated federation: a real `Service` in memory, virtual devices in a pool, and a clock that jumps.

Everything that happens to the service happens in this one process and in an order that the seed alone decides;
the pool only computes what devices upload.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgestill.coordinator.distillation.job import VALIDATION
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import DeviceRecord
from edgestill.coordinator.task.creation import make_task
from edgestill.coordinator.task.task import Task
from edgestill.runtime.data.notice import Notice, Notices
from edgestill.simulation.pool import Pool, SharedFile
from edgestill.simulation.population import Turn, poisoners, turns
from edgestill.simulation.settings import SimulationSettings
from edgestill.simulation.virtual import SeededEntropy, VirtualClock
from edgestill.simulation.virtual_device import (
    AloneJob,
    Outcome,
    RoundJob,
    Setup,
    run_round,
    train_alone,
)

TASK = "simulation"
STATUS: dict[str, Any] = {
    "battery": None, "charging": None, "temperature_c": None, "memory_free_bytes": None, "metered": None,
}  # fmt: skip
Means = dict[str, float | None]


@dataclass
class Tally:
    """What trainings add up to, in one round or in all of them."""

    trainings: int = 0
    wall_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    setup_bytes: int = 0
    times: dict[int, int] = field(default_factory=dict)
    """How often each device trained."""
    taught: dict[int, int] = field(default_factory=dict)
    """How often of these with global outputs."""
    after: dict[int, Mapping[str, float | None]] = field(default_factory=dict)
    """What each device measured after its last training; poisoners are left out."""

    def add(self, other: Tally) -> None:
        for name in ("trainings", "wall_s", "bytes_up", "bytes_down", "setup_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, others in ((self.times, other.times), (self.taught, other.taught)):
            for device, times in others.items():
                mine[device] = mine.get(device, 0) + times
        self.after |= other.after


class Federation:
    """One task with its virtual devices, enrolled and assigned."""

    def __init__(
        self, settings: SimulationSettings, bundles: list[Path], global_bundle: Path | None, work_dir: Path
    ) -> None:
        self.settings = settings
        self.notices = Notices()
        self.clock = VirtualClock()
        self._files = FileBlobs(work_dir / "blobs")
        self.service = Service(
            Store("sqlite://"), self._files, self.clock, SeededEntropy(settings.seed),
            engine_threads=1,
        )  # fmt: skip
        task = make_task(
            describe_task(settings, bundles, global_bundle), self.service.add_blob, tell=self._tell
        )
        self.task: Task = self.service.create_task(rank_students(task))
        self.poisoners = poisoners(settings)
        self.tally = Tally()
        self._folder = work_dir
        self._states = work_dir / "devices"
        self._states.mkdir(parents=True, exist_ok=True)
        self._shared: dict[str, SharedFile] = {}
        self._scores: dict[int, Mapping[str, float | None] | None] = {}
        codes = [self.service.issue_code(TASK) for _ in range(settings.devices)]
        self._devices = self._enrol_all(codes)
        self._assignments = [self.service.assignment(device) for device in self._devices]

    def run_round(self, number: int, pool: Pool) -> dict[str, Any]:
        """One round from its opening to its end; the line that reports it."""
        self.service.tick()
        tally = self._collect(self._select(number), pool)
        self.tally.add(tally)
        overview = self._finish(number)
        return {
            "round": overview.number,
            "phase": overview.phase,
            "reason": overview.reason,
            "selected": len(overview.selected),
            "trainings": tally.trainings,
            "accepted": len(overview.accepted),
            **mean_accuracies(list(tally.after.values())),
            "global_t_uni": overview.metrics.get("t_uni"),
            VALIDATION: overview.metrics.get(VALIDATION),
            "best": overview.best,
            "bytes_up": tally.bytes_up,
            "bytes_down": tally.bytes_down,
            "published": overview.published,
        }

    def train_alone(self, pool: Pool, as_many_steps: bool = False) -> dict[int, Means]:
        """Accuracies of each device, had it trained as many epochs, or steps, on its own data alone."""
        setup = self._setup(pool)
        jobs = (
            AloneJob(
                setup,
                index,
                self._assignments[index],
                self._blobs(pool, self._assignments[index]),
                self.tally.times[index],
                taught=self.tally.taught.get(index, 0) if as_many_steps else 0,
            )
            for index in sorted(self.tally.after)
        )
        return dict(zip(sorted(self.tally.after), pool.map(train_alone, jobs), strict=True))

    def refusals(self) -> dict[str, int]:
        """How often the coordinator refused what, over all rounds."""
        counts: dict[str, int] = {}
        for refusal in self.service.refusals(TASK):
            counts[refusal.kind] = counts.get(refusal.kind, 0) + refusal.count
        return dict(sorted(counts.items()))

    def _enrol_all(self, codes: Sequence[str]) -> list[DeviceRecord]:
        return [self._enrol(index, code) for index, code in enumerate(codes)]

    def _enrol(self, index: int, code: str) -> DeviceRecord:
        students = sorted(self.task.students, key=lambda entry: entry.memory_bytes)
        entry = students[index % len(students)]
        info = {
            "name": f"virtual-{index}",
            "engines": list(entry.engines),
            # exactly enough for the student that this device is dealt
            "memory_bytes": entry.memory_bytes,
            "processor": "simulated",
            "version": "simulation",
        }
        enrolled = self.service.enrol(code, info)
        return self.service.authenticate(enrolled["token"])

    def _select(self, number: int) -> list[tuple[Turn, dict[str, Any]]]:
        """The selected devices that will not drop out, with their work, in the order in which they upload."""
        selected = []
        for turn in turns(self.settings, number):
            work = self.service.ask(self._devices[turn.device], STATUS)
            if work is not None and not turn.drops_out:
                selected.append((turn, work))
        return sorted(selected, key=lambda pair: (pair[0].uploads_after_s, pair[0].device))

    def _jobs(self, selected: Sequence[tuple[Turn, dict[str, Any]]], pool: Pool) -> Iterator[RoundJob]:
        """One a device, made when it is asked for: its student is read from disk only then."""
        setup = self._setup(pool)
        outputs: dict[str, SharedFile] = {}  # of this round alone: Ray frees what nothing names any more
        expected = {name: tuple(shape) for name, shape in self.task.expected_upload().items()}
        for turn, work in selected:
            index = turn.device
            poison = self.settings.poison if index in self.poisoners else None
            state = self._state_path(index)
            published = work["global_outputs"]
            if published and published not in outputs:
                outputs[published] = pool.share(self._files.path(published))
            yield RoundJob(
                setup,
                index,
                self._devices[index].name,
                self._assignments[index],
                work,
                self._blobs(pool, self._assignments[index]) | outputs,
                state.read_bytes() if state.exists() else None,
                None if poison is None else poison.attack,
                expected,
                self.settings.privacy,
                scores=self._scores.get(index),
            )

    def _setup(self, pool: Pool) -> Setup:
        settings, data = self.settings, Path(self.settings.data)
        source = self._share(pool, data.resolve()) if data.exists() else settings.data
        gamma = None if settings.by_user else settings.gamma
        apart = [one.blob for one in (self.task.transfer, self.task.validation) if one is not None]
        reserved = tuple(self._share(pool, self._files.path(blob)) for blob in apart)
        return Setup(source, settings.devices, gamma, settings.seed, settings.test_samples, reserved,
                     settings.resize, settings.skip_broken)  # fmt: skip

    def _blobs(self, pool: Pool, assignment: Mapping[str, Any]) -> dict[str, SharedFile]:
        """What a device downloads once, or would."""
        digests = (assignment["student"]["bundle"], assignment["task"]["transfer"]["blob"])
        return {digest: self._share(pool, self._files.path(digest)) for digest in digests}

    def _share(self, pool: Pool, path: Path) -> SharedFile:
        """Each file once, however many jobs name it."""
        key = str(path)
        if key not in self._shared:
            self._shared[key] = pool.share(path)
        return self._shared[key]

    def _state_path(self, index: int) -> Path:
        """The student of a device between rounds."""
        return self._states / f"{index:06d}.safetensors"

    def _collect(self, selected: Sequence[tuple[Turn, dict[str, Any]]], pool: Pool) -> Tally:
        """Trains, and hands every upload in at its virtual moment."""
        tally = Tally()
        opened_s, started_s = self.clock.now_s, time.perf_counter()
        outcomes = pool.map(run_round, self._jobs(selected, pool))
        for (turn, work), outcome in zip(selected, outcomes, strict=True):
            self.clock.advance_to(opened_s + turn.uploads_after_s)
            tally.trainings += 1
            tally.bytes_down += outcome.bytes_down
            tally.setup_bytes += outcome.setup_bytes
            for notice in outcome.notices:
                self._tell(notice)
            if outcome.body is None or outcome.student is None:
                continue
            tally.bytes_up += len(outcome.body)
            taken = self._hand_in(self._devices[turn.device], outcome, outcome.body)
            # a model of its own stays trained, as in `Device`
            if taken or self.task.exchange != "parameters":
                self._state_path(turn.device).write_bytes(outcome.student)
                self._scores[turn.device] = outcome.after or None
                tally.times[turn.device] = 1
                tally.taught[turn.device] = int(work["global_outputs"] is not None)
                if turn.device not in self.poisoners:
                    tally.after[turn.device] = outcome.after
        tally.wall_s = time.perf_counter() - started_s
        return tally

    def _tell(self, notice: Notice) -> None:
        """Says once what every worker notices; devices that share one data set need no names for their classes."""
        if notice not in self.notices and notice.kind != "unnamed":
            self.notices(notice)

    def _hand_in(self, device: DeviceRecord, outcome: Outcome, body: bytes) -> bool:
        """Upload and report as the HTTP routes hand them in; whether the upload was taken.

        The service counts what it refuses; a report that it refuses takes nothing from the upload.
        """
        digest = hashlib.sha256(body).hexdigest()
        name, encoding = outcome.round_name, outcome.content_encoding
        try:
            self.service.submit(device, name, device.name, body, digest, encoding)
        except Problem:
            return False  # late, most often: the round has gone on without the slow device
        with contextlib.suppress(Problem):
            self.service.report(device, name, device.name, outcome.report)
        return True

    def _finish(self, number: int) -> RoundOverview:
        """Lets the collection's deadline pass where it must, runs step 5, and looks at the round."""
        overview = self._overview(number)
        if overview.phase == "collecting":
            self.clock.advance_to(overview.deadline_s)
        for job in self.service.tick():
            folder = self._folder / "distillation"
            folder.mkdir(exist_ok=True)
            self.service.run_job(job, folder)
        return self._overview(number)

    def _overview(self, number: int) -> RoundOverview:
        return next(found for found in self.service.rounds(TASK) if found.number == number)


def describe_task(
    settings: SimulationSettings, bundles: Sequence[Path], global_bundle: Path | None
) -> dict[str, Any]:
    """The task as `edgestill task create` would describe it."""
    return {
        "name": TASK,
        "bundles": [str(path) for path in bundles],
        "global_bundle": None if global_bundle is None else str(global_bundle),
        "transfer": settings.transfer,
        "transfer_count": settings.transfer_count,
        "transfer_labels": settings.labelled,
        "validation": settings.validation_source,
        "test": settings.data if settings.distils or settings.exchange == "parameters" else None,
        "seed": settings.seed,
        "resize": settings.resize,
        "skip_broken": settings.skip_broken,
        "exchange": settings.exchange,
        "mode": "global" if settings.distils else "consensus",
        "aggregation": {
            "rule": settings.aggregation,
            "clip": settings.clip,
            "trim": settings.trim,
            "byzantine": settings.byzantine,
            "align": settings.align,
            "screen": settings.screen,
        },
        "local": {
            "epochs": settings.local_epochs,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "alpha": settings.alpha,
            "transfer_fraction": settings.transfer_fraction,
            **({} if settings.augment is None else {"augment": settings.augment}),
        },
        "distil": {"epochs": settings.distil_epochs, "learning_rate": settings.distil_learning_rate},
        "precision": settings.precision,
        "rounds": settings.rounds,
        "goal": settings.goal_uploads,
        "minimum": settings.minimum_uploads,
        "over_selection": settings.over_selection,
        "deadline_s": settings.deadline_s,
    }


def rank_students(task: Task) -> Task:
    """The task with memory needs that rank its students, so that a device's memory decides which one it gets."""
    order = sorted(task.students, key=lambda entry: (entry.parameters, entry.bundle))
    return replace(
        task,
        students=tuple(replace(entry, memory_bytes=1 + rank) for rank, entry in enumerate(order)),
    )


def mean_accuracies(measured: Sequence[Mapping[str, float | None]]) -> Means:
    """Mean T_priv and T_uni of the devices that measured them; None where none did."""
    means: Means = {}
    for name in ("t_priv", "t_uni"):
        values = [value for one in measured if (value := one.get(name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
