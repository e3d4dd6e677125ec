"""A seeded storm of devices against the real `Service`: no training, every kind of bad luck, and what must hold.

Devices upload small random latents. Messages get lost, come twice, late, in another order, cut off, with a flipped
bit or with NaN; workers of step 5 die; the service is started anew on the same store in the middle of rounds.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.coordinator.distillation.aggregation import Upload, aggregate
from edgestill.coordinator.problems import CATALOG, Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import DeviceRecord
from edgestill.coordinator.task.task import Task, parse_task
from edgestill.runtime.bundle import wire
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.device.outputs import FORMAT, pack, unpack

SAMPLES, LATENT = 6, 3
SHAPES = {"latents": (SAMPLES, LATENT)}
DEADLINE_S, DISTIL_S = 100.0, 50.0
DROPOUT = 0.3


class MemoryBlobs:
    """Blobs in a dictionary; the transfer set also as a file, for step 5 reads it from one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.data: dict[str, bytes] = {}

    def put(self, data: Any, digest: str | None = None) -> str:
        data = data if isinstance(data, bytes) else b"".join(data)
        computed = hashlib.sha256(data).hexdigest()
        assert digest in (None, computed), "the service stores what it has not checked"
        self.data[computed] = data
        return computed

    def put_file(self, path: Path) -> str:
        return self.put(Path(path).read_bytes())

    def open_range(self, digest: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        return iter([self.data[digest][start:stop]])

    def size(self, digest: str) -> int | None:
        return len(self.data[digest]) if digest in self.data else None

    def path(self, digest: str) -> Path:
        path = self._folder / digest
        if not path.exists():
            path.write_bytes(self.data[digest])
        return path

    def delete(self, digest: str) -> None:
        self.data.pop(digest, None)


@dataclass
class Storm:
    """One seeded run; `run` ends with every invariant checked."""

    seed: int
    devices: int
    folder: Path
    rounds: int = 3
    acknowledged: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Body by device and round: what the service said yes to."""
    created: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.now_s = 1000.0
        self.worker_luck = self.random.choice([0.9, 0.6, 0.05])
        self.blobs = MemoryBlobs(self.folder)
        self.store = Store("sqlite://")
        self.queue: list[tuple[float, int, Any]] = []
        self.pushed = 0
        self.service = self._start()
        self.task = self.service.create_task(self._task())
        self.members = [self._enrol() for _ in range(self.devices)]

    def run(self) -> None:
        for device in self.members:
            self._at(self.now_s + self.random.uniform(0, 20), ("ask", device))
        # every message and every deadline lies before this: what is not over then would never be
        end_s = self.now_s + (self.rounds + 1) * (DEADLINE_S + DISTIL_S + 60)
        tick_s = self.now_s
        while tick_s < end_s:
            self._at(tick_s, ("tick", None))
            tick_s += self.random.uniform(1, 15)
        while self.queue:
            moment_s, _, (kind, what) = heapq.heappop(self.queue)
            self.now_s = max(self.now_s, moment_s)
            getattr(self, f"_on_{kind}")(what)
        self._check()

    def _task(self) -> Task:
        path = self.folder / f"transfer-{self.seed}.safetensors"
        Transfer(np.zeros((SAMPLES, 1, 2, 2), np.uint8)).save(path)
        transfer = self.blobs.put_file(path)
        bundle = self.blobs.put(b"a bundle that nobody opens")
        goal = max(1, int(self.devices * self.random.uniform(0.2, 1.0)))
        rule = self.random.choice(["mean", "median", "trimmed_mean"])
        return parse_task(
            {
                "name": "storm",
                "mode": "consensus",
                "students": [
                    {"student": "none", "bundle": bundle, "size_bytes": self.blobs.size(bundle),
                     "engines": ["none"], "memory_bytes": 0, "model_digest": "0" * 64}
                ],
                "transfer": {"blob": transfer, "samples": SAMPLES, "size_bytes": self.blobs.size(transfer),
                             "labelled": False},
                "latent_size": LATENT,
                "aggregation": {"rule": rule, "align": self.random.random() < 0.3},
                "precision": "fp32",
                "rounds": self.rounds,
                "goal": goal,
                "minimum": self.random.choice([1, self.random.randint(1, goal), goal]),
                "over_selection": self.random.choice([1.0, 1.3, 2.0]),
                "deadline_s": DEADLINE_S,
                "distil": {"deadline_s": DISTIL_S},
            }
        )  # fmt: skip

    def _start(self) -> Service:
        return Service(self.store, self.blobs, lambda: self.now_s, self.random.randbytes, lease_s=10.0)

    def _enrol(self) -> DeviceRecord:
        info = {"name": "x", "engines": ["none"], "memory_bytes": None, "processor": "x", "version": "x"}
        enrolled = self.service.enrol(self.service.issue_code("storm"), info)
        return self.service.authenticate(enrolled["token"])

    def _at(self, moment_s: float, event: Any) -> None:
        self.pushed += 1
        heapq.heappush(self.queue, (moment_s, self.pushed, event))

    def _on_tick(self, _: None) -> None:
        if self.random.random() < 0.05:
            self.service = self._start()  # as after a crash: nothing but the store is left
        for job in self.service.tick():
            if self.random.random() < self.worker_luck:  # else the worker died before it began
                self.service.run_job(job, self.folder)

    def _on_ask(self, device: DeviceRecord) -> None:
        try:
            work = self.service.ask(device, {})
        except Problem as problem:
            assert problem.kind == "task_finished"
            return
        self._at(self.now_s + self.random.uniform(5, 30), ("ask", device))
        if work is None:
            if self.random.random() < 0.05:  # uploads although nobody asked it to
                name = f"storm.{self.random.randint(1, self.rounds)}"
                self._at(self.now_s + 1, ("upload", (device, device.name, name, self._body(), None)))
        elif self.random.random() >= DROPOUT / 3:  # it asks about three times a round
            self._send(device, work["round"])

    def _send(self, device: DeviceRecord, round_name: str) -> None:
        """Puts the upload on its way, and whatever happens to it there."""
        chance, body = self.random, self._body()
        late = chance.random() < 0.1
        moment_s = self.now_s + (DEADLINE_S + chance.uniform(0, 40) if late else chance.uniform(0, 60))
        message = (device, device.name, round_name, body, None)
        fate = chance.random()
        if fate < 0.15:
            cut = body[: chance.randrange(len(body))]
            message = (device, device.name, round_name, cut, chance.choice([None, body]))
        elif fate < 0.3:
            flipped = bytearray(body)
            flipped[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
            message = (device, device.name, round_name, bytes(flipped), chance.choice([None, body]))
        elif fate < 0.4:
            message = (device, device.name, round_name, self._body(float("nan")), None)
        elif fate < 0.45:
            other = chance.choice(self.members)
            message = (device, other.name, round_name, body, None)
        self._at(moment_s, ("upload", message))
        for _ in range(chance.choice([0, 0, 1, 2])):  # again, because the answer got lost
            again = (device, device.name, round_name, body if fate < 0.45 else message[3], None)
            self._at(moment_s + chance.uniform(-20, 60), ("upload", again))

    def _body(self, first: float | None = None) -> bytes:
        latents = np.array(
            [[self.random.gauss(0, 1) for _ in range(LATENT)] for _ in range(SAMPLES)], np.float32
        )
        metadata = {"samples": str(self.random.randint(1, 500))}
        if first is None:
            return pack({"latents": latents}, "fp32", metadata, compress=False).body
        latents[0, 0] = first  # what `pack` would refuse to write
        metadata |= {"format": FORMAT, "precision": "fp32"}
        return b"".join(wire.encode({"latents": latents}, metadata))

    def _on_upload(self, message: tuple[DeviceRecord, str, str, bytes, bytes | None]) -> None:
        device, name, round_name, body, digest_of = message
        digest = hashlib.sha256(body if digest_of is None else digest_of).hexdigest()
        try:
            answer = self.service.submit(device, round_name, name, body, digest, "identity")
        except Problem as problem:
            assert problem.kind in CATALOG
            self.refused[problem.kind] += 1
            return
        kept = self.acknowledged.setdefault(round_name, {})
        if answer == "created":
            self.created[round_name, name] += 1
            kept[name] = body
        assert kept.get(name) == body, "the same answer for other bytes"

    def _check(self) -> None:
        found = self.service.rounds("storm")
        assert [one.number for one in found] == list(range(1, len(found) + 1))
        assert found, "nobody ever asked"
        previous: dict[str, np.ndarray] | None = None
        for one in found:
            assert one.phase in ("completed", "abandoned"), f"round {one.number} hangs in {one.phase}"
            accepted = self.acknowledged.get(one.name, {})
            assert sorted(accepted) == sorted(one.accepted), "acknowledged and counted differ"
            assert len(set(one.accepted)) == len(one.accepted) and set(one.accepted) <= set(one.selected)
            assert len(one.selected) <= self.task.rules().selected_at_most
            assert len(one.accepted) <= self.task.goal
            if one.phase == "completed":
                assert len(one.accepted) >= self.task.minimum
                previous = self._check_published(one, accepted, previous)
            else:
                assert one.reason
        assert set(self.created.values()) <= {1}, "an upload was counted twice"
        counted: Counter[str] = Counter()
        for refusal in self.service.refusals("storm"):
            counted[refusal.kind] += refusal.count
        self._check_refusals(counted)

    def _check_refusals(self, counted: Counter[str]) -> None:
        """What a service that was replaced had not written down yet may be missing; nothing may be made up."""
        assert all(counted[kind] <= self.refused[kind] for kind in counted)

    def _check_published(
        self, one: RoundOverview, accepted: dict[str, bytes], previous: dict[str, np.ndarray] | None
    ) -> dict[str, np.ndarray]:
        """The published blob is the aggregate of exactly the acknowledged bodies, in any order."""
        with self.store.read() as transaction:
            numbers = transaction.numbers_of_uploads("storm", one.number)
        uploads = []
        for device, body in accepted.items():
            arrays, metadata = unpack(body, "identity", SHAPES)
            uploads.append(Upload(device, arrays, int(metadata["samples"]), None, numbers.get(device, 0)))
        self.random.shuffle(uploads)
        replayed = aggregate(uploads, self.task.aggregation, previous, None)
        assert one.published is not None
        published, _ = unpack(self.blobs.data[one.published], "identity", SHAPES)
        np.testing.assert_array_equal(published["latents"], replayed["latents"])
        if self.task.aggregation.rule == "mean" and not self.task.aggregation.align:
            stacked = np.stack([upload.arrays["latents"].astype(np.float64) for upload in uploads])
            samples = sorted(upload.samples for upload in uploads)
            usual = samples[(len(samples) - 1) // 2]  # more than ten times that nobody is believed to have
            weights = [min(upload.samples, 10 * usual) for upload in uploads]
            expected = np.average(stacked, axis=0, weights=weights)
            np.testing.assert_allclose(published["latents"], expected, rtol=1e-6, atol=1e-6)
        return published
