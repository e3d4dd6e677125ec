"""Everything that a device needs to take part, opened once and used by many: fixtures `bench`, `undisturbed`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.device.assignment import fetch_assignment
from edgestill.runtime.device.device import Device
from edgestill.runtime.device.journal import Keep, WorkMemory
from edgestill.runtime.device.local_round import Equipment, Options
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.engines.registry import open_engine
from tests.support.device_fakes import FakeCoordinator, write_private_data


class Bench:
    """Everything that a device needs; opened once, used by many devices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fake = FakeCoordinator(folder / "coordinator")
        write_private_data(folder / "d.npz")
        keep = WorkMemory(folder / "blobs")
        assignment = fetch_assignment(fake, keep)
        self.task = assignment.task
        self.bundle = Bundle.open(assignment.bundle_path)
        self.engine = open_engine(self.bundle, None, 1)
        splits = load_splits(folder / "d.npz", self.bundle.input, self.bundle.classes)
        assert assignment.transfer_path is not None and splits.test is not None
        self.private, self.tests = splits.train, {"t_priv": splits.test}
        self.transfer = Transfer.load(assignment.transfer_path)
        self.made = 0

    def coordinator(self, **how: object) -> FakeCoordinator:
        self.made += 1
        return FakeCoordinator(self.folder / f"coordinator-{self.made}", **how)

    def keep(self) -> Keep:
        return WorkMemory(self.folder / "blobs")

    def device(self, fake: FakeCoordinator, keep: Keep, options: Options | None = None, **how) -> Device:
        kit = Equipment(
            fake.task, self.bundle, self.engine, self.private, self.transfer, self.tests, options or Options()
        )
        how = {"clock": lambda: 1000.0, "sleep": lambda seconds: None, **how}
        return Device(fake.device, fake, keep, kit, **how)


@pytest.fixture(scope="module", name="bench")
def open_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("bench"))
    yield bench
    bench.engine.close()
    bench.bundle.close()


@pytest.fixture(scope="module", name="undisturbed")
def upload_undisturbed(bench: Bench) -> dict[str, bytes]:
    fake = bench.coordinator()
    assert bench.device(fake, WorkMemory(bench.folder / "blobs")).run() == 2
    assert set(fake.uploads) == {"birds.1", "birds.2"}
    return fake.uploads
