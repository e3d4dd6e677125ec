"""The coordinator as a device sees it: a protocol, and HTTP on top of httpx2.

Source: docs/federation.md; RFC 9110 (Range, If-Range, Retry-After), RFC 9457 (problem details),
RFC 9530 (Content-Digest).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from edgestill.runtime.device.address import check_url, hint_unreachable, tls_context
from edgestill.runtime.errors import EdgestillError, UsageError
from edgestill.runtime.files import sha256_of_file, sync

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

_MAX_PROBLEM_BYTES = 64 * 2**10
_MAX_ANSWER_BYTES = 4 * 2**20
_MAX_RETRY_AFTER_S = 300.0
_BLOCK_BYTES = 64 * 2**10


class Refused(EdgestillError):
    """The coordinator's answer is no: `kind` as in its catalog, e.g. `late`; `status` 0 where nobody says."""

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        status: int = 0,
        kind: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.kind = kind
        self.retry_after_s = retry_after_s

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in TRANSIENT


class Unreachable(EdgestillError):
    """The coordinator did not answer, however often it was asked."""


class DamagedBlob(EdgestillError):
    """A download that is not the blob that was asked for."""


class Coordinator(Protocol):
    """What a device asks of a coordinator; JSON values are those of docs/federation.md.

    Errors of every method: Refused, or Unreachable.
    """

    def enrol(self, code: str, info: Mapping[str, Any]) -> dict[str, Any]:
        """`{"device", "token", "task"}` for a one-time code; later calls carry the token."""

    def assignment(self) -> dict[str, Any]:
        """`{"task", "student"}`: what the device takes part in, and with which bundle."""

    def work(self, status: Mapping[str, Any], wait_s: float) -> dict[str, Any] | None:
        """WORK when the device is selected for a round; None after at most about `wait_s` without any."""

    def standing(self) -> dict[str, Any] | None:
        """STANDING of the task's present round; None where the coordinator does not say."""

    def blob(self, digest: str, size_bytes: int, target: Path) -> Path:
        """Puts a blob at `target`, going on with a partial download, and checks it. Errors: DamagedBlob."""

    def submit(self, round_name: str, device: str, body: bytes, content_encoding: str) -> None:
        """Uploads outputs; sending the same bytes again is no error."""

    def report(self, round_name: str, device: str, report: Mapping[str, Any]) -> None:
        """Sends what the device measured; the last report of a round counts."""


class HttpCoordinator:
    """A `Coordinator` behind a URL. Requests are repeated with growing pauses; none is lost silently.

    `transport` and `random_share` (0 … 1) are given by tests; `sleep` by whoever wants to end a pause early.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        ca_cert: Path | None = None,
        timeout_s: float = 30.0,
        attempts: int = 6,
        pause_s: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
        random_share: Callable[[], float] = random.random,
        transport: Any = None,
    ) -> None:
        self._httpx = import_httpx2()
        self.url = check_url(url)
        self._ca_cert = ca_cert
        self._timeout_s, self._attempts, self._pause_s = timeout_s, attempts, pause_s
        self._sleep, self._random_share = sleep, random_share
        self._client = self._httpx.Client(
            base_url=self.url,
            timeout=timeout_s,
            verify=tls_context(ca_cert),
            transport=transport,
            headers={"User-Agent": "edgestill-device", "Accept-Encoding": "identity"},
            # a redirect could carry the token to a stranger
            follow_redirects=False,
        )
        self.use_token(token)

    def use_token(self, token: str | None) -> None:
        """Sends the token with every request from now on."""
        self._client.headers.pop("Authorization", None)
        if token is not None:
            self._client.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        self._client.close()

    def enrol(self, code: str, info: Mapping[str, Any]) -> dict[str, Any]:
        # A code serves once: after a request that may have arrived, another one could only be refused.
        answer = self._ask("POST", "/v1/enrol", json={"code": code, "device": dict(info)}, once_sent=True)
        enrolled = _json_object(answer, ("device", "token", "task"))
        self.use_token(str(enrolled["token"]))
        return enrolled

    def inform(self, info: Mapping[str, Any]) -> None:
        """Replaces INFO of enrolment; a coordinator that is too old for it keeps what it has."""
        try:
            self._ask("PUT", "/v1/info", json=dict(info))
        except Refused as refused:
            if refused.status != 404:
                raise

    def assignment(self) -> dict[str, Any]:
        return _json_object(self._ask("GET", "/v1/assignment"), ("task", "student"))

    def work(self, status: Mapping[str, Any], wait_s: float) -> dict[str, Any] | None:
        timeout = self._httpx.Timeout(self._timeout_s, read=self._timeout_s + wait_s)
        answer = self._ask(
            "POST", "/v1/work", params={"wait_s": f"{wait_s:g}"}, json=dict(status), timeout=timeout
        )
        if answer.status_code == 204:
            self._sleep(retry_after_s(answer.headers) or 0.0)
            return None
        return _json_object(answer, ("round",))

    def standing(self) -> dict[str, Any] | None:
        try:
            answer = self._ask("GET", "/v1/standing", attempts=1)
            return _json_object(answer, ("round", "phase", "uploads", "goal", "seconds_left"))
        except (Refused, Unreachable):  # for people only: what is wrong shows when work is asked for
            return None

    def blob(self, digest: str, size_bytes: int, target: Path) -> Path:
        if target.exists() and target.stat().st_size == size_bytes and sha256_of_file(target) == digest:
            return target
        partial = target.with_name(f"{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # a damaged file may be the fault of an earlier, interrupted download
            self._download(digest, size_bytes, partial)
            if sha256_of_file(partial) == digest:
                os.replace(partial, target)
                sync(target.parent)
                return target
            partial.unlink()
        raise DamagedBlob(
            f"{self.url}: blob {digest[:12]}… arrived twice with another SHA-256",
            "whatever stands between this device and the coordinator changes what it carries: use https",
        )

    def submit(self, round_name: str, device: str, body: bytes, content_encoding: str) -> None:
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"Content-Type": "application/octet-stream", "Content-Digest": f"sha-256=:{digest}:"}
        if content_encoding != "identity":
            headers["Content-Encoding"] = content_encoding
        path = f"/v1/rounds/{round_name}/devices/{device}/outputs"
        self._ask("PUT", path, content=body, headers=headers, damaged_is_transient=True)

    def report(self, round_name: str, device: str, report: Mapping[str, Any]) -> None:
        self._ask("PUT", f"/v1/rounds/{round_name}/devices/{device}/report", json=dict(report))

    def _ask(
        self,
        method: str,
        path: str,
        *,
        once_sent: bool = False,
        damaged_is_transient: bool = False,
        attempts: int | None = None,
        **request: Any,
    ) -> Any:
        """The first answer that is not a transient failure, if it is a success. Errors: Refused, Unreachable."""
        attempts = self._attempts if attempts is None else attempts
        for attempt in range(attempts):
            last = attempt + 1 == attempts
            wanted_s = None
            try:
                with self._client.stream(method, path, **request) as answer:
                    body = _read_at_most(answer, _MAX_ANSWER_BYTES)
                    if answer.status_code < 300:
                        return _Answer(answer.status_code, answer.headers, body, f"{self.url}{path}")
                    refused = _refusal(answer.status_code, answer.headers, body, f"{method} {path}")
                damaged = damaged_is_transient and refused.kind == "digest_mismatch"
                if last or not (refused.transient or damaged):
                    raise refused
                wanted_s = refused.retry_after_s
            except self._httpx.TransportError as error:
                unsent = isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout)
                if last or (once_sent and not unsent):
                    raise self._unreachable(error) from error
            self._pause(attempt, wanted_s)
        raise UsageError(f"{attempts} attempts at a request", "give one or more")

    def _download(self, digest: str, size_bytes: int, partial: Path) -> None:
        """Fills `partial` to `size_bytes`; every attempt goes on where the one before ended."""
        failures = 0
        while (start := _size_of(partial)) != size_bytes:
            if start > size_bytes:
                partial.unlink()
                continue
            wanted_s, failure = None, None
            try:
                self._download_part(digest, size_bytes, partial, start)
            except self._httpx.TransportError as error:
                failure = self._unreachable(error)
            except Refused as refused:
                if not refused.transient:
                    raise
                wanted_s, failure = refused.retry_after_s, refused
            reached = _size_of(partial)
            if reached == size_bytes:
                return
            failures = 0 if reached > start else failures + 1
            if failures >= self._attempts:
                raise failure or DamagedBlob(
                    f"{self.url}: blob {digest[:12]}… ends before its {size_bytes} bytes",
                    "the coordinator's blob store is damaged, or a proxy cuts long answers",
                )
            self._pause(failures, wanted_s)

    def _download_part(self, digest: str, size_bytes: int, partial: Path, start: int) -> None:
        """Appends what one request brings from `start` on, perhaps not all; a useless partial file is removed."""
        headers = {"Range": f"bytes={start}-", "If-Range": f'"{digest}"'} if start else {}
        with self._client.stream("GET", f"/v1/blobs/{digest}", headers=headers) as answer:
            if answer.status_code not in (200, 206, 416):
                body = _read_at_most(answer, _MAX_PROBLEM_BYTES)
                raise _refusal(answer.status_code, answer.headers, body, f"GET /v1/blobs/{digest[:12]}…")
            continues = answer.status_code == 206
            if answer.status_code == 416 or (
                continues and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            ):
                partial.unlink(missing_ok=True)
                return
            position = start if continues else 0
            with partial.open("ab" if continues else "wb") as file:
                try:
                    # in whatever pieces they come: a piece that waits for its rest is lost with the connection
                    for piece in answer.iter_raw():
                        position += len(piece)
                        if position > size_bytes:
                            raise DamagedBlob(
                                f"{self.url}: blob {digest[:12]}… is longer than the announced {size_bytes} bytes",
                                "tell whoever runs the coordinator",
                            )
                        file.write(piece)
                finally:
                    file.flush()
                    os.fsync(file.fileno())

    def _pause(self, attempt: int, wanted_s: float | None) -> None:
        """Waits as long as the coordinator wants, else twice as long each time; never in step with the others."""
        share = self._random_share()
        if wanted_s is not None:
            self._sleep(wanted_s * (1 + 0.1 * share))
        else:
            self._sleep(min(30.0, self._pause_s * 2**attempt) * (0.5 + 0.5 * share))

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"{self.url} does not answer: {str(error) or type(error).__name__}",
            hint_unreachable(self.url, str(error), self._ca_cert),
        )


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Answer:
    def __init__(self, status_code: int, headers: Mapping[str, str], body: bytes, where: str) -> None:
        self.status_code, self.headers, self.body, self.where = status_code, headers, body, where


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header within five minutes; None for none, or for a date."""
    try:
        seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        return None
    return min(_MAX_RETRY_AFTER_S, max(0.0, seconds)) if seconds == seconds else None


def _refusal(status: int, headers: Mapping[str, str], body: bytes, where: str) -> Refused:
    problem = _parse_object(body) or {}
    text = {
        name: value
        for name in ("type", "title", "detail", "hint")
        if isinstance(value := problem.get(name), str)
    }
    kind = text.get("type", "").rpartition(":")[2]
    said = text.get("detail") or text.get("title") or "no reason given"
    hint = text.get("hint")
    if hint is None and 300 <= status < 400:
        hint = f"the coordinator is elsewhere: {headers.get('Location', 'unknown')[:200]}"
    return Refused(
        f"{where}: {status} {kind}: {said[:500]}".replace(" :", ":"),
        None if hint is None else hint[:500],
        status=status,
        kind=kind,
        retry_after_s=retry_after_s(headers),
    )


def _read_at_most(answer: Any, limit_bytes: int) -> bytes:
    chunks, size_bytes = [], 0
    for chunk in answer.iter_raw(_BLOCK_BYTES):
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise Refused(f"an answer of more than {limit_bytes} bytes", "is this address a coordinator's?")
        chunks.append(chunk)
    return b"".join(chunks)


def _parse_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_object(answer: _Answer, names: tuple[str, ...]) -> dict[str, Any]:
    value = _parse_object(answer.body)
    if value is None or any(name not in value for name in names):
        raise Refused(
            f"{answer.where}: the answer is not an object with {', '.join(names)}",
            "is this address a coordinator's, and of this version?",
        )
    return value


def import_httpx2() -> ModuleType:
    try:
        import httpx2
    except ImportError as error:
        raise EdgestillError(
            f"talking to a coordinator needs the Python package httpx2, which does not load here: {error}",
            "pip install 'edgestill[device]'",
        ) from error
    return httpx2
