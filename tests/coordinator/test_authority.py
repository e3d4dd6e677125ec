"""A device that knows a coordinator's authority by the fingerprint in its code needs no file, and is not deceived."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from edgestill.coordinator.service import Service
from edgestill.runtime.cli import main
from edgestill.runtime.device.authority import (
    MOST_BYTES,
    fetch_authority,
    fingerprint,
    only_certificate,
    with_fingerprint,
)
from edgestill.runtime.device.client import Unreachable
from edgestill.runtime.device.enrolment import check_code
from edgestill.runtime.errors import EdgestillError, UsageError
from tests.support.certificates import write_certificate
from tests.support.coordinator_commands import CREATE, make_place, run_json, serving  # noqa: F401  fixture
from tests.support.coordinator_site import add_task, make_site, problem_of

pytestmark = pytest.mark.contract
ONE_ROUND = ["--rounds", "1", "--goal", "1", "--minimum", "1"]


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[str, str]:
    """Two certificates as PEM."""
    for name in ("one", "two"):
        write_certificate(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
    one, two = ((tmp_path / f"{name}.pem").read_text() for name in ("one", "two"))
    return one, two


def test_a_fingerprint_is_that_of_the_certificate(certificates: tuple[str, str]) -> None:
    """The oracle is the package cryptography."""
    one, two = certificates
    digest = x509.load_pem_x509_certificate(one.encode()).fingerprint(hashes.SHA256())
    assert fingerprint(one) == base64.b32encode(digest)[:20].decode() != fingerprint(two)
    assert fingerprint(only_certificate(f"a comment\r\n{one}".replace("\n", "\r\n"))) == fingerprint(one)
    empty = "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"
    for wrong in ("", one + two, one.replace("MII", "AAA", 1), empty):
        with pytest.raises((ValueError, OSError)):
            only_certificate(wrong)


def test_a_code_may_carry_a_fingerprint(certificates: tuple[str, str]) -> None:
    code = with_fingerprint("AAAAA-BBBBB-CCCCC-DDDDD", certificates[0])
    assert [len(group) for group in code.split("-")] == [5] * 8
    assert check_code(code) == ("AAAAA-BBBBB-CCCCC-DDDDD", fingerprint(certificates[0]))
    assert check_code(f" {code.lower().replace('-', ' ')} ") == check_code(code)
    assert check_code("aaaaabbbbb-ccccc-ddddd") == ("AAAAA-BBBBB-CCCCC-DDDDD", None)
    for wrong in (code[:-1], code + "A", code.replace("A", "1")):
        with pytest.raises(UsageError, match="is no enrolment code"):
            check_code(wrong)


def test_only_the_certificate_with_the_fingerprint_is_taken(certificates: tuple[str, str]) -> None:
    one, two = certificates
    wanted, asked = fingerprint(one), []

    def fetch(answer: bytes, status: int = 200) -> str:
        def handle(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            return httpx2.Response(status, stream=httpx2.ByteStream(answer))

        return fetch_authority("https://c:1", wanted, transport=httpx2.MockTransport(handle))

    assert fetch(one.encode()) == one
    for answer in (two.encode(), b"", b"\xff", json.dumps({"type": "urn:x"}).encode(), (one + two).encode()):
        with pytest.raises(EdgestillError, match="does not have the certificate that the code names"):
            fetch(answer)
    with pytest.raises(EdgestillError, match="more than"):
        fetch(b"x" * (MOST_BYTES + 1))
    for request in asked:
        assert str(request.url) == f"https://c:1/v1/authorities/{wanted}" and request.method == "GET"
        assert "authorization" not in request.headers and not request.content
    with pytest.raises(UsageError, match="does not use TLS"):
        fetch_authority("http://c:1", wanted)

    def gone(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    with pytest.raises(Unreachable):
        fetch_authority("https://c:1", wanted, transport=httpx2.MockTransport(gone))


def test_the_coordinator_hands_out_what_its_tasks_carry(tmp_path: Path, certificates: tuple[str, str]) -> None:
    site = make_site(tmp_path)
    one, two = certificates
    add_task(site.service, tmp_path, site.bundle, name="crows", ca_cert=one)
    assert site.client.get(f"/v1/authorities/{fingerprint(one)}").text == one
    assert problem_of(site.client.get(f"/v1/authorities/{fingerprint(two)}")) == "not_found"
    assert len(site.service.issue_code("birds").replace("-", "")) == 20
    code, wanted = check_code(site.service.issue_code("crows"))
    assert wanted == fingerprint(one)
    answer = site.client.post("/v1/enrol", json={"code": code, "device": {"engines": ["onnxruntime"]}})
    assert answer.status_code == 201 and answer.json()["task"] == "crows"


def test_certificates_are_read_when_a_task_is_made_and_not_for_every_question(
    tmp_path: Path, certificates: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, (one, two) = make_site(tmp_path), certificates
    assert problem_of(site.client.get(f"/v1/authorities/{fingerprint(one)}")) == "not_found"
    add_task(site.service, tmp_path, site.bundle, name="crows", ca_cert=one)
    tasks, asked = site.service.tasks, []
    monkeypatch.setattr(site.service, "tasks", lambda: asked.append(1) or tasks())
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *_, **__: pytest.fail("it was checked already"))
    for _ in range(3):
        assert site.client.get(f"/v1/authorities/{fingerprint(one)}").text == one
        assert problem_of(site.client.get(f"/v1/authorities/{fingerprint(two)}")) == "not_found"
    assert len(asked) == 1
    # another replica's task is found, too
    other = Service(site.service.store, site.service.blobs, site.clock)
    add_task(other, tmp_path, site.bundle, name="jays", ca_cert=two)
    assert site.client.get(f"/v1/authorities/{fingerprint(two)}").text == two


def test_join_needs_no_file_and_no_one_else_gets_the_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_certificate("ca.pem", "ca.key")
    write_certificate("cert.pem", "key.pem", signed_by=(place / "ca.pem", place / "ca.key"))
    write_certificate("strange.pem", "strange.key")
    assert main([*CREATE, *ONE_ROUND, "--ca-cert", "key.pem"]) == 2
    assert "not one certificate" in capsys.readouterr().err
    assert main([*CREATE, *ONE_ROUND, "--ca-cert", "ca.pem"]) == 0
    (code,) = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"]
    join = ["join", "--code", code, "--data", "test.npz", "--work-dir", "device", "--once", "--ignore-conditions"]
    with serving("--tls-cert", "strange.pem", "--tls-key", "strange.key") as (url, _):
        # a stranger can hand out the right certificate, and has not its key
        assert main([*join, url]) == 1
        assert "CERTIFICATE" in capsys.readouterr().err.upper()
    with serving("--tls-cert", "cert.pem", "--tls-key", "key.pem") as (url, _):
        wrong = code[:-1] + ("A" if code[-1] != "A" else "B")
        assert main([*join[:2], wrong, *join[3:], url]) == 1
        assert "does not have the certificate that the code names: nothing was sent" in capsys.readouterr().err
        assert main([*join, url.replace("https", "http")]) == 2
        assert "does not use TLS" in capsys.readouterr().err
        assert run_json(capsys, "task", "show", "birds", "--data-dir", "fed")["devices"] == []
        assert main([*join, url]) == 0, "the code was not used up"
        assert (place / "device/authority.pem").read_text() == (place / "ca.pem").read_text()
        shown = run_json(capsys, "task", "show", "birds", "--data-dir", "fed")
        assert len(shown["devices"]) == 1 and len(shown["rounds"][0]["accepted"]) == 1
        # later starts trust the same, without code and file
        assert main([word for word in join if word not in ("--code", code)]) == 1
        assert "the task has no rounds left" in capsys.readouterr().err
