"""What the operator is told: warnings of what is allowed and may not be meant, complaints, and how a task stands."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import zxingcpp

from edgestill.coordinator.commands.serve import say
from edgestill.coordinator.http import address
from edgestill.coordinator.http.address import risks_of, url_of
from edgestill.coordinator.settings import Settings, place_words
from edgestill.coordinator.store.database import Store, StoreError
from edgestill.coordinator.store.place import without_secrets
from edgestill.coordinator.task.creation import make_task
from edgestill.runtime.cli import main
from edgestill.runtime.errors import UsageError
from tests.support.certificates import write_certificate
from tests.support.coordinator_commands import CREATE, make_place, run_json, serving  # noqa: F401  fixture
from tests.support.handmade_bundle import CHANNELS, SIZE, write_handmade_bundle

pytestmark = pytest.mark.contract
GLOBAL = ["--global-bundle", "two", "--test", "test.npz"]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command line says on stderr."""
    capsys.readouterr()
    assert main(list(words)) == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--exchange", "latents"], None),
        (["--transfer-count", "20"], None),
        (["--transfer-count", "21"], "--transfer-count 21: data.npz has 20 samples"),
        ([*GLOBAL, "--test-count", "99999"], "--test-count 99999: test.npz has 20 samples"),
        (GLOBAL, "the global student cannot classify"),
        ([*GLOBAL, "--transfer-labels"], None),
        ([*GLOBAL, "--transfer-labels", "--distil-alpha", "1"], "the global student cannot classify"),
        (["--clip-norm", "1"], "--clip-norm does nothing with one: export with --clip-gradients"),
        ([*GLOBAL, "--transfer-labels", "--distil-clip-norm", "1"], "--distil-clip-norm does nothing with two"),
        (["--aggregation", "krum", "--goal", "10", "--minimum", "5"], None),
        (["--aggregation", "krum", "--goal", "4", "--minimum", "4"], "raise --minimum and --goal"),
    ],
)
def test_what_may_not_be_meant_comes_with_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], warning: str | None
) -> None:
    if "--test-count" in words:
        words = [*words, "--transfer-labels"]
    error = said(capsys, *CREATE, *words)
    error = "".join(line for line in error.splitlines(True) if "is a lottery" not in line)  # of sets this small
    assert error.count("warning:") == (warning is not None)
    assert warning is None or warning in error


def test_a_task_in_which_nobody_learns_from_the_others(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_handmade_bundle(place / "labels", objective="ce")
    description = {"name": "x", "bundles": ["labels"], "transfer": "data.npz", "exchange": "logits"}
    warnings: list[str] = []
    make_task(description, digest_of, warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith("no device learns from the others: objective ce")
    warnings.clear()
    make_task(
        {**description, "bundles": ["labels", "one"], "exchange": "latents"},
        digest_of,
        warnings.append,
    )
    assert len(warnings) == 1 and warnings[0].startswith("no device with labels learns")
    warnings.clear()
    make_task({**description, "exchange": "parameters"}, digest_of, warnings.append)
    assert warnings == []
    error = said(capsys, "task", "create", "--data-dir", "fed", "--name", "x", "--bundle", "labels",
                 "--transfer", "data.npz")  # fmt: skip
    assert "warning: no device learns from the others" in error


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--clip", "foo"], "give a number or median"),
        (["--aggregation", "krum", "--goal", "3", "--minimum", "2"], "raise --minimum and --goal, or lower"),
        (["--bundle", "data.npz"], "data.npz"),
        (["--bundle", "."], "manifest.json"),
        (["--test", "wild.npz"], "label"),
        (["--data-dir", "data.npz"], "--data-dir data.npz: cannot be a folder"),
        (["--data-dir", "data.npz/fed"], "--data-dir data.npz/fed: cannot be a folder"),
    ],
)  # fmt: skip
def test_what_was_typed_wrongly_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    images = np.zeros((20, CHANNELS, SIZE, SIZE), np.uint8)
    np.savez(place / "wild.npz", x=images, y=np.arange(20))
    error = said(capsys, *CREATE, *words, code=2)
    assert complaint in error and "Traceback" not in error


def test_what_is_left_out_or_of_another_form_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = said(capsys, *[word for word in CREATE if word not in ("--transfer", "data.npz")], code=2)
    assert "no transfer set is given" in error and "--transfer" in error
    with pytest.raises(UsageError) as caught:
        make_task({"name": "x", "bundles": "one", "transfer": "data.npz"}, digest_of)
    assert caught.value.hint == 'write bundles = ["one"]'


def test_every_number_of_a_device_s_training_has_a_flag(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = run_json(capsys, *CREATE, "--logit-share", "0.25", "--checkpoint-every", "7")
    assert (task["local"]["logit_share"], task["local"]["checkpoint_every"]) == (0.25, 7)
    (place / "task.toml").write_text(
        'name = "crows"\nbundles = ["one"]\ntransfer = "data.npz"\n'
        "[local]\nlogit_share = 0.75\ncheckpoint_every = 9\n"
    )
    task = run_json(capsys, "task", "create", "--data-dir", "fed", "--file", "task.toml")
    assert (task["local"]["logit_share"], task["local"]["checkpoint_every"]) == (0.75, 9)


def test_a_task_in_words_and_how_it_stands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CREATE, *GLOBAL, "--transfer-labels", "--align", "--screen", "--clip", "median", "--rounds", "2",
                 "--goal", "1", "--deadline", "90"]) == 0  # fmt: skip
    words = capsys.readouterr().out
    assert "a round: goal 1 uploads, minimum 1, deadline 90 s" in words
    assert "aggregation: mean, aligned, screened, clip median" in words
    show = ["task", "show", "birds", "--data-dir", "fed"]
    assert main(show) == 0
    before = capsys.readouterr().out
    assert before.startswith(words) and "0 of 2 rounds completed, 0 devices\n" in before
    with serving() as (url, _):
        code = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"][0]
        assert main(["join", url, "--code", code, "--data", "test.npz", "--work-dir", "device",
                     "--ignore-conditions"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(show) == 0
    after = capsys.readouterr().out
    assert "2 of 2 rounds completed, 1 devices; round 2 is completed; the task is finished" in after
    rounds = run_json(capsys, *show)["rounds"]
    (name,) = rounds[1]["reports"]
    figures = rounds[1]["reports"][name]["after"]
    assert f"global model after round 2: T_uni {rounds[1]['metrics']['t_uni']:.3f}\n" in after
    assert "devices after round 2, on average: " in after and f"T_uni {figures['t_uni']:.3f}\n" in after
    error = said(capsys, "enrol", "--data-dir", "fed", "--task", "birds", code=2)
    assert "task birds is finished" in error and "task create" in error


def test_serve_says_that_there_are_no_tasks_yet(place: Path) -> None:
    with serving() as (_, process):
        process.terminate()
        assert "--transfer NAME_OR_PATH --data-dir fed`" in process.communicate()[1]
    assert main(CREATE) == 0
    with serving("--host", "0.0.0.0") as (url, process):
        process.terminate()
        error = process.communicate()[1]
    assert "no tasks here yet" not in error and "0.0.0.0" not in url
    assert error.count("edgestill: warning:") == 2 and "EDGESTILL_DASHBOARD_TOKEN" in error


def test_serve_in_a_folder_that_is_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = said(capsys, "serve", "--port", "0", "--data-dir", "data.npz", code=2)
    assert "--data-dir data.npz: cannot be a folder" in error


def test_a_key_that_is_none_or_another_certificate_s_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        write_certificate(f"{name}.pem", f"{name}.key")
    for certificate, key, complaint in (
        ("one.pem", "two.key", "--tls-key two.key: the private key does not belong to one.pem"),
        ("one.pem", "one.pem", "--tls-key one.pem: no private key"),
        ("one.pem", "data.npz", "--tls-key data.npz: no private key"),
        ("one.key", "one.key", "--tls-cert one.key: no certificate"),
        ("data.npz", "one.key", "--tls-cert data.npz: no certificate"),
        ("one.pem", "absent.key", "absent.key: no such file"),
    ):
        error = said(capsys, "serve", "--port", "0", "--data-dir", "fed", "--tls-cert", certificate, "--tls-key", key,
                     code=2)  # fmt: skip
        assert complaint in error and "hint:" in error


def commands_in(text: str) -> list[list[str]]:
    """The words of every command in backticks, without the name of the program."""
    return [shlex.split(found)[1:] for found in re.findall(r"`(edgestill [^`]*)`", text)]


@pytest.mark.parametrize(
    "where",
    [
        ["--data-dir", "a folder"],
        ["--database", "sqlite:///other place.db", "--blobs", "its blobs"],
        ["--config", "settings.toml"],
        ["--data-dir", "fed", "--blobs", "elsewhere"],
    ],
)
def test_the_next_step_works_as_it_is_suggested(
    place: Path, capsys: pytest.CaptureFixture[str], where: list[str]
) -> None:
    (place / "settings.toml").write_text('database = "sqlite:///c.db"\nblobs = "c"\n')
    create = ["task", "create", "--name", "birds", "--bundle", "one", "--transfer", "data.npz", *where]
    enrolment, serve = commands_in(said(capsys, *create))
    assert enrolment[0] == "enrol" and serve == ["serve", *where]
    (on_device, serve_again) = commands_in(said(capsys, *enrolment))
    assert serve_again == ["serve", *where] and on_device[0] == "join"
    assert run_json(capsys, "task", "list", *where)["tasks"][0]["name"] == "birds"
    assert not (place / "edgestill-data").exists()
    error = said(capsys, "enrol", "--task", "crows", *where, code=2)
    assert "there are: birds" in error


def test_where_there_is_no_task_the_hint_makes_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, words in enumerate((["task", "list"], ["task", "show", "x"], ["enrol", "--task", "x"])):
        Store(f"sqlite:///{index}.db").close()
        where = ["--database", f"sqlite:///{index}.db", "--blobs", "b"]
        code = 0 if words[-1] == "list" else 2
        (creation,) = commands_in(said(capsys, *words, *where, code=code))
        assert creation[-4:] == where
        typed = [{"TASK": "t", "BUNDLE": "one", "NAME_OR_PATH": "data.npz"}.get(word, word) for word in creation]
        assert main(typed) == 0, typed


def test_a_password_in_a_url_is_not_repeated() -> None:
    given = {"database": "postgresql://me:s3cr3t@db/edgestill", "blobs": "s3://bucket/blobs", "data_dir": None}
    assert place_words(given) == " --database 'postgresql://me:***@db/edgestill' --blobs s3://bucket/blobs"
    for url, shown in {
        "postgresql://me:s3/cr3t@db/x": "postgresql://me:***@db/x",
        "postgresql://db/x?password=s3cr3t&sslmode=require": "postgresql://db/x?password=***&sslmode=require",
        "postgresql+psycopg://me:s3:cr3t@db:5432/x?sslpassword=s3cr3t":
            "postgresql+psycopg://me:***@db:5432/x?sslpassword=***",
        "s3://key:s3cr3t@bucket/x": "s3://key:***@bucket/x",
        "postgresql://me:s3cr3t@db:port/x?password=s3cr3t": "postgresql://***@db:port/x",
        "sqlite:////srv/a:b@c.db": "sqlite:////srv/a:b@c.db",
        "/srv/a@b": "/srv/a@b",
    }.items():  # fmt: skip
        assert without_secrets(url) == shown
    for url in ("mysql://db/x?password=s3cr3t", "postgresql://db:port/x?password=s3cr3t"):
        with pytest.raises(StoreError) as caught:
            Store(url)
        assert "s3cr3t" not in caught.value.message


def test_what_the_whole_network_can_do_is_warned_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_certificate(place / "c.pem", place / "k.pem")
    pair = {"tls_cert": place / "c.pem", "tls_key": place / "k.pem"}
    assert risks_of(Settings(), "http://127.0.0.1:8000") == []
    clear, tls = Settings(host="0.0.0.0"), Settings(host="0.0.0.0", dashboard_token="t", **pair)
    said = risks_of(clear, url_of(clear, 8000))
    assert len(said) == 2 and "EDGESTILL_DASHBOARD_TOKEN" in said[0] and "--tls-cert" in said[1]
    assert risks_of(Settings(host="0.0.0.0", dashboard_token="t", public_url="https://e.example"), "") == []
    assert risks_of(tls, "https://127.0.0.1:8000") == []
    for days, when in (((-9, -1), "has run out"), ((3, 9), "begins later than now")):
        write_certificate(place / "old.pem", place / "old.key", days=days)
        for host in ("127.0.0.1", "0.0.0.0"):
            old = Settings(host=host, tls_cert=place / "old.pem", tls_key=place / "old.key", dashboard_token="t")
            (said,) = risks_of(old, "https://127.0.0.1:8000")
            assert f"the certificate {when}" in said
    (said,) = risks_of(tls, "https://192.0.2.7:8000")
    assert "not for 192.0.2.7" in said and "--public-url" in said


def test_the_address_is_one_that_others_reach_and_that_the_certificate_is_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "lan_addresses", lambda host: ["192.0.2.7"])
    assert url_of(Settings(host="0.0.0.0"), 8000) == "http://192.0.2.7:8000"
    assert url_of(Settings(host="0.0.0.0", public_url="https://e.example/"), 8000) == "https://e.example"
    assert url_of(Settings(host="::1"), 80) == "http://[::1]:80"
    write_certificate(place / "c.pem", place / "k.pem")  # for 127.0.0.1 alone
    tls = Settings(host="0.0.0.0", tls_cert=place / "c.pem", tls_key=place / "k.pem")
    assert url_of(tls, 8000) == "https://192.0.2.7:8000", "none fits: the first, with a warning"
    monkeypatch.setattr(address, "lan_addresses", lambda host: ["192.0.2.7", "127.0.0.1"])
    assert url_of(tls, 8000) == "https://127.0.0.1:8000"


def test_a_terminal_gets_a_code_for_the_camera(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which ZXing, another program, reads from what the terminal shows."""
    say("http://192.0.2.7:8000", False, True)
    assert "camera" not in capsys.readouterr().err, "no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    say("http://192.0.2.7:8000", False, True)
    rows = [line for line in capsys.readouterr().err.splitlines() if set(line) <= set(" █▀▄")]
    halves = {" ": (0, 0), "█": (255, 255), "▀": (255, 0), "▄": (0, 255)}  # two squares a letter
    squares = np.array([[halves[letter] for letter in row] for row in rows], np.uint8)
    picture = squares.transpose(0, 2, 1).reshape(2 * len(rows), -1).repeat(8, axis=0).repeat(8, axis=1)
    (found,) = zxingcpp.read_barcodes(picture)
    assert found.text == "http://192.0.2.7:8000"
    say("http://127.0.0.1:8000", False, False)
    assert "camera" not in capsys.readouterr().err, "a phone does not reach loopback"


def test_no_name_is_looked_up_where_an_address_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "lan_addresses", lambda _: ["192.0.2.7"])
    monkeypatch.setattr("socket.getfqdn", lambda: pytest.fail("a resolver may take long"))
    assert address.url_of(Settings(host="0.0.0.0"), 8000) == "http://192.0.2.7:8000"
