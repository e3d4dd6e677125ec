"""What tests a run on data without a test split, what a run says at its end, and its event files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.data.shares import hold_out
from edgestill.runtime.training.checkpoint import load_checkpoint
from tests.support.handmade_bundle import CLASSES, SIZE, write_handmade_bundle

pytestmark = pytest.mark.unit
TRAIN = "train c --data d.npz --state s.safetensors --threads 1 --epochs 2 --json".split()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a linear student `c` and 200 samples of unevenly many classes, without a test split."""
    write_handmade_bundle(tmp_path / "c", objective="ce", scale=0.05)
    draw = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), [80, 60, 40, 20])
    x = draw.integers(0, 256, (200, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("share", "counts"), [([], [8, 6, 4, 2]), (["--holdout", "0.25"], [20, 15, 10, 5])])
def test_a_share_of_every_class_tests_the_run(
    share: list[str], counts: list[int], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, *share, "--seed", "3"]) == 0
    summary = lines_of(capsys)[-1]["summary"]
    assert (summary["tested_on"], summary["samples"]) == ("held out", sum(counts))
    # evaluate says the same of the same samples
    bundle = Bundle.open("c")
    whole = load_splits("d.npz", bundle.input, bundle.classes).train
    kept, held = hold_out(whole.labels, float(share[-1]) if share else 0.1, 3)
    assert np.bincount(whole.labels[held]).tolist() == counts and not set(kept) & set(held)
    np.savez("held.npz", x=whole.images[held], y=whole.labels[held])
    assert main("evaluate c --data held.npz --state s.safetensors --threads 1 --json".split()) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == summary["accuracy"] and evaluated["loss"] == summary["loss"]
    # and training saw the others alone
    assert load_checkpoint(Path("s.safetensors"), bundle).run["data"] == whole.select(kept).digest
    # with the same seed it is the same run, which has ended; with another it is not
    assert main([*TRAIN, *share, "--seed", "3"]) == 0
    assert lines_of(capsys)[-1]["summary"]["accuracy"] == summary["accuracy"]
    assert main([*TRAIN, *share, "--seed", "4"]) == 1


def test_nothing_is_held_out_where_it_is_not_wanted_or_not_there(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--holdout", "0"]) == 0
    lines = lines_of(capsys)
    summary, last = lines[-1]["summary"], [line for line in lines[:-1] if line["epoch"] == 2]
    assert summary["tested_on"] is summary["accuracy"] is summary["loss"] is None
    assert summary["train_loss"] == pytest.approx(np.mean([line["loss"] for line in last]))
    assert summary["train_accuracy"] == pytest.approx(np.mean([line["accuracy"] for line in last]))
    with np.load("d.npz") as file:
        few = {"x": file["x"][::50], "y": np.arange(4)}
        np.savez("few.npz", **few)
        np.savez("split.npz", x_train=file["x"], y_train=file["y"], x_test=few["x"], y_test=few["y"])
    few_train = [word.replace("d.npz", "few.npz") for word in TRAIN]
    assert main([*few_train, "--restart"]) == 0
    output = capsys.readouterr()
    assert "too few samples" in output.err and "--holdout 0.5" in output.err
    assert json.loads(output.out.splitlines()[-1])["summary"]["notices"][0]["kind"] == "holdout"
    # data with a test split are tested on it
    split = [word.replace("d.npz", "split.npz") for word in TRAIN]
    assert main([*split, "--restart"]) == 0
    assert lines_of(capsys)[-1]["summary"]["tested_on"] == "test split"
    for words in ([*split, "--holdout", "0.1"], [*TRAIN, "--holdout", "1"], [*TRAIN, "--holdout", "-0.1"]):
        assert main([*words, "--restart"]) == 2
        assert "hint" in capsys.readouterr().err


def test_the_end_in_words(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word for word in TRAIN if word != "--json"]) == 0
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said[:3] == ["accuracy", "loss", "training"]


def test_event_files_hold_every_step_and_the_test(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # nothing is left to do after the first run, whose figures stay
    for _ in range(2):
        assert main([*TRAIN, "--log-dir", "logs/run"]) == 0
    lines = [line for line in lines_of(capsys) if "summary" not in line]
    read = accumulator.EventAccumulator("logs/run", size_guidance={"scalars": 0}).Reload()
    for tag, key in (("train/loss", "loss"), ("train/accuracy", "accuracy"), ("train/learning_rate",) * 2):
        values = [(one.step, one.value) for one in read.Scalars(tag)]
        key = key.removeprefix("train/")
        assert values == [(line["step"], float(np.float32(line[key]))) for line in lines]
    assert {one.step for one in read.Scalars("test/accuracy")} == {len(lines)}
    assert "train/distillation_loss" not in read.Tags()["scalars"]
    assert main([*TRAIN, "--restart", "--log-dir", "c/logs"]) == 2
    assert "lies in the bundle" in capsys.readouterr().err
