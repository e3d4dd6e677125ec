"""A coordinator in memory with one small task, and requests against it: what the HTTP tests share."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.testclient import TestClient

from edgestill.coordinator.http.app import make_app
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.task.task import parse_task
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.device.outputs import pack

SAMPLES, LATENT_SIZE = 6, 4
INFO = {
    "name": "pi",
    "engines": ["onnxruntime"],
    "memory_bytes": 1 << 30,
    "processor": "arm",
    "version": "0.1.0",
}


@dataclass
class Clock:
    now_s: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Site:
    """A service, its app, and a client that does not run the background loop."""

    folder: Path
    service: Service
    settings: Settings
    clock: Clock
    app: FastAPI
    client: TestClient
    bundle: bytes
    digests: dict[str, str] = field(default_factory=dict)

    def enrol(self, task: str = "birds") -> Device:
        code = self.service.issue_code(task)
        answer = self.client.post("/v1/enrol", json={"code": code, "device": INFO})
        assert answer.status_code == 201, answer.text
        return Device(self, answer.json()["device"], answer.json()["token"], code)


@dataclass
class Device:
    site: Site
    name: str
    token: str
    code: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, path: str, **headers: str) -> Any:
        return self.site.client.get(path, headers={**self.headers, **headers})

    def work(self, wait_s: float = 0) -> Any:
        return self.site.client.post("/v1/work", params={"wait_s": wait_s}, json={}, headers=self.headers)

    def upload(self, round_name: str, body: bytes, device: str | None = None, **headers: str) -> Any:
        path = f"/v1/rounds/{round_name}/devices/{device or self.name}/outputs"
        sent = {**self.headers, "Content-Digest": content_digest(body), **headers}
        return self.site.client.put(path, content=body, headers=sent)


def make_site(folder: Path, database: str = "sqlite://", **settings: Any) -> Site:
    """One task `birds`: exchange latents, consensus, 2 rounds of 2 uploads, 60 s each."""
    clock = Clock()
    blobs = FileBlobs(folder / "blobs")
    service = Service(Store(database), blobs, clock)
    bundle = np.random.default_rng(0).bytes(3000)
    add_task(service, folder, bundle)
    named = {"allowed_hosts": "testserver,c", **settings}  # the names of test clients
    chosen = Settings(data_dir=folder, database=database, blobs=str(folder / "blobs"), **named)
    app = make_app(service, chosen, loop=False)
    return Site(folder, service, chosen, clock, app, TestClient(app, raise_server_exceptions=False), bundle)


def add_task(service: Service, folder: Path, bundle: bytes, name: str = "birds", **fields: Any) -> None:
    """A task whose bundle is any bytes: nothing here opens it."""
    images = np.arange(SAMPLES * 3 * 2 * 2, dtype=np.uint8).reshape(SAMPLES, 3, 2, 2)
    Transfer(images).save(folder / "transfer.safetensors")
    (folder / "bundle.zip").write_bytes(bundle)
    entry = {
        "student": "cnn3", "bundle": service.add_blob(folder / "bundle.zip"), "size_bytes": len(bundle),
        "engines": ["onnxruntime"], "memory_bytes": 1000, "model_digest": "0" * 64, "parameters": 10,
    }  # fmt: skip
    transfer = {
        "blob": service.add_blob(folder / "transfer.safetensors"), "samples": SAMPLES, "labelled": False,
        "size_bytes": (folder / "transfer.safetensors").stat().st_size,
    }  # fmt: skip
    task = {
        "name": name, "students": [entry], "transfer": transfer, "latent_size": LATENT_SIZE, "classes": 3,
        "rounds": 2, "goal": 2, "minimum": 1, "over_selection": 2.0, "deadline_s": 60.0, "precision": "fp32",
        **fields,
    }  # fmt: skip
    service.create_task(parse_task(task))


def outputs(seed: int = 0, samples: int = 10, **arrays: np.ndarray) -> bytes:
    """An upload's body."""
    latents = np.random.default_rng(seed).standard_normal((SAMPLES, LATENT_SIZE)).astype(np.float32)
    return pack(arrays or {"latents": latents}, "fp32", {"samples": str(samples)}, compress=False).body


def content_digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def problem_of(answer: Any) -> str:
    """The kind of a problem, after a look at its form."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail", "hint"} and body["hint"] and body["detail"]
    assert body["status"] == answer.status_code
    return str(body["type"]).removeprefix("urn:edgestill:problem:")


def start_round(site: Site, count: int = 2) -> list[Device]:
    devices = [site.enrol() for _ in range(count)]
    site.service.tick()
    for device in devices:
        assert device.get("/v1/assignment").status_code == 200
        assert device.work().json()["round"] == "birds.1"
    return devices


def finish_job(site: Site) -> None:
    for job in site.service.tick():
        site.service.run_job(job, site.folder)
    site.service.tick()
