"""`edgestill serve`, `task` and `enrol` from outside."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import httpx2
import pytest

from edgestill.coordinator.task.creation import make_task
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.writer import zip_bundle
from edgestill.runtime.cli import main
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.errors import UsageError
from tests.support.certificates import write_certificate
from tests.support.coordinator_commands import CREATE, make_place, run_json, serving  # noqa: F401  fixture
from tests.support.coordinator_site import INFO, problem_of
from tests.support.handmade_bundle import CLASSES, LATENT, write_handmade_bundle

pytestmark = pytest.mark.contract


def test_from_a_task_to_a_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--bundle",
        "two",
        "--transfer-count",
        "8",
        "--test",
        "data.npz",
        "--rounds",
        "3",
        "--alpha",
        "0.25",
    ]
    task = run_json(capsys, *CREATE, *options, "--aggregation", "median", "--no-align")
    assert (task["name"], task["rounds"], task["latent_size"], task["classes"]) == (
        "birds",
        3,
        LATENT,
        CLASSES,
    )
    assert "--class-names says it" in task.pop("notices")[0]["text"] and task["class_names"] == []
    assert task["transfer"]["samples"] == 8 and not task["transfer"]["labelled"] and task["test"]["labelled"]
    assert task["local"]["alpha"] == 0.25 and task["aggregation"]["rule"] == "median"
    assert len(task["students"]) == 2 and task["mode"] == "consensus"

    codes = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds", "--count", "3")["codes"]
    assert len(set(codes)) == 3 and all(len(code) == 23 for code in codes)
    assert main(["enrol", "--data-dir", "fed", "--task", "birds"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split()) == 1 and "edgestill join" in printed.err

    (row,) = run_json(capsys, "task", "list", "--data-dir", "fed")["tasks"]
    assert row["name"] == "birds" and row["completed"] == 0
    shown = run_json(capsys, "task", "show", "birds", "--data-dir", "fed")
    assert shown["task"] == task and shown["devices"] == []
    for words in (["task", "list"], ["task", "show", "birds"]):
        assert main([*words, "--data-dir", "fed"]) == 0
        assert "birds" in capsys.readouterr().out


@pytest.mark.parametrize("clip", [[], ["--clip", "median"]])
def test_a_task_that_one_device_decides_comes_with_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str], clip: list[str]
) -> None:
    assert main([*CREATE, "--exchange", "parameters", *clip, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["exchange"] == "parameters"
    assert ("warning: the mean of parameters without clip" in printed.err) == (not clip)


def test_a_task_from_a_file_with_flags_over_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "deep").mkdir()
    (place / "one").rename(place / "deep/one")
    (place / "deep/task.toml").write_text(
        'name = "birds"\nbundles = ["one"]\nglobal_bundle = "one"\ntransfer = "data.npz"\ntransfer_labels = true\n'
        'rounds = 7\ngoal = 5\n[aggregation]\nrule = "class_mean"\n[distil]\ndeadline_s = 9\n'
    )
    words = [
        "task",
        "create",
        "--data-dir",
        "fed",
        "--file",
        "deep/task.toml",
        "--rounds",
        "2",
        "--distil-alpha",
        "0.5",
    ]
    task = run_json(capsys, *words)
    assert (task["rounds"], task["goal"], task["mode"]) == (2, 5, "global")
    given = {name: value for name, value in task["distil"].items() if value is not None}
    assert given == {"epochs": 8, "alpha": 0.5, "deadline_s": 9.0}
    assert task["transfer"]["labelled"] and task["aggregation"]["rule"] == "class_mean"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rounds", "0"], "rounds is 0"),
        (["--minimum", "5"], "minimum is 5"),
        (["--transfer-count", "0"], "transfer_count is 0"),
        (["--transfer", "absent"], "no data called 'absent'"),
        (["--bundle", "absent"], "absent: no such bundle"),
        (["--bundle", "one"], "students"),
        (["--mode", "global"], "global_student"),
        (["--name", "Bad_Name"], "--name Bad_Name: no task can be called that"),
        (["--aggregation", "class_mean"], "aggregation.rule"),
        (["--file", "absent.toml"], "absent.toml"),
        (["--database", "sqlite://"], "in memory"),
        (["--database", "mysql://x"], "mysql"),
    ],
)
def test_a_task_that_makes_no_sense(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main([*CREATE, *words]) in (1, 2)
    error = capsys.readouterr().err
    assert complaint in error and "hint:" in error and "Traceback" not in error
    if Path("fed/coordinator.db").exists():
        assert run_json(capsys, "task", "list", "--data-dir", "fed") == {"tasks": []}


def test_names_that_are_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CREATE) == 0
    assert main(CREATE) == 2 and "already" in capsys.readouterr().err
    assert main(["task", "show", "crows", "--data-dir", "fed"]) == 2
    assert "there are: birds" in capsys.readouterr().err
    assert main(["enrol", "--task", "crows", "--data-dir", "fed"]) == 2
    assert "crows" in (error := capsys.readouterr().err) and "hint:" in error
    for words in (["--count", "0"], ["--hours", "nan"], ["--hours", "0"]):
        assert main(["enrol", "--task", "birds", "--data-dir", "fed", *words]) == 2


def test_students_must_speak_the_same_language(place: Path) -> None:
    manifest = json.loads((place / "two/manifest.json").read_text())
    manifest["input"]["std"] = [0.5, 0.5, 0.5]  # the same form: allowed
    (place / "two/manifest.json").write_text(json.dumps(manifest))
    stored: dict[str, bytes] = {}

    def add_blob(path: Path) -> str:
        import hashlib

        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        stored[digest] = path.read_bytes()
        return digest

    description = {"name": "x", "bundles": ["one", "two"], "transfer": "data.npz", "exchange": "parameters"}
    with pytest.raises(UsageError, match="students"):
        make_task(description, add_blob)
    task = make_task(description | {"bundles": ["one"]}, add_blob)
    with Bundle.open(place / "one") as bundle:
        expected = {spec.name: spec.shape for spec in bundle.state_specs if spec.role != "slot"}
    assert dict(task.parameter_shapes) == expected
    (place / "sent.zip").write_bytes(stored[task.students[0].bundle])
    with Bundle.open(place / "sent.zip") as bundle:
        assert bundle.model_digest == task.students[0].model_digest
    (place / "sent.safetensors").write_bytes(stored[task.transfer.blob])
    assert len(Transfer.load(place / "sent.safetensors")) == task.transfer.samples == 20


@pytest.mark.parametrize("role", ["bundles", "global_bundle"])
def test_a_student_that_learns_nothing_from_the_exchange_is_refused_at_once(place: Path, role: str) -> None:
    write_handmade_bundle(place / "labels", objective="ce")
    description = {"name": "x", "bundles": ["labels"], "transfer": "data.npz", "exchange": "logits"}
    stored: list[Path] = []
    with pytest.raises(UsageError, match="objective lkd does not learn from logits"):
        make_task({**description, role: ["one"] if role == "bundles" else "one"}, stored.append)
    assert stored == []
    with pytest.raises(UsageError, match="objective ce does not learn from both"):
        make_task({**description, "exchange": "both", "global_bundle": "labels"}, stored.append)
    # a device of objective ce gives outputs and takes none
    assert make_task(description, lambda _: "0" * 64).exchange == "logits"


@pytest.mark.parametrize("fraction", [0.0, 0.999])
def test_a_batch_needs_private_and_transfer_samples(place: Path, fraction: float) -> None:
    description = {"name": "x", "bundles": ["one"], "transfer": "data.npz"}
    stored: list[Path] = []
    with pytest.raises(UsageError, match="transfer.fraction"):
        make_task({**description, "local": {"transfer_fraction": fraction}}, stored.append)
    assert stored == []


def test_a_folder_is_zipped_alike_whatever_its_clock(place: Path) -> None:
    first = zip_bundle(place / "one", place / "a.zip").read_bytes()
    for path in (place / "one").rglob("*"):
        os.utime(path, (1, 1))
    assert zip_bundle(place / "one", place / "b.zip").read_bytes() == first
    assert "manifest.json" in zipfile.ZipFile(place / "a.zip").namelist()


def test_serve_takes_a_device_and_lets_go_of_it_when_told_to_stop(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CREATE, "--rounds", "1"]) == 0
    with serving("--log-level", "debug") as (url, process), httpx2.Client(base_url=url, timeout=60) as client:
        code = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"][0]
        enrolled = client.post("/v1/enrol", json={"code": code, "device": INFO}).json()
        client.headers["Authorization"] = f"Bearer {enrolled['token']}"
        bundle = client.get("/v1/assignment").json()["student"]["bundle"]
        (place / "got.zip").write_bytes(client.get(f"/v1/blobs/{bundle}").content)
        with Bundle.open(place / "got.zip") as opened:
            assert opened.latent_size == LATENT
        work = client.post("/v1/work", params={"wait_s": 20}, json={})
        assert work.json()["round"] == "birds.1"
        assert client.get("/docs").status_code == 200 and client.get("/healthz").status_code == 200

        second = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"][0]
        run = [client.post("/v1/enrol", json={"code": second, "device": INFO}).json() for _ in range(1)]
        client.headers["Authorization"] = f"Bearer {run[0]['token']}"
        answers: list[int] = []

        def wait() -> None:
            # the round takes one more device or none: either way the answer comes before the 20 s are over
            answers.append(client.post("/v1/work", params={"wait_s": 20}, json={}).status_code)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) in (0, -signal.SIGTERM)
        waiting.join(timeout=15)
        assert answers in ([204], [200])
        log = process.stderr.read()
        for secret in (code, second, enrolled["token"], run[0]["token"]):
            assert secret not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_serve_ends_orderly(place: Path, number: signal.Signals) -> None:
    with serving() as (_, process):
        process.send_signal(number)
        assert process.wait(timeout=15) in (0, 1, -number)
        assert process.stderr is not None and "Finished server process" in (log := process.stderr.read()), log


def test_serve_speaks_tls_and_a_device_joins_over_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_certificate("cert.pem", "key.pem")
    import ssl

    with serving("--tls-cert", "cert.pem", "--tls-key", "key.pem") as (url, _):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile="cert.pem")
        with httpx2.Client(base_url=url, verify=context) as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            assert problem_of(client.get("/v1/assignment")) == "unauthorised"

        # the device keeps the samples that are not in the transfer set
        create = [*CREATE, "--transfer-count", "8", "--rounds", "1", "--goal", "1", "--minimum", "1"]
        assert main(create) == 0
        code = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"][0]
        join = ["join", url, "--code", code, "--data", "data.npz", "--work-dir", "device", "--once",
                "--ignore-conditions"]  # fmt: skip
        # nobody vouches for the certificate: nothing is sent, not even the code
        assert main(join) == 1
        refused = capsys.readouterr().err
        assert "CERTIFICATE" in refused and "--ca-cert" in refused
        assert main([*join, "--ca-cert", "cert.pem"]) == 0
        shown = run_json(capsys, "task", "show", "birds", "--data-dir", "fed")
        assert len(shown["devices"]) == 1 and len(shown["rounds"][0]["accepted"]) == 1


def test_serve_says_why_it_cannot(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--data-dir", "fed", "--port", port]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in error and "--port" in error
    assert main(["serve", "--tls-cert", "absent", "--tls-key", "absent"]) == 2
    assert main(["serve", "--mdns", "--data-dir", "fed", "--port", "0"]) == 2
    assert "--host 0.0.0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place_words", "named"),
    [(["--data-dir", "fde"], "in fde"), (["--database", "sqlite:///fde.db"], "in sqlite:///fde.db")],
)
def test_a_mistyped_place_does_not_become_an_empty_coordinator(
    place: Path, capsys: pytest.CaptureFixture[str], place_words: list[str], named: str
) -> None:
    before = sorted(place.iterdir())
    for words in (["enrol", "--task", "birds"], ["task", "list"], ["task", "show", "birds"]):
        assert main([*words, *place_words]) == 2
        error = capsys.readouterr().err
        assert named in error and "edgestill serve" in error
    assert sorted(place.iterdir()) == before
