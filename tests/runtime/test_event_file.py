"""Event files, as TensorBoard itself reads them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from edgestill.runtime.device.round_log import RoundLog
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.event_file import EventFile

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytestmark = pytest.mark.unit


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, of all files in a folder; damaged frames end a file."""
    read = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_every_figure_at_its_step(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    losses = [float(x) for x in random.standard_normal(300) * 10.0 ** random.integers(-20, 20, 300)]
    with EventFile(tmp_path / "new" / "logs") as file:
        for step, loss in enumerate(losses):
            file.add(step * 10**7, {"train/loss": loss, "Genauigkeit/größte ☃": step / 300})
    found = scalars(tmp_path / "new" / "logs")
    assert [step for step, _ in found["train/loss"]] == [step * 10**7 for step in range(300)]
    np.testing.assert_array_equal([v for _, v in found["train/loss"]], np.float32(losses))
    assert len(found["Genauigkeit/größte ☃"]) == 300


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    with EventFile(tmp_path) as file:
        file.add(1, {"a": None, "b": float("nan"), "c": float("inf"), "d": 0.0})
        file.add(2, {"a": None})
    assert scalars(tmp_path) == {"d": [(1, 0.0)]}


def test_a_run_that_goes_on_replaces_what_was_lost(tmp_path: Path) -> None:
    """Steps 4 and 5 were made after the last checkpoint, before a power cut."""
    seconds = iter(range(1000, 2000))
    for first, last in ((0, 5), (3, 8)):
        with EventFile(tmp_path, clock=lambda: next(seconds)) as file:
            file.begin(first + 1)
            for step in range(first + 1, last + 1):
                file.add(step, {"loss": first + step / 10})
    wanted = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 3.4), (5, 3.5), (6, 3.6), (7, 3.7), (8, 3.8)]
    found = scalars(tmp_path)["loss"]
    assert [step for step, _ in found] == [step for step, _ in wanted]
    np.testing.assert_allclose([v for _, v in found], [v for _, v in wanted], rtol=1e-6)


def test_a_device_that_makes_no_step_voids_none(tmp_path: Path) -> None:
    """It was killed between the last checkpoint of round 2 and the journal: the restart finds the training finished."""

    def take_part(round_number: int, steps: range, ended: bool) -> None:
        log = RoundLog(tmp_path, lambda event, **details: None)
        log("training", round=f"birds.{round_number}")
        for step in steps:
            log("step", step=step, steps=10, loss=float(step), ce_loss=None, distillation_loss=None, accuracy=None,
                learning_rate=None, ms=1.0)  # fmt: skip
        if ended:
            log("trained", before={}, after={"t_priv": round_number / 10})
        log.close()

    take_part(1, range(1, 11), True)
    take_part(2, range(1, 8), False)
    take_part(2, range(6, 11), False)  # from the checkpoint of step 5
    take_part(2, range(11, 11), True)
    found = scalars(tmp_path)
    assert found["train/loss"] == [(step, (step - 1) % 10 + 1.0) for step in range(1, 21)]
    assert [step for step, _ in found["round/t_priv_after"]] == [1, 2]


def test_files_of_one_second_stay_apart(tmp_path: Path) -> None:
    for number in range(3):
        with EventFile(tmp_path, clock=lambda: 1000.5) as file:
            file.add(number, {"loss": number})
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checksum_that_is_wrong_is_found(tmp_path: Path) -> None:
    """So the checksums are not merely ignored by the reader."""
    with EventFile(tmp_path) as file:
        file.add(1, {"loss": 1.0})
        file.add(2, {"loss": 2.0})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<f", 2.0), struct.pack("<f", 3.0)))
    assert scalars(tmp_path) == {"loss": [(1, 1.0)]}


def test_a_full_disk_ends_the_file_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EventFile(tmp_path) as file, open("/dev/full", "wb") as full:
        file.add(1, {"loss": 1.0})
        os.dup2(full.fileno(), file._file.fileno())
        file.add(2, {"loss": 2.0})
        file.add(3, {"loss": 3.0})
    assert capsys.readouterr().err.count("No space left on device: no more figures") == 1
    assert scalars(tmp_path) == {"loss": [(1, 1.0)]}


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--log-dir"):
        EventFile(tmp_path / "file" / "logs")
