"""A device that is killed or stopped at any moment goes on without losing or repeating a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device.client import Refused, Unreachable
from edgestill.runtime.device.journal import WorkFolder, WorkMemory
from edgestill.runtime.device.local_round import Options, Privacy
from edgestill.runtime.device.local_training import train_locally
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import Interrupted
from tests.support.device_bench import Bench, open_bench, upload_undisturbed  # noqa: F401  fixtures
from tests.support.handmade_bundle import write_handmade_bundle


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class Killer:
    """Kills at the n-th moment, before or after it took effect."""

    def __init__(self, moment: int | None, late: bool) -> None:
        self.moment, self.late, self.count = moment, late, 0

    def __call__(self, late: bool) -> None:
        self.count += not late
        if self.count == self.moment and late == self.late:
            self.moment = None
            raise Killed


class DeadlyKeep:
    """A work folder with a moment to be killed at around every write."""

    def __init__(self, folder: Path, killer: Killer) -> None:
        self.inner, self.killer = WorkFolder(folder), killer

    def __getattr__(self, name: str):
        method = getattr(self.inner, name)
        if name not in ("write", "put_body", "settle", "clean", "clean_blobs"):
            return method

        def deadly(*arguments: object) -> object:
            self.killer(late=False)
            result = method(*arguments)
            self.killer(late=True)
            return result

        return deadly


@pytest.mark.simulation
def test_killed_at_every_write_it_goes_on_with_another_student(bench: Bench, tmp_path: Path) -> None:
    """As after a move into a smaller container: what it trained before stays, the new student begins anew."""
    bundle = Bundle.open(write_handmade_bundle(tmp_path / "other", seed=1))
    engine = open_engine(bundle, None, 1)
    moment = 0
    while True:
        moment += 1
        killer, fake = Killer(moment, late=True), bench.coordinator()
        folder = tmp_path / f"{moment}"
        keep = DeadlyKeep(folder, killer)
        try:
            bench.device(fake, keep).run()
        except Killed:
            pass
        keep.inner.close()
        if killer.moment is not None:
            break
        before = len(fake.uploads)
        after = bench.device(fake, WorkFolder(folder))
        after.equipment = replace(after.equipment, bundle=bundle, engine=engine)
        after.run()
        assert len(fake.uploads) == fake.rounds, moment
        kept = sorted(path.name for path in folder.glob("student-*"))
        ours, theirs = (f"student-{one.model_digest[:16]}.safetensors" for one in (bundle, bench.bundle))
        assert kept and (theirs in kept or not before) and (ours in kept or before >= fake.rounds - 1), moment
        for name, one in ((ours, bundle), (theirs, bench.bundle)):
            if name in kept:
                one.check_state(load_file(folder / name))
    engine.close()
    assert moment > 10


@pytest.mark.simulation
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_killed_at_every_write_it_uploads_the_same_bytes(
    bench: Bench, tmp_path: Path, undisturbed: dict[str, bytes], late: bool
) -> None:
    moment = 0
    while True:
        moment += 1
        killer, fake = Killer(moment, late), bench.coordinator()
        starts = 0
        while True:
            starts += 1
            try:
                keep = DeadlyKeep(tmp_path / f"{moment}", killer)
                bench.device(fake, keep).run()
                break
            except Killed:
                keep.inner.close()
        assert fake.uploads == undisturbed, moment
        # what is sent again is the same: the coordinator never had to refuse another body
        assert len(set(fake.submissions)) == 2, moment
        if starts == 1:
            break
    assert moment > 15  # else the killer missed the writes


@pytest.mark.simulation
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_killed_at_every_write_it_keeps_what_it_learned_for_an_upload_that_was_refused(
    bench: Bench, tmp_path: Path, late: bool
) -> None:
    accepted = WorkMemory(bench.folder / "blobs")
    bench.device(bench.coordinator(rounds=1), accepted).run()
    expected = accepted.student(bench.bundle)

    def refuse(call: str) -> None:
        if call == "submit":
            refused.append(moment)
            raise Refused("no longer", status=410, kind="late")
        if call == "work" and moment in refused:
            raise Refused("no rounds left", status=410, kind="task_finished")

    moment, refused = 0, []
    while True:
        moment += 1
        killer, fake = Killer(moment, late), bench.coordinator(rounds=1)
        fake.before = refuse
        starts = 0
        while True:
            starts += 1
            keep = DeadlyKeep(tmp_path / f"{moment}", killer)
            try:
                device = bench.device(fake, keep)
                device.run()
                break
            except Killed:
                keep.inner.close()
        assert device.participant.last_round == "birds.1" and device.participant.completed == 0, moment
        mine = keep.inner.student(bench.bundle)
        for name, value in expected.items():
            np.testing.assert_array_equal(mine[name], value, err_msg=f"{name}, killed at write {moment}")
        assert not list((tmp_path / f"{moment}").glob("training-*")), moment
        keep.inner.close()
        if starts == 1:
            break
    assert moment > 8  # else the killer missed the writes


def test_killed_in_training_it_goes_on_from_the_checkpoint(
    bench: Bench, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fake, steps = bench.coordinator(), []

    def dying(*arguments: object, on_step, **how: object):
        def count(record) -> None:
            steps.append(record.step)
            on_step(record)
            if len(steps) in (4, 9, 30):
                raise Killed

        return train_locally(*arguments, on_step=count, **how)

    starts = 0
    while True:
        starts += 1
        keep = WorkFolder(tmp_path / "w")
        try:
            bench.device(fake, keep, train=dying).run()
            break
        except Killed:
            keep.close()
    assert starts == 4 and fake.uploads == undisturbed
    # every step was made once: with a checkpoint after each, nothing is done twice
    second = steps.index(1, 1)
    assert steps == [*range(1, second + 1), *range(1, len(steps) - second + 1)]


@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "answer lost"])
def test_an_upload_whose_fate_is_unknown_is_sent_again_as_it_was(
    bench: Bench, tmp_path: Path, undisturbed: dict[str, bytes], answered: bool
) -> None:
    fake = bench.coordinator()
    failures = iter(
        [Unreachable("gone"), Killed(), Refused("busy", status=503, retry_after_s=7), None, Killed()]
    )
    slept: list[float] = []

    def fail(call: str) -> None:
        if call == "submit" and (failure := next(failures, None)) is not None:
            raise failure

    setattr(fake, "after" if answered else "before", fail)
    # noise makes a second packing visible: it would give other bytes
    noisy = Options(privacy=Privacy(clip=1.0, noise_multiplier=5.0))
    for _ in range(4):
        keep = WorkFolder(tmp_path / "w")
        try:
            bench.device(fake, keep, noisy, sleep=slept.append).run()
            break
        except Killed:
            keep.close()
    assert len(fake.uploads) == 2 and len(set(fake.submissions)) == 2
    assert 7 in slept
    assert fake.uploads != undisturbed
    assert 0 < fake.reports["birds.1"]["epsilon"] < fake.reports["birds.2"]["epsilon"]


def test_a_request_to_stop_leaves_a_checkpoint(
    bench: Bench, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fake, steps = bench.coordinator(), []
    keep = WorkFolder(tmp_path / "w")
    device = bench.device(
        fake,
        keep,
        watch=lambda event, **details: steps.append(event) if event == "step" else None,
        stop_requested=lambda: len(steps) >= 3,
    )
    with pytest.raises(Interrupted):
        device.run()
    keep.close()
    assert list((tmp_path / "w").glob("training-birds.1*")) and len(steps) == 4
    bench.device(fake, WorkFolder(tmp_path / "w")).run()
    assert fake.uploads == undisturbed
