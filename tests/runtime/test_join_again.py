"""`edgestill join` started again, with what was missing, mistyped or too noisy, and what it says meanwhile."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.runtime.cli import main
from edgestill.runtime.commands.events import EventOutput
from edgestill.runtime.device.client import Refused
from edgestill.runtime.device.privacy import epsilon
from tests.runtime.test_join import CODE, arguments, events
from tests.support.device_bench import Bench, open_bench  # noqa: F401  a fixture
from tests.support.device_fakes import TRANSFER_SAMPLES, FakeCoordinator, served, write_private_data
from tests.support.handmade_bundle import LATENT

NOISE = ["--privacy-clip", "1", "--noise-multiplier", "8"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_private_data(tmp_path / "d.npz")
    return tmp_path


def test_engines_and_memory_are_sent_at_every_start(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c")

    def too_small(call: str) -> None:
        if call == "assignment" and fake.info["memory_bytes"] < 6_300_000:
            raise Refused("the student needs 6.3 MB", status=409, kind="no_fitting_student")

    fake.before = too_small
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--once", "--memory", "6")) == 1
        assert "needs 6.3 MB" in capsys.readouterr().err
        name = fake.info["name"]
        assert main(arguments(work, url, "--once", "--memory", "6.3")) == 0
    assert fake.info["memory_bytes"] == 6_300_000 and fake.info["name"] == name
    said = capsys.readouterr().err
    assert "warning: --code is not used" in said and f"enrolled already, as {fake.device}" in said


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "inf"])
def test_memory_is_a_positive_number(work: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c")
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--memory", memory)) == 2
    assert "--memory" in capsys.readouterr().err and fake.codes == {CODE}


@pytest.mark.parametrize("code", [["AAAAA"], [CODE + "A"], [CODE.replace("D", "1")], [""], []])
def test_what_cannot_be_a_code_is_sent_to_nobody(
    work: Path, code: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(work, "http://127.0.0.1:1")
    given[2:4] = ["--code", *code]
    assert main(given) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "code" in said[0] and said[1].startswith("hint: give what `edgestill enrol`")


def test_once_fails_where_the_task_has_no_rounds_left(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeCoordinator(work / "c", rounds=0)) as (url, _):
        for _ in range(2):
            assert main(arguments(work, url, "--once")) == 1
            assert "the task has no rounds left" in capsys.readouterr().err


def test_noise_that_drowns_the_outputs_is_warned_of(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c", rounds=1)
    with served(fake) as (url, _):
        assert main(arguments(work, url, *NOISE)) == 0
    said = capsys.readouterr()
    ratio = 2 * 8 * math.sqrt(TRANSFER_SAMPLES * LATENT)
    assert f"warning: the mean of 1 device with this noise carries noise about {ratio:.0f} times" in said.err
    spent = f"{epsilon(8.0, 1, 1e-5):.2f} at δ 1e-05, for all uploads of this device so far"
    assert f"; ε {spent}" in said.err and f"epsilon         {spent}" in said.out


def test_noise_refused_for_parameters_leaves_the_folder_useful(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(work / "c")
    fake.task["exchange"] = "parameters"
    with served(fake) as (url, _):
        assert main(arguments(work, url, *NOISE)) == 2
        assert "needs no other code" in capsys.readouterr().err
        fake.work = lambda *_: (_ for _ in ()).throw(Refused("none", status=410, kind="task_finished"))  # type: ignore
        again = arguments(work, url)
        del again[1:4]
        assert main(again) == 0


def test_who_interrupts_a_device_gets_its_summary(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c")
    asked = []

    def interrupt(call: str) -> None:
        asked.append(call)
        if asked.count("work") == 2:
            os.kill(os.getpid(), signal.SIGINT)

    fake.before = interrupt
    with served(fake) as (url, _):
        assert main(arguments(work, url, *NOISE)) == 1
        said = capsys.readouterr()
        assert "rounds uploaded 1" in said.out and f"epsilon         {epsilon(8.0, 1, 1e-5):.2f}" in said.out
        fake.before = lambda call: None
        assert main(arguments(work, url, "--json", *NOISE)) == 0
    summary = events(capsys.readouterr().out)[-1]["summary"]
    assert summary["rounds_uploaded"] == 1 and summary["epsilon"] == pytest.approx(epsilon(8.0, 2, 1e-5))


def test_a_log_hears_of_training_twice_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [0.0]
    output = EventOutput(False, lambda: now_s[0])
    output("training", round="birds.1", samples=4, student="s")
    for step in range(1, 101):
        now_s[0] += 1.0
        output("step", step=step, steps=100, epoch=1, loss=0.5, ms=1000.0)
    said = capsys.readouterr().err.splitlines()
    assert [line[: line.index("epoch")] for line in said] == [
        f"edgestill: step {step} of 100  " for step in (30, 60, 90)
    ]


def test_what_others_wrote_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = EventOutput(False)
    for event, name in (("notice", "text"), ("warning", "message"), ("out of reach", "reason")):
        output(event, **{name: "class \x1b[2Jcat\rdog ☃"})
        said = capsys.readouterr().err
        assert "class \\x1b[2Jcat\\rdog ☃" in said and "\x1b" not in said and "\r" not in said


def test_it_is_said_that_the_coordinator_is_back(bench: Bench, tmp_path: Path) -> None:
    fake, seen, failures = bench.coordinator(rounds=1), [], [1, 1]

    def fail(call: str) -> None:
        if call == "submit" and failures:
            failures.pop()
            raise Refused("busy", status=503, kind="unavailable")

    fake.before = fail
    device = bench.device(fake, bench.keep(), watch=lambda event, **details: seen.append(event))
    device.run()
    first = seen.index("out of reach")
    assert seen[first : first + 4] == ["out of reach", "out of reach", "uploaded", "in reach again"]
    assert seen.count("in reach again") == 1


def test_a_device_waits_for_the_end_of_a_round_that_it_gave_up(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, output = bench.coordinator(rounds=1), EventOutput(False)
    told = {"round": "birds.1", "phase": "collecting", "uploads": 0, "goal": 1, "seconds_left": 40.0}
    fake.standing = lambda: told  # type: ignore[method-assign]
    polls = []

    def refuse(call: str) -> None:
        if call == "submit":
            raise Refused("no", status=422, kind="wrong_outputs")
        polls.append(call)
        if polls.count("work") == 2:
            raise Refused("none left", status=410, kind="task_finished")

    fake.before = refuse
    bench.device(fake, bench.keep(), watch=output).run()
    assert (
        "edgestill: round birds.1 given up here; waiting for its end" in capsys.readouterr().err.splitlines()
    )


def test_event_files_of_a_device_that_was_stopped(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve over the steps of all rounds, whole though the first round was made in two starts."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fake, said = FakeCoordinator(work / "c"), []

    def hear(output: EventOutput, event: str, /, **details: Any) -> None:
        said.append({"event": event, **details})
        if event == "step" and len(said) < 12 and details["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EventOutput, "__call__", hear)
    with served(fake) as (url, _):
        for code in (1, 0):
            assert main(arguments(work, url, "--log-dir", str(work / "logs"))) == code
    steps, trained = ([e for e in said if e["event"] == kind] for kind in ("step", "trained"))
    read = accumulator.EventAccumulator(str(work / "logs"), size_guidance={"scalars": 0}).Reload()
    found = read.Scalars("train/loss")
    # the second round has a teacher, so batches of both kinds of samples, and more steps
    counts = [next(e["steps"] for e in steps), steps[-1]["steps"]]
    last = 2 * counts[1] + 1
    assert [one.step for one in found] == [*range(1, counts[0] + 1), *range(last - counts[1], last)]
    assert [one.value for one in found] == [float(np.float32(step["loss"])) for step in steps]
    for when, test in (("before", "t_priv"), ("after", "t_uni")):
        values = [(one.step, one.value) for one in read.Scalars(f"round/{test}_{when}")]
        assert values == [(n, float(np.float32(e[when][test]))) for n, e in enumerate(trained, 1)]
