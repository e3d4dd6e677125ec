"""A coordinator of one task in memory, and the same over HTTP: what tests of the device's side talk to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from edgestill.runtime.device import outputs
from edgestill.runtime.device.client import Refused
from edgestill.runtime.device.local_training import Transfer
from tests.support.handmade_bundle import CHANNELS, CLASSES, LATENT, SIZE, write_handmade_bundle

TRANSFER_SAMPLES = 12
EXPECTED = {"latents": (TRANSFER_SAMPLES, LATENT)}


class FakeCoordinator:
    """Offers `rounds` rounds to one device; every upload, as it is, becomes the next round's global outputs."""

    def __init__(self, folder: Path, rounds: int = 2, deadline_s: float = 1000.0, **local: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_handmade_bundle(folder / "bundle")
        archive = Path(shutil.make_archive(str(folder / "bundle"), "zip", folder / "bundle"))
        draw = np.random.default_rng(7)
        images = draw.integers(0, 256, (TRANSFER_SAMPLES, CHANNELS, SIZE, SIZE), dtype=np.uint8)
        Transfer(images).save(folder / "transfer.safetensors")
        self.blobs: dict[str, bytes] = {}
        bundle = self.add_blob(archive.read_bytes())
        transfer = self.add_blob((folder / "transfer.safetensors").read_bytes())
        self.task = {
            "name": "birds",
            "exchange": "latents",
            "precision": "fp16",
            "transfer": {
                "blob": transfer,
                "samples": TRANSFER_SAMPLES,
                "size_bytes": len(self.blobs[transfer]),
                "labelled": False,
            },
            "latent_size": LATENT,
            "classes": CLASSES,
            "local": {"epochs": 2, "learning_rate": 0.05, "checkpoint_every": 1, **local},
        }
        self.student = {"student": "s", "bundle": bundle, "size_bytes": len(self.blobs[bundle])}
        self.rounds, self.deadline_s = rounds, deadline_s
        self.device = "d-" + "a" * 16
        self.uploads: dict[str, bytes] = {}
        self.reports: dict[str, dict] = {}
        self.info: dict = {}
        self.submissions: list[str] = []
        self.codes = {"AAAAA-BBBBB-CCCCC-DDDDD"}
        self.before: Callable[[str], None] = lambda call: None
        """Called before every request, to fail it."""
        self.after: Callable[[str], None] = lambda call: None
        """Called after every request has had its effect, to lose the answer."""

    def add_blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def enrol(self, code: str, info: dict) -> dict:
        self.before("enrol")
        if code not in self.codes:
            raise Refused("the code is used up", status=403, kind="code_refused")
        self.codes.remove(code)
        self.info = info
        return {"device": self.device, "token": "est_" + "t" * 43, "task": "birds"}

    def inform(self, info: dict) -> None:
        self.before("inform")
        self.info = info

    def assignment(self) -> dict:
        self.before("assignment")
        return {"task": self.task, "student": self.student}

    def work(self, status: dict, wait_s: float) -> dict | None:
        self.before("work")
        number = len(self.uploads) + 1
        if number > self.rounds:
            raise Refused("no rounds left", status=410, kind="task_finished")
        published = None if number == 1 else self.add_blob(self.uploads[f"birds.{number - 1}"])
        return {
            "round": f"birds.{number}",
            "number": number,
            "deadline_s": self.deadline_s,
            "global_outputs": published,
            "size_bytes": 0 if published is None else len(self.blobs[published]),
            "seed": 100 + number,
        }

    def standing(self) -> dict | None:
        number = len(self.uploads)
        if not 0 < number < self.rounds:
            return None
        return {
            "round": f"birds.{number}",
            "phase": "collecting",
            "uploads": 2,
            "goal": 3,
            "seconds_left": 240.4,
        }

    def blob(self, digest: str, size_bytes: int, target: Path) -> Path:
        self.before("blob")
        assert len(self.blobs[digest]) == size_bytes
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.blobs[digest])
        return target

    def submit(self, round_name: str, device: str, body: bytes, content_encoding: str) -> None:
        self.before("submit")
        assert device == self.device
        arrays, metadata = outputs.unpack(body, content_encoding, EXPECTED)
        assert int(metadata["samples"]) > 0
        self.submissions.append(hashlib.sha256(body).hexdigest())
        if self.uploads.setdefault(round_name, body) != body:
            raise Refused("another upload is here", status=409, kind="other_digest")
        self.after("submit")

    def report(self, round_name: str, device: str, report: dict) -> None:
        self.before("report")
        json.dumps(report, allow_nan=False)
        self.reports[round_name] = report


@contextmanager
def served(fake: FakeCoordinator) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """The fake behind HTTP on localhost: its address, and every request's line and headers."""
    seen: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        do_POST = do_PUT = do_GET

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.requestline, dict(self.headers)))
            try:
                self.route(body)
            except Refused as refused:
                problem = {
                    "type": f"urn:edgestill:problem:{refused.kind}",
                    "title": refused.kind,
                    "status": refused.status,
                    "detail": refused.message,
                }
                headers = {}
                if refused.retry_after_s is not None:
                    headers["Retry-After"] = str(refused.retry_after_s)
                self.send(refused.status, json.dumps(problem).encode(), headers)

        def route(self, body: bytes) -> None:
            path = self.path.split("?")[0]
            if path != "/v1/enrol" and self.headers["Authorization"] != "Bearer est_" + "t" * 43:
                raise Refused("who are you?", status=401, kind="unauthorised")
            if path == "/v1/enrol":
                asked = json.loads(body)
                self.send(201, json.dumps(fake.enrol(asked["code"], asked["device"])).encode())
            elif path == "/v1/info":
                fake.inform(json.loads(body))
                self.send(204, b"")
            elif path == "/v1/assignment":
                self.send(200, json.dumps(fake.assignment()).encode())
            elif path == "/v1/standing" and fake.standing() is not None:
                self.send(200, json.dumps(fake.standing()).encode())
            elif path == "/v1/work":
                work = fake.work(json.loads(body), 0)
                self.send(200 if work else 204, json.dumps(work).encode() if work else b"")
            elif found := re.fullmatch(r"/v1/blobs/([0-9a-f]{64})", path):
                fake.before("blob")
                self.send_blob(found[1])
            elif found := re.fullmatch(r"/v1/rounds/([a-z.0-9]+)/devices/([a-z0-9-]+)/outputs", path):
                digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
                assert self.headers["Content-Digest"] == f"sha-256=:{digest}:"
                fake.submit(found[1], found[2], body, self.headers.get("Content-Encoding", "identity"))
                self.send(201, b"")
            elif found := re.fullmatch(r"/v1/rounds/([a-z.0-9]+)/devices/([a-z0-9-]+)/report", path):
                fake.report(found[1], found[2], json.loads(body))
                self.send(204, b"")
            else:
                raise Refused(path, status=404, kind="not_found")

        def send_blob(self, digest: str) -> None:
            data, headers = fake.blobs[digest], {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted is None or self.headers.get("If-Range", headers["ETag"]) != headers["ETag"]:
                self.send(200, data, headers)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send(416, b"", headers)
                return
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send(206, data[start:], headers)

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def write_private_data(path: Path, samples: int = 40) -> None:
    """An .npz with a train and a test split whose classes differ in brightness."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, CLASSES, samples + 60)
    x = (draw.integers(0, 120, (len(y), SIZE, SIZE, 3)) + 40 * y[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=x[:samples], y_train=y[:samples], x_test=x[samples:], y_test=y[samples:])
