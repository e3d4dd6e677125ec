"""`edgestill bench coordinator`: uploads a second of a real server process while it holds long polls.

The server is `edgestill serve` on SQLite and a folder of blobs, as an operator starts it. This process is the
devices: it enrols them, has one group wait in long polls, and uploads the outputs of the other group as fast as
`connections` devices at a time get their answers. The bodies differ, or the blobs would be written once only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.benchmarks.http_load import Connection, Polls, hold_polls
from edgestill.coordinator.opening import open_service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.task.task import parse_task
from edgestill.runtime.console import add_json_option
from edgestill.runtime.device.outputs import pack
from edgestill.runtime.errors import EdgestillError

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
POLL_WAIT_S = 25.0
STATUS: dict[str, Any] = {
    "battery": None, "charging": None, "temperature_c": None, "memory_free_bytes": None, "metered": None,
}  # fmt: skip


@dataclass(frozen=True)
class LoadSettings:
    """How much load: every upload comes from a device of its own."""

    uploads: int = 2000
    long_polls: int = 500
    samples: int = 1000
    latent_size: int = 128
    precision: str = "fp16"
    connections: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Enrolled:
    device: str
    token: str


def add_parser(benches: Any) -> None:
    """Adds `bench coordinator`; it sets `run`."""
    default = LoadSettings()
    parser = benches.add_parser(
        "coordinator",
        help="uploads a second of a real server, long polls held meanwhile",
        description="Starts `edgestill serve`, enrols devices, holds long polls and uploads latents, each from a "
        "device of its own, as fast as they are answered.",
    )
    for name, text in (
        ("uploads", "uploads that are timed"),
        ("long_polls", "long polls held meanwhile"),
        ("samples", "rows of an upload"),
        ("latent_size", "columns of an upload"),
        ("connections", "devices that upload at the same time"),
        ("seed", "of the latents"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name),
                            metavar="N", help=f"{text} (default %(default)s)")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default=default.precision,
                        help="default %(default)s")  # fmt: skip
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures; 0 when no request failed, else 1. Errors: EdgestillError when the server does not start."""
    names = ("uploads", "long_polls", "samples", "latent_size", "precision", "connections", "seed")
    settings = LoadSettings(**{name: getattr(arguments, name) for name in names})
    with tempfile.TemporaryDirectory(prefix="edgestill-load-") as folder:
        result = measure(settings, Path(folder))
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['uploads_per_s']:.0f} uploads a second of {result['body_bytes']} bytes, "
              f"p50 {result['p50_ms']:.1f} ms, p99 {result['p99_ms']:.1f} ms, "
              f"{result['long_polls']} long polls held, {result['errors']} errors")  # fmt: skip
    for complaint in result["complaints"]:
        _say(complaint)
    return 0 if result["errors"] == 0 else 1


def measure(settings: LoadSettings, data_dir: Path) -> dict[str, Any]:
    """The figures of one run against a server of its own in `data_dir`."""
    _say(f"making codes for {settings.uploads + settings.long_polls + 1} devices")
    codes = prepare_tasks(settings, data_dir)
    _say("starting the server")
    with running_server(data_dir) as port:
        return asyncio.run(_load(settings, port, codes))


def prepare_tasks(settings: LoadSettings, data_dir: Path) -> tuple[list[str], list[str]]:
    """A task for the uploads and one for the polls in the store that the server will open; their codes.

    The first never reaches its goal and the second selects one device, so that no aggregation is timed with the
    uploads, and every other device of the second task waits.
    """
    service = open_service(Settings(data_dir=data_dir))
    stand_in = data_dir / "stand-in"
    stand_in.write_bytes(b"devices of a load test download nothing")
    digest, size_bytes = service.add_blob(stand_in), stand_in.stat().st_size
    student = {
        "student": "none", "bundle": digest, "size_bytes": size_bytes, "engines": ["none"],
        "memory_bytes": 0, "model_digest": "0" * 64,
    }  # fmt: skip
    common = {
        "mode": "consensus",
        "students": [student],
        "transfer": {
            "blob": digest, "samples": settings.samples, "size_bytes": size_bytes, "labelled": False,
        },
        "latent_size": settings.latent_size,
        "precision": settings.precision,
        "over_selection": 1.0,
        "minimum": 1,
        "deadline_s": 3600.0,
    }  # fmt: skip
    service.create_task(parse_task({**common, "name": "uploads", "goal": settings.uploads + 1}))
    service.create_task(parse_task({**common, "name": "polls", "goal": 1}))
    codes = (
        [service.issue_code("uploads") for _ in range(settings.uploads)],
        # one more, which is selected and never uploads
        [service.issue_code("polls") for _ in range(settings.long_polls + 1)],
    )
    service.store.close()
    return codes


@contextmanager
def running_server(data_dir: Path) -> Iterator[int]:
    """The port of `edgestill serve` as a process of its own. Errors: EdgestillError when it does not come up."""
    log = data_dir / "server.log"
    command = [sys.executable, "-m", "edgestill.runtime.cli", "serve", "--data-dir", str(data_dir), "--port", "0",
               "--log-level", "warning", "--json"]  # fmt: skip
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # the server says where it listens, or ends
        if not line:
            said = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise EdgestillError(f"`edgestill serve` did not start: {' '.join(said)}")
        yield int(json.loads(line)["url"].rsplit(":", 1)[1])
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def _load(settings: LoadSettings, port: int, codes: tuple[list[str], list[str]]) -> dict[str, Any]:
    _say("enrolling the devices")
    uploaders = await _enrol(port, codes[0], settings.connections)
    waiters = await _enrol(port, codes[1], settings.connections)
    await _take_the_only_place(port, waiters.pop())
    rounds = await _ask_for_work(port, uploaders, settings.connections)
    polls = Polls()
    _say(f"holding {settings.long_polls} long polls")
    tokens = [device.token for device in waiters]
    holding = asyncio.create_task(hold_polls(HOST, port, tokens, POLL_WAIT_S, polls, STATUS))
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while polls.held < len(tokens) and not holding.done():
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # sent is not yet held
        polls.begin_count()
        started_s = time.perf_counter()
        latencies_ms, complaints = await _upload(settings, port, uploaders, rounds)
        elapsed_s = time.perf_counter() - started_s
        fewest = polls.fewest or 0
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
    complaints += polls.errors
    return {
        "uploads_per_s": len(latencies_ms) / elapsed_s,
        "p99_ms": _percentile(latencies_ms, 99),
        "long_polls": fewest,
        "errors": len(complaints),
        "p50_ms": _percentile(latencies_ms, 50),
        "uploads": len(latencies_ms),
        "connections": settings.connections,
        "body_bytes": len(make_body(settings, 0)),
        "elapsed_s": elapsed_s,
        "complaints": complaints[:5],
    }


async def _enrol(port: int, codes: Sequence[str], connections: int) -> list[Enrolled]:
    info = {"name": "load", "engines": ["none"], "memory_bytes": None, "processor": "load", "version": "load"}

    async def enrol(connection: Connection, code: str) -> Enrolled:
        answer = await connection.post("/v1/enrol", {"code": code, "device": info})
        if answer.status != 201:
            raise EdgestillError(f"enrolment was answered {answer.status}: {answer.body[:200]!r}")
        value = answer.json()
        return Enrolled(value["device"], value["token"])

    return await _spread(port, codes, connections, enrol)


async def _take_the_only_place(port: int, device: Enrolled) -> None:
    """Makes the polls' round full, so that all others wait."""
    (found,) = await _ask_for_work(port, [device], 1)
    assert found


async def _ask_for_work(port: int, devices: Sequence[Enrolled], connections: int) -> list[str]:
    async def ask(connection: Connection, device: Enrolled) -> str:
        answer = await connection.post("/v1/work?wait_s=5", STATUS, device.token)
        if answer.status != 200:
            raise EdgestillError(f"a device was not selected: {answer.status} {answer.body[:200]!r}")
        return str(answer.json()["round"])

    return await _spread(port, devices, connections, ask)


async def _upload(
    settings: LoadSettings, port: int, devices: Sequence[Enrolled], rounds: Sequence[str]
) -> tuple[list[float], list[str]]:
    """Milliseconds of every accepted upload, and what went wrong with the others."""
    latencies_ms: list[float] = []
    complaints: list[str] = []
    tenth = max(1, len(devices) // 10)
    base = make_body(settings, 0)

    async def upload(connection: Connection, index: int) -> None:
        if index % tenth == 0:
            _say(f"upload {index} of {len(devices)}")
        device = devices[index]
        body = vary(base, index)
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {
            "Authorization": f"Bearer {device.token}",
            "Content-Type": "application/octet-stream",
            "Content-Digest": f"sha-256=:{digest}:",
        }
        path = f"/v1/rounds/{rounds[index]}/devices/{device.device}/outputs"
        started_s = time.perf_counter()
        try:
            answer = await connection.request("PUT", path, headers, body)
        except (OSError, asyncio.IncompleteReadError) as error:
            complaints.append(f"an upload broke: {error!r}")
            connection.close()
            return
        if answer.status == 201:
            latencies_ms.append(1e3 * (time.perf_counter() - started_s))
        else:
            complaints.append(f"an upload was answered {answer.status}: {answer.body[:200]!r}")

    await _spread(port, range(len(devices)), settings.connections, upload)
    return latencies_ms, complaints


async def _spread(port: int, items: Sequence[Any], connections: int, work: Any) -> list[Any]:
    """Results of `work(connection, item)` in the order of the items, over that many connections."""
    results: list[Any] = [None] * len(items)
    numbered = iter(enumerate(items))

    async def serve() -> None:
        connection = Connection(HOST, port)
        try:
            for index, item in numbered:
                results[index] = await work(connection, item)
        finally:
            connection.close()

    await asyncio.gather(*(serve() for _ in range(connections)))
    return results


def make_body(settings: LoadSettings, seed: int) -> bytes:
    """An upload as a device packs it; noise, which no compression makes smaller."""
    random = np.random.default_rng([settings.seed, seed])
    latents = random.standard_normal((settings.samples, settings.latent_size), dtype=np.float32)
    return pack({"latents": latents}, settings.precision, {"samples": "100"}, compress=False).body


def vary(body: bytes, index: int) -> bytes:
    """The body with other last values: two finite numbers of 16 bits that tell `index`."""
    tail = np.array([index % 1000, index // 1000], np.float16).tobytes()
    return body[: -len(tail)] + tail


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else 0.0
