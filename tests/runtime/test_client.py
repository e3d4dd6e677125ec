"""The device's HTTP client against a real server on localhost: cut, refused, delayed, damaged."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgestill.runtime.device.address import hint_unreachable
from edgestill.runtime.device.client import (
    DamagedBlob,
    HttpCoordinator,
    Refused,
    Unreachable,
    check_url,
    retry_after_s,
)
from edgestill.runtime.errors import UsageError
from tests.support.certificates import write_certificate

BLOB = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BLOB).hexdigest()
TOKEN = "est_" + "x" * 43

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@dataclass(frozen=True)
class Request:
    path: str
    headers: Message


@contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[Request]]]:
    """Answers the n-th request with the n-th function, all further ones with the last."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append(Request(self.path, self.headers))  # one handler serves many
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answers[min(len(requests), len(answers)) - 1](self, body)

        do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", requests
    finally:
        http.shutdown()
        http.server_close()


def say(status: int, body: bytes = b"", announced: int | None = None, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler, _: bytes) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        if status != 204:
            request.send_header("Content-Length", str(len(body) if announced is None else announced))
        request.end_headers()
        request.wfile.write(body)
        if announced is not None and announced > len(body):
            request.wfile.flush()
            request.close_connection = True

    return answer


def problem(status: int, kind: str, **headers: str) -> Answer:
    body = {
        "type": f"urn:edgestill:problem:{kind}", "title": kind.title(), "status": status,
        "detail": "because", "hint": "do better",
    }  # fmt: skip
    return say(status, json.dumps(body).encode(), Content_Type="application/problem+json", **headers)


def client(url: str, slept: list[float] | None = None, **how: object) -> HttpCoordinator:
    slept = [] if slept is None else slept
    how = {"timeout_s": 5.0, "attempts": 4, **how}
    return HttpCoordinator(url, TOKEN, sleep=slept.append, random_share=lambda: 0.5, **how)


def test_a_cut_download_goes_on_where_it_ended(tmp_path: Path) -> None:
    rest = say(206, BLOB[90_000:], Content_Range=f"bytes 90000-{len(BLOB) - 1}/{len(BLOB)}")
    with server(say(200, BLOB[:90_000], announced=len(BLOB)), rest) as (url, requests):
        path = client(url).blob(DIGEST, len(BLOB), tmp_path / "b" / DIGEST)
    assert path.read_bytes() == BLOB and [p.name for p in path.parent.iterdir()] == [DIGEST]
    assert requests[0].headers["Range"] is None
    assert requests[1].headers["Range"] == "bytes=90000-"
    assert requests[1].headers["If-Range"] == f'"{DIGEST}"'
    assert requests[1].headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_download_goes_on_after_a_restart_and_a_finished_one_asks_nobody(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}.partial").write_bytes(BLOB[:1000])
    rest = say(206, BLOB[1000:], Content_Range=f"bytes 1000-{len(BLOB) - 1}/{len(BLOB)}")
    with server(rest) as (url, requests):
        client(url).blob(DIGEST, len(BLOB), tmp_path / DIGEST)
        client(url).blob(DIGEST, len(BLOB), tmp_path / DIGEST)
    assert (tmp_path / DIGEST).read_bytes() == BLOB
    assert [request.headers["Range"] for request in requests] == ["bytes=1000-"]


@pytest.mark.parametrize(
    "first",
    [
        say(200, BLOB),  # a server without ranges
        say(416),
        say(206, BLOB[7:], Content_Range=f"bytes 7-{len(BLOB) - 1}/{len(BLOB)}"),
    ],
    ids=["whole", "416", "another range"],
)
def test_answers_to_a_range_that_do_not_continue_it(tmp_path: Path, first: Answer) -> None:
    (tmp_path / f"{DIGEST}.partial").write_bytes(BLOB[:1000])
    with server(first, say(200, BLOB)) as (url, _):
        client(url).blob(DIGEST, len(BLOB), tmp_path / DIGEST)
    assert (tmp_path / DIGEST).read_bytes() == BLOB


def test_a_partial_file_that_is_damaged_or_too_long_is_fetched_anew(tmp_path: Path) -> None:
    partial = tmp_path / f"{DIGEST}.partial"
    for damaged in (BLOB[:-1] + b"!", BLOB + b"more", b"?" * 1000):
        partial.write_bytes(damaged)
        rest = say(206, BLOB[1000:], Content_Range=f"bytes 1000-{len(BLOB) - 1}/{len(BLOB)}")
        answers = (rest, say(200, BLOB)) if len(damaged) == 1000 else (say(200, BLOB),)
        with server(*answers) as (url, _):
            client(url).blob(DIGEST, len(BLOB), tmp_path / DIGEST)
        assert (tmp_path / DIGEST).read_bytes() == BLOB
        (tmp_path / DIGEST).unlink()


def test_a_blob_with_another_digest_is_refused(tmp_path: Path) -> None:
    with server(say(200, BLOB[::-1])) as (url, requests), pytest.raises(DamagedBlob, match="SHA-256"):
        client(url).blob(DIGEST, len(BLOB), tmp_path / DIGEST)
    assert len(requests) == 2 and list(tmp_path.iterdir()) == []


def test_a_blob_that_is_longer_than_announced_is_cut_off(tmp_path: Path) -> None:
    with server(say(200, BLOB)) as (url, _), pytest.raises(DamagedBlob, match="longer"):
        client(url).blob(DIGEST, 5000, tmp_path / DIGEST)
    assert all(path.stat().st_size <= 5000 for path in tmp_path.iterdir())


def test_a_blob_that_is_shorter_than_announced_is_refused_after_some_attempts(tmp_path: Path) -> None:
    with server(say(200, BLOB[:10]), say(416), say(200, b"")) as (url, _):
        with pytest.raises(DamagedBlob, match="ends before"):
            client(url).blob(DIGEST, len(BLOB), tmp_path / DIGEST)


def test_every_byte_that_arrives_counts_however_often_the_line_is_cut(tmp_path: Path) -> None:
    blob, digest = BLOB[:1000], hashlib.sha256(BLOB[:1000]).hexdigest()

    def drip(request: BaseHTTPRequestHandler, _: bytes) -> None:
        start = int((request.headers["Range"] or "bytes=0-")[6:-1])
        span = f"bytes {start}-{len(blob) - 1}/{len(blob)}"
        piece = blob[start : start + 50]
        say(206 if start else 200, piece, announced=len(blob) - start, Content_Range=span)(request, b"")

    with server(drip) as (url, requests):
        client(url, attempts=2).blob(digest, len(blob), tmp_path / digest)
    assert len(requests) == 20 and (tmp_path / digest).read_bytes() == blob


def test_a_busy_coordinator_is_asked_again_when_it_wants(tmp_path: Path) -> None:
    slept: list[float] = []
    with server(problem(503, "busy", Retry_After="7"), problem(429, "quota"), say(201)) as (url, requests):
        client(url, slept).submit("birds.1", "d-a", b"body", "zstd")
    assert slept == [pytest.approx(7.35), pytest.approx(0.75)]
    assert len(requests) == 3
    for request in requests:
        digest = base64.b64encode(hashlib.sha256(b"body").digest()).decode()
        assert request.headers["Content-Length"] == "4" and request.headers["Content-Encoding"] == "zstd"
        assert request.headers["Content-Digest"] == f"sha-256=:{digest}:"
        assert request.path == "/v1/rounds/birds.1/devices/d-a/outputs"


def test_pauses_grow_and_end() -> None:
    slept: list[float] = []
    with server(problem(503, "busy")) as (url, requests), pytest.raises(Refused) as refused:
        client(url, slept, attempts=5).assignment()
    assert len(requests) == 5 and slept == [0.375, 0.75, 1.5, 3.0]
    assert refused.value.transient


@pytest.mark.parametrize(
    ("status", "kind"), [(410, "late"), (413, "too_large"), (409, "other_digest"), (404, "no_such_round")]
)
def test_a_refusal_is_not_repeated(status: int, kind: str) -> None:
    with server(problem(status, kind)) as (url, requests), pytest.raises(Refused) as refused:
        client(url).submit("birds.1", "d-a", b"body", "identity")
    assert len(requests) == 1 and "Content-Encoding" not in requests[0].headers
    assert (refused.value.status, refused.value.kind) == (status, kind)
    assert refused.value.hint == "do better" and "because" in refused.value.message
    assert not refused.value.transient and TOKEN not in str(refused.value)


def test_an_upload_that_was_damaged_on_its_way_is_sent_again() -> None:
    with server(problem(400, "digest_mismatch"), say(200)) as (url, requests):
        client(url).submit("birds.1", "d-a", b"body", "identity")
    assert len(requests) == 2


def test_a_lost_answer_is_asked_for_again_but_a_code_is_sent_once() -> None:
    def hang_up(request: BaseHTTPRequestHandler, _: bytes) -> None:
        request.close_connection = True

    enrolled = say(201, json.dumps({"device": "d-a", "token": TOKEN, "task": "birds"}).encode())
    with server(hang_up, say(201)) as (url, requests):
        client(url).submit("birds.1", "d-a", b"body", "identity")
    assert len(requests) == 2
    with server(hang_up, enrolled) as (url, requests), pytest.raises(Unreachable):
        client(url).enrol("CODE", {})
    assert len(requests) == 1


def test_enrolment_gives_the_token_that_later_requests_carry() -> None:
    enrolled = say(201, json.dumps({"device": "d-a", "token": TOKEN, "task": "birds"}).encode())
    with server(enrolled, say(204)) as (url, requests):
        coordinator = HttpCoordinator(url, sleep=lambda seconds: None)
        assert coordinator.enrol("CODE", {"name": "pi"})["device"] == "d-a"
        coordinator.report("birds.1", "d-a", {"samples": 3})
    assert requests[0].headers["Authorization"] is None
    assert requests[1].headers["Authorization"] == f"Bearer {TOKEN}"


def test_no_work_waits_as_long_as_the_coordinator_says() -> None:
    slept: list[float] = []
    work = {"round": "birds.1"}
    with server(say(204, Retry_After="3.5"), say(200, json.dumps(work).encode())) as (url, requests):
        coordinator = client(url, slept)
        assert coordinator.work({"battery": 0.5}, 25) is None
        assert coordinator.work({"battery": 0.5}, 25) == work
    assert slept == [3.5] and requests[0].path == "/v1/work?wait_s=25"


@pytest.mark.parametrize(
    "answer",
    [say(200, b"<html>"), say(200, b"[]"), say(200, b'{"a": 1}'), say(200, b"[" * 10_000),
     say(302, Location="http://192.0.2.1/"), say(418, b"{}"), say(404, b"\xff")],
)  # fmt: skip
def test_who_is_no_coordinator_is_refused(answer: Answer) -> None:
    with server(answer) as (url, requests), pytest.raises(Refused):
        client(url).assignment()
    assert len(requests) == 1


def test_nobody_there_is_said_so() -> None:
    with server(say(200)) as (url, _):
        pass
    with pytest.raises(Unreachable, match="does not answer") as unreachable:
        client(url).assignment()
    assert "edgestill serve" in (unreachable.value.hint or "")


@pytest.mark.parametrize(
    "url", ["", "host:80", "ftp://host", "http://", "http://u:p@host", "http://host?x=1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        check_url(url)


def test_addresses_lose_their_trailing_slash() -> None:
    assert check_url("https://host:8443/prefix/") == "https://host:8443/prefix"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("-1", 0),
        ("99999", 300),
        ("nan", None),
        ("Fri, 31 Dec 1999", None),
        (None, None),
    ],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert retry_after_s({} if text is None else {"Retry-After": text}) == seconds


def test_https_where_nobody_speaks_it_hints_at_http() -> None:
    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
        place = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(Unreachable) as unreachable:
            client(f"https://{place}", attempts=1).assignment()
    assert f"try http://{place}" in (unreachable.value.hint or "")


@contextmanager
def over_tls(certificate: Path, key: Path) -> Iterator[str]:
    """The address of a server with this certificate, which answers with an assignment."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            say(200, b'{"task": {}, "student": {}}')(self, b"")

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()


@pytest.mark.contract
def test_a_certificate_of_ones_own_is_trusted_when_it_is_given(tmp_path: Path) -> None:
    write_certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    with over_tls(tmp_path / "cert.pem", tmp_path / "key.pem") as url:
        assert client(url, ca_cert=tmp_path / "cert.pem").assignment() == {"task": {}, "student": {}}
        with pytest.raises(Unreachable) as unreachable:
            client(url.replace("https:", "http:"), attempts=1).assignment()
        assert f"try {url}" in (unreachable.value.hint or "")
    with pytest.raises(UsageError, match="--ca-cert"):
        client(url, ca_cert=tmp_path / "key.pem")


@pytest.mark.contract
@pytest.mark.parametrize(
    ("certificate", "trusted", "hint"),
    [
        ({"days": (-9, -1)}, "ca", "the coordinator's certificate has run out: whoever runs it must renew it"),
        ({"days": (-9, -1)}, "ca", "or the clock is wrong: this device's clock says 20"),
        ({"days": (3, 9)}, "ca", "the coordinator's certificate begins later: this device's clock says 20"),
        ({"address": "192.0.2.7"}, "ca", "the certificate is not for 127.0.0.1: give the name or address"),
        ({}, None, "nobody whom this device trusts vouches for the certificate"),
        ({}, "other", "other.pem does not vouch for the coordinator's certificate"),
        ({"signed_by": None}, None, "made its certificate itself: give that certificate with --ca-cert"),
        ({"signed_by": None, "days": (-9, -1)}, "own", "has run out"),
        ("chain", None, "is signed by a private authority: give that authority's with --ca-cert"),
    ],
)
def test_why_a_certificate_is_not_trusted(
    tmp_path: Path, certificate: dict | str, trusted: str | None, hint: str
) -> None:
    for name in ("ca", "other"):
        write_certificate(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
    own, key = tmp_path / "own.pem", tmp_path / "own.key"
    authority = (tmp_path / "ca.pem", tmp_path / "ca.key")
    write_certificate(own, key, **{"signed_by": authority, **({} if certificate == "chain" else certificate)})
    if certificate == "chain":
        own.write_bytes(own.read_bytes() + authority[0].read_bytes())
    with over_tls(own, key) as url, pytest.raises(Unreachable) as unreachable:
        given = None if trusted is None else tmp_path / f"{trusted}.pem"
        client(url, ca_cert=given, attempts=1).assignment()
    assert hint in (unreachable.value.hint or ""), unreachable.value.message


@pytest.mark.parametrize("reason", ["Missing Authority Key Identifier", "CA cert does not include key usage extension"])
def test_what_newer_pythons_want_of_a_certificate_is_said(reason: str) -> None:
    hint = hint_unreachable("https://lab.example", f"certificate verify failed: {reason} (_ssl.c:1020)", Path("ca.pem"))
    assert "make them anew" in hint


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://[fe80::1]", "fe80::1"), ("https://[fe80::1]:8443/a", "fe80::1"), ("https://lab.example", "lab.example"),
     ("https://192.0.2.7:1/", "192.0.2.7")],
)  # fmt: skip
def test_a_certificate_of_another_host_is_told_with_the_host_that_was_asked(url: str, host: str) -> None:
    hint = hint_unreachable(url, "certificate verify failed: IP address mismatch")
    assert hint.startswith(f"the certificate is not for {host}: ") and hint.endswith(f" one for {host}")


def test_the_client_is_there_without_httpx2() -> None:
    script = (
        "import sys; sys.modules['httpx2'] = None\n"
        "from edgestill.runtime.device.client import HttpCoordinator\n"
        "from edgestill.runtime.errors import EdgestillError\n"
        "try: HttpCoordinator('http://localhost')\n"
        "except EdgestillError as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "pip install 'edgestill[device]'", done.stderr
