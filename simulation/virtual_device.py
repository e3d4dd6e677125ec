"""One virtual device's part of a round, run in a worker: the code of `edgestill join` without sockets.

All that a worker needs comes with the job, and all that it leaves behind goes back with the outcome: it may run on any
machine. It keeps engines of the students it met last open, and the data dealt out, from job to job.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle, InputSpec
from edgestill.runtime.data.classes import KnownClasses, names_as_metadata
from edgestill.runtime.data.dataset import Splits, load_splits
from edgestill.runtime.data.notice import Notice
from edgestill.runtime.data.overlap import without
from edgestill.runtime.data.shares import TEST_SAMPLES, DeviceData, deal
from edgestill.runtime.device.assignment import Assignment, fetch_assignment
from edgestill.runtime.device.device import Device
from edgestill.runtime.device.journal import WorkMemory
from edgestill.runtime.device.local_round import Equipment, Options, Privacy, score_tests
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import Transfer, train_locally
from edgestill.runtime.device.outputs import pack, unpack
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.training.plan import transfer_count
from edgestill.simulation.attack import spoil
from edgestill.simulation.pool import SharedFile


@dataclass(frozen=True)
class Setup:
    """How the data of a simulation are dealt out; `data` is a file or the name of a shipped data set."""

    data: SharedFile | str
    devices: int
    gamma: float | None
    """None: every device is a user of the data."""
    seed: int
    test_samples: int = TEST_SAMPLES
    reserved: tuple[SharedFile, ...] = ()
    """The task's transfer and validation sets, whose samples no device has, nor is tested on."""
    resize: bool = False
    skip_broken: bool = False


@dataclass(frozen=True)
class RoundJob:
    """One training of one device; JSON values are those of docs/federation.md.

    `blobs`: those that the device may ask for, by digest. `student`: its encoded state between rounds; None before the
    first.
    """

    setup: Setup
    index: int
    device: str
    assignment: Mapping[str, Any]
    work: Mapping[str, Any]
    blobs: Mapping[str, SharedFile]
    student: bytes | None
    attack: str | None
    expected: Mapping[str, tuple[int, ...]]
    privacy: Privacy | None = None
    engine: str | None = None
    scores: Mapping[str, float | None] | None = None
    """Accuracies of the student, where they are known."""


@dataclass(frozen=True)
class Outcome:
    """What a device sends; `body` is None when it gave the round up.

    `student`: its encoded state after the training. `notices`: what was noticed while the data were read.
    """

    round_name: str
    body: bytes | None
    student: bytes | None
    content_encoding: str
    report: Mapping[str, Any]
    bytes_down: int
    setup_bytes: int
    notices: tuple[Notice, ...] = ()

    @property
    def after(self) -> Mapping[str, float | None]:
        """Accuracies after the training."""
        return self.report.get("after", {})


@dataclass(frozen=True)
class AloneJob:
    """The comparison: as many epochs as in `times` rounds, on private data alone.

    `taught`: as many steps at least, in whole epochs, of rounds of which so many had global outputs; 0: as many epochs.
    A batch of such a round is partly of transfer samples, so that an epoch takes more steps.
    """

    setup: Setup
    index: int
    assignment: Mapping[str, Any]
    blobs: Mapping[str, SharedFile]
    times: int
    engine: str | None = None
    taught: int = 0


class InProcessCoordinator:
    """A `Coordinator` for one round: hands out what the service has given already, and keeps what comes back."""

    def __init__(self, job: RoundJob | AloneJob) -> None:
        self._job = job
        self.body: bytes | None = None
        self.content_encoding = "identity"
        self.report_sent: Mapping[str, Any] = {}
        self._fetched: dict[str, int] = {}

    @property
    def bytes_down(self) -> int:
        """Of all blobs that were asked for, each once: a device keeps what it has downloaded."""
        return sum(self._fetched.values())

    def enrol(self, code: str, info: Mapping[str, Any]) -> dict[str, Any]:
        raise PermissionError("a virtual device is enrolled before its first round")

    def assignment(self) -> dict[str, Any]:
        return dict(self._job.assignment)

    def work(self, status: Mapping[str, Any], wait_s: float) -> dict[str, Any] | None:
        return None

    def standing(self) -> dict[str, Any] | None:
        return None

    def blob(self, digest: str, size_bytes: int, target: Path) -> Path:
        """The blob where it lies, or one copy a worker: thousands of devices need none each."""
        self._fetched[digest] = size_bytes
        return self._job.blobs[digest].path(target.parent)

    def submit(self, round_name: str, device: str, body: bytes, content_encoding: str) -> None:
        job = self._job
        if isinstance(job, RoundJob) and job.attack is not None:
            arrays, metadata = unpack(body, content_encoding, job.expected)
            spoiled = spoil(arrays, job.attack, [int(job.work["seed"]), job.index])
            packed = pack(spoiled, metadata["precision"], metadata)
            body, content_encoding = packed.body, packed.content_encoding
        self.body, self.content_encoding = body, content_encoding

    def report(self, round_name: str, device: str, report: Mapping[str, Any]) -> None:
        self.report_sent = report


def run_round(job: RoundJob) -> Outcome:
    """Trains and packs; the same job gives the same bytes anywhere."""
    coordinator = InProcessCoordinator(job)
    student = None if job.student is None else wire.decode(job.student).arrays
    keep = WorkMemory(_folder(), student)
    equipment, notices = _equip(job.setup, job.index, fetch_assignment(coordinator, keep), job.engine)
    if job.privacy is not None:
        equipment = replace(equipment, options=Options(privacy=job.privacy))
    setup_bytes = coordinator.bytes_down
    device = Device(
        job.device, coordinator, keep, equipment, conditions=None,
        clock=lambda: 0.0, sleep=lambda _: None,
        # noise that can be drawn again protects nobody, and here there is nobody to protect
        random=np.random.default_rng([int(job.work["seed"]), job.index]), scores=job.scores,
    )  # fmt: skip
    report = device.run_round(job.work)
    return Outcome(
        str(job.work["round"]),
        None if report is None else coordinator.body,
        None if report is None else _encoded(keep.student(equipment.bundle), equipment.private.class_names),
        coordinator.content_encoding,
        coordinator.report_sent,
        coordinator.bytes_down - setup_bytes,
        setup_bytes if job.student is None else 0,
        notices,
    )


def _encoded(state: Mapping[str, np.ndarray], class_names: tuple[str, ...]) -> bytes:
    return b"".join(wire.encode(state, names_as_metadata(class_names)))


def train_alone(job: AloneJob) -> dict[str, float | None]:
    """Accuracies of the device's student after as many epochs, or steps, without any exchange."""
    coordinator = InProcessCoordinator(job)
    keep = WorkMemory(_folder())
    kit, _ = _equip(job.setup, job.index, fetch_assignment(coordinator, keep), job.engine)
    settings = LocalSettings.from_json(kit.task.get("local", {}))
    settings = replace(settings, epochs=_epochs_alone(job, settings, len(kit.private), kit.bundle.batch))
    digest = hashlib.sha256(f"alone {job.setup.seed} {job.index}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    initial = kit.bundle.initial_state()
    result = train_locally(kit.engine, kit.bundle, kit.private, None, None, settings, seed, initial, None)
    kit.engine.load_state(result.state)
    return score_tests(kit)


def _epochs_alone(job: AloneJob, settings: LocalSettings, samples: int, batch: int) -> int:
    alone = math.ceil(samples / batch)
    taught = math.ceil(samples / (batch - transfer_count(batch, settings.transfer_fraction)))
    steps = settings.epochs * ((job.times - job.taught) * alone + job.taught * taught)
    return math.ceil(steps / alone)


def _equip(
    setup: Setup, index: int, assignment: Assignment, engine_name: str | None
) -> tuple[Equipment, tuple[Notice, ...]]:
    bundle, engine = _opened(str(assignment.bundle_path), engine_name)
    form = replace(bundle.input, mean=(), std=())  # which students normalise by, each its own way
    named = tuple(assignment.task.get("class_names") or ()) or bundle.class_names
    how = (setup, form, bundle.classes, KnownClasses(named, "the task"))
    data = _dealt(*how)[index]
    transfer = None if assignment.transfer_path is None else _transfer(str(assignment.transfer_path))
    tests = {"t_priv": data.t_priv, "t_uni": data.t_uni}
    return Equipment(assignment.task, bundle, engine, data.train, transfer, tests), _read(*how)[1]


@lru_cache(maxsize=16)
def _opened(path: str, engine_name: str | None) -> tuple[Bundle, Engine]:
    bundle = Bundle.open(path)
    return bundle, open_engine(bundle, engine_name, threads=1)


@lru_cache(maxsize=1)
def _read(
    setup: Setup, form: InputSpec, classes: int, known: KnownClasses
) -> tuple[Splits, tuple[Notice, ...]]:
    """The data, and what was noticed, for the parent to say once."""
    notices: list[Notice] = []
    splits = load_splits(
        setup.data if isinstance(setup.data, str) else setup.data.path(_folder()), form, classes, setup.resize,
        known=known, skip_broken=setup.skip_broken, tell=notices.append,
    )  # fmt: skip
    return splits, tuple(notices)


@lru_cache(maxsize=1)
def _dealt(setup: Setup, form: InputSpec, classes: int, known: KnownClasses) -> list[DeviceData]:
    splits, _ = _read(setup, form, classes, known)
    reserved = [Transfer.load(file.path(_folder())).images for file in setup.reserved]
    train, _ = without(splits.train, *reserved)
    held_out = None if splits.test is None else without(splits.test, *reserved)[0]
    return deal(
        train, setup.devices, setup.gamma, setup.seed, held_out=held_out, test_samples=setup.test_samples
    )


@lru_cache(maxsize=2)
def _transfer(path: str) -> Transfer:
    return Transfer.load(path)


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgestill-worker-")


def _folder() -> Path:
    """This worker's own, removed when it ends, unless Ray kills it."""
    return Path(_temporary().name)
