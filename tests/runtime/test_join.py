"""`edgestill join` from outside: over HTTP, killed, stopped, refused."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.cli import main
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.data.shares import share_of
from edgestill.runtime.device.client import Refused
from tests.support.device_fakes import FakeCoordinator, served, write_private_data
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE

ROOT = Path(__file__).parents[2]
CODE = "AAAAA-BBBBB-CCCCC-DDDDD"


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    write_private_data(tmp_path / "d.npz")
    yield tmp_path


def arguments(work: Path, url: str, *more: str) -> list[str]:
    return [
        "join", url, "--code", CODE, "--data", str(work / "d.npz"), "--work-dir", str(work / "w"),
        "--threads", "1", "--engine", "onnxruntime", "--ignore-conditions", *more,
    ]  # fmt: skip


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def undisturbed(work: Path) -> dict[str, bytes]:
    fake = FakeCoordinator(work / "undisturbed")
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--work-dir", str(work / "u"))) == 0
    return fake.uploads


def test_a_device_takes_part_until_the_task_is_finished(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(work / "c")
    with served(fake) as (url, seen):
        assert main(arguments(work, url, "--json", "--name", "pi")) == 0
    said = events(capsys.readouterr().out)
    names = [event.get("event") for event in said]
    assert names[:2] == ["enrolled", "assigned"] and names[-2:] == ["finished", None]
    assert said[1]["samples"] == 40 and said[1]["tests"].keys() == {"t_priv", "t_uni"}
    assert said[-1]["summary"]["rounds_uploaded"] == 2
    assert [report["engine"] for report in fake.reports.values()] == ["onnxruntime"] * 2
    for report in fake.reports.values():
        assert report["peak_rss_bytes"] > 1e6 and report["step_ms"] > 0 and report["epsilon"] is None
        assert 0 <= report["before"]["t_uni"] <= 1 and 0 <= report["after"]["t_priv"] <= 1
        assert report["after"]["loss"] < report["before"]["loss"]
    assert fake.reports["birds.1"]["bytes_down"] == sum(
        len(fake.blobs[digest]) for digest in (fake.student["bundle"], fake.task["transfer"]["blob"])
    )
    identity = work / "w" / "identity.json"
    assert stat.S_IMODE(identity.stat().st_mode) == 0o600
    token = json.loads(identity.read_text())["token"]
    assert not [
        path for path in (work / "w").rglob("*.json") if path != identity and token in path.read_text()
    ]
    assert token not in json.dumps(said)
    # the device is enrolled: neither a code nor the address is needed again
    with served(fake) as (url, _):
        again = arguments(work, url)
        del again[2:4]
        assert main(again) == 0
        assert main([*again, "--once"]) == 1, "there was no round left"


def test_one_round_for_a_person(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c")
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--once", "--precision", "int8")) == 0
    assert list(fake.uploads) == ["birds.1"]
    said = capsys.readouterr()
    assert "rounds uploaded 1" in said.out and "accuracy T_priv" in said.out
    assert "enrolled as d-aaaa" in said.err and "uploaded" in said.err


def test_noise_hides_the_class_counts_unless_told_otherwise(work: Path) -> None:
    fake = FakeCoordinator(work / "c")
    noise = ["--privacy-clip", "1", "--noise-multiplier", "8"]
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--once", *noise)) == 0
        assert main(arguments(work, url, "--once", *noise, "--share-class-counts")) == 0
    first, second = fake.reports["birds.1"], fake.reports["birds.2"]
    assert "class_counts" not in first and sum(second["class_counts"]) == 40
    assert 0 < first["epsilon"] < second["epsilon"]


def test_a_share_of_the_data_and_a_held_out_part_of_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(work / "c")
    with np.load(work / "d.npz") as file:
        np.savez(work / "single.npz", x=file["x_train"], y=file["y_train"])
    form = InputSpec((CHANNELS, SIZE, SIZE), "uint8", (0.0,) * CHANNELS, (1.0,) * CHANNELS)
    private = load_splits(work / "single.npz", form, CLASSES).train
    share = share_of(private, 2, 2, 0.7, 5)
    with served(fake) as (url, _):
        given = ["--data", str(work / "single.npz"), "--share", "2/2", "--gamma", "0.7", "--seed", "5"]
        assert main(arguments(work, url, "--once", "--json", *given)) == 0
        whole = ["--data", str(work / "d.npz"), "--share", "2/2", "--gamma", "0.7", "--seed", "5"]
        assert main(arguments(work, url, "--once", "--json", *whole)) == 0
    first, second = (event for event in events(capsys.readouterr().out) if event.get("event") == "assigned")
    assert 0 < first["tests"]["t_priv"] and first["samples"] < len(share) == second["samples"]
    counts = fake.reports["birds.2"]["class_counts"]
    assert counts == np.bincount(share.labels, minlength=CLASSES).tolist()


@pytest.mark.contract
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_killed_or_stopped_it_goes_on_to_the_same_bytes(work: Path, number: int) -> None:
    fake = FakeCoordinator(work / "c")
    command = [sys.executable, "-m", "edgestill.runtime.cli"]
    with served(fake) as (url, _):
        started = subprocess.Popen(
            [*command, *arguments(work, url, "--json")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert started.stdout is not None
        steps = 0
        for line in started.stdout:
            steps += json.loads(line).get("event") == "step"
            if steps == 3:
                os.kill(started.pid, number)
                break
        _, complaint = started.communicate()
        if number == signal.SIGKILL:
            assert started.returncode == -signal.SIGKILL
        elif not fake.uploads:
            assert started.returncode == 1 and "run the same command again" in complaint
            assert "Traceback" not in complaint
        done = subprocess.run([*command, *arguments(work, url)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert fake.uploads == undisturbed(work)


def test_a_signal_between_steps_interrupts_a_long_poll(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(work / "c")
    asked = []

    def interrupt(call: str) -> None:
        if call == "work":
            asked.append(call)
            os.kill(os.getpid(), signal.SIGINT)

    fake.before = interrupt
    with served(fake) as (url, _):
        assert main(arguments(work, url)) == 1
    assert asked == ["work"]
    assert "run the same command again" in capsys.readouterr().err


def test_a_round_that_is_given_up_is_a_failure_of_once(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(work / "c")

    def late(call: str) -> None:
        if call == "submit":
            raise Refused("too late", status=410, kind="late")

    fake.before = late
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--once")) == 1
    assert "birds.1 given up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--privacy-clip", "1"], 2, "go together"),
        (["--privacy-clip", "0", "--noise-multiplier", "1"], 2, "out of range"),
        (["--gamma", "0.5"], 2, "--share"),
        (["--share", "3/2"], 2, "no device 3 among 2"),
        (["--share", "half"], 2, "not K/N"),
        (["--name", ""], 2, "1 to 80 characters"),
        (["--name", "a\tb"], 2, "1 to 80 characters"),
        pytest.param(
            ["--engine", "executorch"], 2, "no graphs for --engine executorch, only for onnxruntime",
            marks=pytest.mark.skipif(find_spec("executorch") is None, reason="else it is not installed"),
        ),
        (["--min-battery", "30"], 2, "battery"),
        (["--min-memory", "-1"], 2, "--min-memory"),
        (["--discover"], 2, "one of them"),
        (["--code", "AAAAA"], 2, "'AAAAA' is no enrolment code"),
        (["--code", "AAAAA-BBBBB-CCCCC-EEEEE"], 1, "code_refused"),
        (["--data", "nowhere.npz"], 2, "nowhere.npz"),
        (["--ca-cert", "nowhere.pem"], 2, "nowhere.pem"),
    ],
)
def test_wrong_arguments_are_named(
    work: Path, capsys: pytest.CaptureFixture[str], change: list[str], code: int, message: str
) -> None:
    fake = FakeCoordinator(work / "c")
    given = arguments(work, "", *change)
    given.remove("--ignore-conditions")
    with served(fake) as (url, _):
        given[1] = url
        assert main(given) == code
    said = capsys.readouterr().err
    assert message in said and "hint:" in said or code == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("wrong", [["--data", "nowhere"], ["--share", "5/2"], ["--test", "nowhere"]])
def test_what_is_wrong_at_home_does_not_cost_the_code(work: Path, wrong: list[str]) -> None:
    fake, given = FakeCoordinator(work / "c"), []
    fake.enrol = lambda *told: given.append(told)  # type: ignore[method-assign]
    with served(fake) as (url, _):
        assert main(arguments(work, url, *wrong)) == 2
    assert given == []


def test_folders_of_other_classes_than_the_task_are_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels are counted by the folders, so a missing one would shift all after it."""
    for name in ("crow", "robin"):
        (work / "birds" / name).mkdir(parents=True)
    image = Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8))
    image.save(work / "birds/crow/0.png")
    with served(FakeCoordinator(work / "c")) as (url, _):
        assert main(arguments(work, url, "--data", str(work / "birds"))) == 2
        assert f"has 2 classes, the task has {CLASSES}" in capsys.readouterr().err
        # too many of them shift the labels as well, though none is out of range
        for number in range(CLASSES - 1):
            (work / f"birds/a-{number}").mkdir()
        assert main(arguments(work, url, "--data", str(work / "birds"))) == 1
    assert f"birds names {CLASSES + 1} classes, the bundle has {CLASSES}: a-0, " in capsys.readouterr().err


def test_a_device_that_is_not_enrolled_needs_a_code_and_an_address(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["join", "--data", str(work / "d.npz"), "--work-dir", str(work / "w")]
    assert main(given) == 2 and "--discover" in capsys.readouterr().err
    assert main([given[0], "http://127.0.0.1:1", *given[1:]]) == 2
    assert "--code" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [{}, {"task": {}}, {"task": {"exchange": "latents"}, "student": None},
     {"task": {"exchange": "weights"}, "student": {"bundle": "0" * 64, "size_bytes": 3}},
     {"task": {"exchange": "latents"}, "student": {"bundle": "../x", "size_bytes": 3}},
     *({"task": {"exchange": "latents", "class_names": names}, "student": {"bundle": "0" * 64, "size_bytes": 3}}
       for names in ([1, 2], "abc", {"a": 1}, ["a", "a"], ["a", " "], 3))],
)  # fmt: skip
def test_an_assignment_out_of_form_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], answer: dict
) -> None:
    fake = FakeCoordinator(work / "c")
    fake.assignment = lambda: answer  # type: ignore[method-assign]
    with served(fake) as (url, _):
        assert main(arguments(work, url)) == 1
    said = capsys.readouterr().err
    assert "version" in said and "Traceback" not in said
    assert "class_names" not in answer.get("task", {}) or "the assignment is not readable" in said


def test_the_token_goes_to_no_discovered_stranger(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgestill.runtime.device import discovery

    with (
        served(FakeCoordinator(work / "c")) as (url, _),
        served(FakeCoordinator(work / "x")) as (other, heard),
    ):
        assert main(arguments(work, url, "--once")) == 0
        found = [discovery.Found("laptop", other)]
        monkeypatch.setattr(discovery, "discover", lambda *_: found)
        discovering = [word for word in arguments(work, url, "--once", "--discover") if word != url]
        assert main(discovering) == 2
        assert heard == [] and f"enrolled at {url}" in capsys.readouterr().err
        found[0] = discovery.Found("laptop", url)
        assert main(discovering) == 0


def test_a_person_is_told_what_the_device_waits_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c")
    with served(fake) as (url, _):
        assert main(arguments(work, url)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said.count("edgestill: waiting for others: 2 of 3 uploads, 4 min left") == 1
    uploads = [place for place, line in enumerate(said) if line.startswith("edgestill: uploaded")]
    assert said.index("edgestill: waiting for others: 2 of 3 uploads, 4 min left") == uploads[0] + 1


@pytest.mark.contract
def test_a_restart_says_where_it_goes_on(work: Path) -> None:
    fake = FakeCoordinator(work / "c", rounds=1, epochs=40)
    command = [sys.executable, "-m", "edgestill.runtime.cli"]
    with served(fake) as (url, _):
        started = subprocess.Popen(
            [*command, *arguments(work, url, "--json")], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert started.stdout is not None
        for line in started.stdout:
            if json.loads(line).get("step") == 5:
                started.kill()
                break
        started.communicate()
        done = subprocess.run([*command, *arguments(work, url)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"continuing round birds\.1 from step (\d+)", done.stderr)
    assert found is not None and int(found[1]) >= 4


def test_a_restart_before_the_upload_says_so(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator(work / "c", rounds=1)

    def interrupt(call: str) -> None:
        if call == "submit":
            os.kill(os.getpid(), signal.SIGINT)

    fake.before = interrupt
    with served(fake) as (url, _):
        assert main(arguments(work, url)) == 1
        fake.before = lambda call: None
        capsys.readouterr()
        assert main(arguments(work, url, "--json")) == 0
    said = events(capsys.readouterr().out)
    assert {"event": "continuing", "round": "birds.1", "phase": "uploading"} in said


def test_devices_of_one_host_have_names_of_their_own(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for folder in ("1", "2"):
        fake = FakeCoordinator(work / folder)
        enrol = fake.enrol
        fake.enrol = lambda code, info, enrol=enrol: told.append(info["name"]) or enrol(code, info)  # type: ignore
        with served(fake) as (url, _):
            assert main(arguments(work, url, "--once", "--work-dir", str(work / "w" / folder))) == 0
        assert json.loads((work / "w" / folder / "identity.json").read_text())["name"] == told[-1]
    assert len(set(told)) == 2
    assert all(name.startswith(f"{platform.node()[:75]}-") and len(name) <= 80 for name in told)


def test_an_engine_that_does_not_do_gets_a_hint_for_who_has_the_device(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(work / "c")
    with served(fake) as (url, _):
        assert main(arguments(work, url, "--once")) == 0
        capsys.readouterr()
        assert main(arguments(work, url, "--once", "--engine", "executorch")) == 2
        said = capsys.readouterr().err
        assert "only for onnxruntime" in said and "leave --engine out: onnxruntime works here" in said
        monkeypatch.setattr("edgestill.runtime.engines.onnxruntime.check", lambda: "it is broken")
        assert main(arguments(work, url, "--once")) == 1
        said += capsys.readouterr().err
    assert "onnxruntime: it is broken" in said
    assert "hint: for onnxruntime: pip install 'edgestill[onnxruntime]'" in said
    assert fake.student["bundle"][:12] not in said and "--engines" not in said
