"""A run that diverges is told from one that learns, before its state replaces a good one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import edgestill
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.runtime.training.checkpoint import load_checkpoint, load_first_losses
from edgestill.runtime.training.divergence import WINDOW_STEPS, Growth
from tests.support.handmade_bundle import CLASSES, SIZE, write_handmade_bundle

pytestmark = pytest.mark.unit


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a linear student `c` and data whose classes differ by their brightness."""
    write_handmade_bundle(tmp_path / "c", objective="ce", scale=0.05)
    draw = np.random.default_rng(0)
    y = np.arange(80) % CLASSES
    x = (draw.integers(0, 120, (80, SIZE, SIZE, 3)) + 40 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*more: str) -> list[str]:
    return [*"train c --data d.npz --state s.safetensors --threads 1 --epochs 4".split(), *more]


@pytest.fixture
def growth(work: Path) -> Growth:
    bundle = Bundle.open(work / "c")
    return Growth(bundle, bundle.initial_state())


def test_losses_that_leap_and_come_back_are_no_divergence(work: Path, growth: Growth) -> None:
    state = Bundle.open(work / "c").initial_state()
    for loss in [1.4, 900.0, 500.0, 90.0, *[20.0] * 7, *[5.0] * 9]:
        growth.add(loss)
    assert growth.judge(state, last=True) is None
    for _ in range(WINDOW_STEPS):
        growth.add(15.0)
    assert growth.judge(state, last=False) == "its loss went from 1.4 to 15"


def test_the_first_steps_are_judged_only_where_they_are_all(work: Path, growth: Growth) -> None:
    state = Bundle.open(work / "c").initial_state()
    for _ in range(WINDOW_STEPS - 1):
        growth.add(100.0 if _ else 2.0)
    assert growth.judge(state, last=False) is None
    assert growth.judge(state, last=True) is not None


def test_a_run_that_starts_from_a_good_state_may_get_worse_than_it(work: Path, growth: Growth) -> None:
    """A loss of a thousandth of guessing's is no measure."""
    for loss in [1e-3, *[0.9] * 30]:
        growth.add(loss)
    assert growth.judge(Bundle.open(work / "c").initial_state(), last=True) is None


def test_a_distillation_term_of_another_size_that_gains_weight_is_no_divergence(
    work: Path, growth: Growth
) -> None:
    """The sum grows a hundredfold, and neither loss does."""
    state = Bundle.open(work / "c").initial_state()
    for alpha in np.linspace(0, 1, 60):
        growth.add(1.4, 150.0, float(alpha))
        assert growth.judge(state, last=False) is None
    assert growth.judge(state, last=True) is None
    for _ in range(WINDOW_STEPS):
        growth.add(1.4, 1600.0, 1.0)
    assert growth.judge(state, last=False) == "its loss went from 150 to 1600"


def test_teachers_of_large_latents_are_learned_from_to_the_end(work: Path) -> None:
    write_handmade_bundle(work / "l", objective="lkd", scale=0.05)
    with edgestill.open("l", threads=1) as opened:
        latents = np.random.default_rng(1).standard_normal((80, opened.bundle.latent_size)) * 30
        records = opened.train(
            "d.npz", teacher={"latents": latents.astype(np.float32)}, alpha=0.0, alpha_end=1.0, epochs=4,
            learning_rate=1e-5,
        )  # fmt: skip
    assert records[-1].loss > 100 * records[0].loss and len(records) == records[-1].steps


def test_a_run_that_goes_on_is_judged_by_its_first_loss(work: Path) -> None:
    """Not by the one that it goes on with, which may have grown already."""
    write_handmade_bundle(work / "l", objective="lkd", scale=0.05)
    path, records, files = work / "s.safetensors", [], []
    with edgestill.open("l", threads=1) as opened:
        latents = np.ones((80, opened.bundle.latent_size), np.float32)
        how = {"teacher": {"latents": latents}, "epochs": 4, "checkpoint": path, "checkpoint_every": 5}
        steps = opened.steps("d.npz", **how)
        records += [next(steps) for _ in range(7)]
        files.append(load_first_losses(path))
    with edgestill.open("l", threads=1) as opened:
        records += opened.train("d.npz", **how)
        files.append(load_first_losses(path))
        assert records[7].step == 6 and records[-1].step == records[-1].steps
        first = records[0]
        assert files == [(first.ce_loss, first.distillation_loss)] * 2
        assert load_checkpoint(path, opened.bundle).first_losses == files[0]
        resumed = Growth(opened.bundle, opened.bundle.initial_state(), files[0])
        for _ in range(WINDOW_STEPS):
            resumed.add(100.0, 1.0, 0.1)
        assert resumed.judge(opened.state(), last=False) is not None


def test_weights_that_grow_though_the_loss_does_not(work: Path, growth: Growth) -> None:
    """As of a student whose units have all died: it guesses, with weights of thousands."""
    state = Bundle.open(work / "c").initial_state()
    for _ in range(30):
        growth.add(1.4)
    for factor, found in ((0.5, False), (3000, True), (np.inf, True), (np.nan, True)):
        how = growth.judge({name: array + np.float32(factor) for name, array in state.items()}, last=True)
        assert (how is not None and "weights" in how) is found, factor


@pytest.mark.parametrize("rate", ["0.3", "2"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_command_fails_with_a_command_that_works(
    rate: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of 0.3 the loss stays finite, at 2 it does not."""
    assert main(command("--lr", rate, "--momentum=0.9")) == 1
    said = capsys.readouterr().err
    assert ("diverged" in said) if rate == "0.3" else ("inf" in said or "nan" in said)
    assert "keeps the state" not in said and not (work / "s.safetensors").exists()
    remedy = said.rpartition("hint: ")[2].strip()
    words = shlex.split(remedy.partition("edgestill ")[2])
    assert words[: len(command())] == command() and "--momentum=0.9" in words
    assert float(words[words.index("--lr") + 1]) == float(rate) / 10
    # again and again, it leads to a run that ends well
    for _ in range(6):
        if main(words) == 0:
            break
        words = shlex.split(capsys.readouterr().err.rpartition("edgestill train")[2])
        words = ["train", *words]
    else:
        pytest.fail("no rate was small enough")
    assert load_checkpoint(work / "s.safetensors", Bundle.open(work / "c")).finished


def test_a_checkpoint_that_was_good_stays(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warm-up keeps the first steps right, and what it wrote is named and whole."""
    more = ["--lr", "30", "--warmup-steps", "20000", "--checkpoint-every", "30", "--epochs", "100"]
    assert main(command(*more, "--json")) == 1
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    kept = load_checkpoint(work / "s.safetensors", Bundle.open(work / "c"))
    assert f"s.safetensors keeps the state of step {kept.step}" in output.err
    assert 0 < kept.step < lines[-1]["step"] + 1 and "summary" not in lines[-1]
    # what is proposed trains into another file, and each time into one that is not there yet
    (work / "s-2.safetensors").write_bytes(b"mine")
    good = (work / "s.safetensors").read_bytes()
    assert main(command(*more, "--restart")) == 1
    words = shlex.split(capsys.readouterr().err.rpartition("edgestill ")[2])
    assert words[-4:] == ["--lr", "3", "--state", "s-3.safetensors"] and words.count("--state") == 1
    assert "--restart" not in words and (work / "s.safetensors").read_bytes() == good
    main([*words, "--lr", "0.01"])
    finished = load_checkpoint(work / "s-3.safetensors", Bundle.open(work / "c"))
    assert finished.finished and (work / "s.safetensors").read_bytes() == good
