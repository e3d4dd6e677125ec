"""Requests that nobody planned for: generated from the API's description, and uploads damaged byte by byte."""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.support.coordinator_site import Device, Site, make_site, outputs

GENERATED_REQUESTS, DAMAGED_UPLOADS = 14_000, 86_000  # together 100,000
_LET_IN_MEMORY_BYTES = 300 << 20
_QUIET = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A task with an open round and one selected device."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_site(Path(folder), long_poll_s=0)


@pytest.fixture(scope="module")
def device(site: Site) -> Device:
    device = site.enrol()
    site.service.tick()
    assert device.work().status_code == 200
    return device


OPERATIONS = [
    ("POST", "/v1/enrol"),
    ("PUT", "/v1/info"),
    ("GET", "/v1/assignment"),
    ("GET", "/v1/standing"),
    ("POST", "/v1/work"),
    ("GET", "/v1/blobs/{digest}"),
    ("GET", "/v1/tasks/{task}/model"),
    ("GET", "/v1/tasks/{task}/bundle"),
    ("GET", "/v1/authorities/{fingerprint}"),
    ("PUT", "/v1/rounds/{round}/devices/{device}/report"),
    ("PUT", "/v1/rounds/{round}/devices/{device}/outputs"),
]
EVERY_OPERATION = pytest.mark.parametrize(("method", "path"), OPERATIONS)


def send_generated(site: Site, device: Device, method: str, path: str, count: int) -> None:
    """Sends requests that the description allows and ones that it does not, half and half."""
    operation = schemathesis.openapi.from_asgi("/openapi.json", site.app)[path][method]
    cases = [
        operation.as_strategy(generation_mode=mode)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]

    @settings(max_examples=count, **_QUIET)
    @given(st.one_of(cases))
    def send(case: Any) -> None:
        check(case, site, device)

    send()


def check(case: Any, site: Site, device: Device) -> None:
    """No 5xx, whether or not the caller is known and the names are real; and nothing is stored."""
    stored = sorted(path.name for path in site.folder.rglob("*") if path.is_file())
    draw = random.Random(repr((case.path_parameters, case.query, str(case.body)[:99])))
    headers = device.headers if draw.random() < 0.9 else {}
    if case.path_parameters and draw.random() < 0.7:
        real = {"round": "birds.1", "device": device.name, "digest": "0" * 64, "task": "birds", "fingerprint": "0" * 64}
        case.path_parameters.update(
            {name: real[name] for name in case.path_parameters if draw.random() < 0.8}
        )
    if isinstance(case.path_parameters, dict):
        # what a client library refuses to put into a path never reaches the server
        case.path_parameters = {name: str(value) for name, value in case.path_parameters.items()}
    answer = case.call(headers=headers)
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        assert answer.headers["content-type"][0] == "application/problem+json"
    assert stored == sorted(path.name for path in site.folder.rglob("*") if path.is_file())


def test_every_operation_is_fuzzed(site: Site) -> None:
    described = {
        (method.upper(), path) for path, found in site.app.openapi()["paths"].items() for method in found
    }
    assert described - {("GET", "/healthz"), ("GET", "/metrics")} == set(OPERATIONS)


@EVERY_OPERATION
def test_generated_requests(site: Site, device: Device, method: str, path: str) -> None:
    send_generated(site, device, method, path, 40)


@pytest.mark.long
@EVERY_OPERATION
def test_many_generated_requests(site: Site, device: Device, method: str, path: str) -> None:
    send_generated(site, device, method, path, GENERATED_REQUESTS // len(OPERATIONS) + 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < _BASE_BYTES + _LET_IN_MEMORY_BYTES


def damaged(body: bytes, draw: random.Random) -> bytes:
    """A body with flipped bits, cut, doubled, or with another header size."""
    data = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        match draw.randrange(5):
            case 0:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1:
                data = data[: draw.randrange(1, len(data) + 1)]
            case 2:
                data[:8] = draw.randbytes(8)
            case 3:
                at = draw.randrange(len(data))
                data[at:at] = draw.randbytes(draw.randrange(1, 20))
            case _:
                # digits in the JSON header are shapes and offsets
                at = draw.randrange(min(len(data), 200))
                data[at] = ord(draw.choice('0123456789-[]{}":,'))
        data = data or bytearray(b"\0")
    return bytes(data)


def upload_damaged(site: Site, device: Device, count: int, seed: int) -> int:
    """How many were taken: flipping a bit of a value can leave an upload whole."""
    good, draw, taken = outputs(), random.Random(seed), 0
    for _ in range(count):
        body = damaged(good, draw)
        encoding = draw.choice(("identity", "identity", "zstd"))
        answer = device.upload("birds.1", body, **{"Content-Encoding": encoding})
        assert answer.status_code in (200, 201, 400, 409, 413, 415, 422, 429), (seed, body, answer.text)
        taken += answer.status_code == 201
    return taken


def test_damaged_uploads(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    device = site.enrol()
    site.service.tick()
    assert device.work().status_code == 200
    taken = upload_damaged(site, device, 300, seed=1)
    (opened,) = site.service.rounds("birds")
    assert len(opened.accepted) == taken <= 1


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_many_damaged_uploads(tmp_path: Path, seed: int) -> None:
    site = make_site(tmp_path)
    device = site.enrol()
    site.service.tick()
    assert device.work().status_code == 200
    assert upload_damaged(site, device, DAMAGED_UPLOADS // 20, seed) <= 1


_BASE_BYTES = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
