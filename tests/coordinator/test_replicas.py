"""Two `edgestill serve` on one PostgreSQL and one S3: devices go from one to the other as behind a balancer."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgestill.coordinator.opening import open_service
from edgestill.coordinator.settings import Settings
from tests.support.coordinator_backends import postgresql_server, postgresql_url, s3_server  # noqa: F401
from tests.support.coordinator_round import INFO, describe_task, make_upload

pytestmark = pytest.mark.contract
DEADLINE_S = 60.0


@contextmanager
def serving(words: list[str]) -> Iterator[httpx2.Client]:
    """`edgestill serve` on a free port, and a client of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgestill.runtime.cli", "serve", "--port", "0", "--json", *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, "the replica did not come up"
        with httpx2.Client(base_url=json.loads(line)["url"], timeout=DEADLINE_S) as client:
            yield client
    finally:
        process.kill()
        process.communicate()


def steps_run(replica: httpx2.Client) -> float:
    """How many workers of step 5 the replica has seen end."""
    figures = replica.get("/metrics").text
    return sum(map(float, re.findall(r"^edgestill_steps_total{.*} (.*)$", figures, re.MULTILINE)))


def test_a_round_over_two_replicas(
    postgresql_url: str,  # noqa: F811
    s3_server: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    places = ["--database", postgresql_url, "--blobs", "s3://edgestill/replicas"]
    service = open_service(Settings(database=postgresql_url, blobs="s3://edgestill/replicas"))
    task = service.create_task(
        describe_task(tmp_path, service.blobs, rounds=1, over_selection=1.0, global_student=True)
    )
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(serving([*places, "--data-dir", str(tmp_path / f"replica{number}")]))
            for number in range(2)
        ]
        devices: list[dict[str, Any]] = []
        for number in range(2):
            here, there = replicas[number], replicas[1 - number]
            enrolment = {"code": service.issue_code("birds"), "device": INFO}
            enrolled = here.post("/v1/enrol", json=enrolment)
            assert enrolled.status_code == 201, enrolled.text
            headers = {"Authorization": f"Bearer {enrolled.json()['token']}"}
            bundle = there.get("/v1/assignment", headers=headers).json()["student"]["bundle"]
            for replica in replicas:
                blob = replica.get(f"/v1/blobs/{bundle}", headers=headers)
                assert len(blob.content) == task.students[0].size_bytes
            devices.append({"name": enrolled.json()["device"], "headers": headers})
        for number, device in enumerate(devices):
            asked, uploaded_to = replicas[number], replicas[1 - number]
            work = asked.post("/v1/work", params={"wait_s": 20}, json={}, headers=device["headers"])
            assert work.json()["round"] == "birds.1"
            sent = make_upload(task, "birds.1", device["name"])
            digest = base64.b64encode(bytes.fromhex(sent.digest)).decode()
            headers = device["headers"] | {"Content-Digest": f"sha-256=:{digest}:"}
            if sent.content_encoding != "identity":
                headers["Content-Encoding"] = sent.content_encoding
            path = f"/v1/rounds/birds.1/devices/{device['name']}/outputs"
            assert uploaded_to.put(path, content=sent.body, headers=headers).status_code == 201
            # the same again, at the other one: known there too
            assert asked.put(path, content=sent.body, headers=headers).status_code == 200
        end_s = time.monotonic() + DEADLINE_S
        while not (found := service.rounds("birds")) or found[0].phase not in ("completed", "abandoned"):
            assert time.monotonic() < end_s, found
            time.sleep(0.1)
        (overview,) = found
        assert (overview.phase, overview.reason) == ("completed", None)
        assert sorted(overview.accepted) == sorted(device["name"] for device in devices)
        while sum(map(steps_run, replicas)) < 1:  # counted when the worker's process has ended
            assert time.monotonic() < end_s
            time.sleep(0.1)
        assert sum(map(steps_run, replicas)) == 1
        finished = [
            replica.post("/v1/work", json={}, headers=device["headers"]).status_code
            for replica, device in zip(replicas, devices, strict=True)
        ]
        assert finished == [410, 410]
