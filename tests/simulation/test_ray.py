"""`edgestill simulate --ray` on two nodes that share no folder: what a pool gives, and nothing but Ray between them."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.coordinator_backends import free_port
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE, write_handmade_bundle

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.simulation

ROOT = Path(__file__).resolve().parents[2]
# A node that finds an empty folder where the first one keeps everything.
ELSEWHERE = 'mount -t tmpfs none "$0" && exec "$@"'


def ray_words(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster whose first node, the driver's, takes no jobs, and whose second one does not see `tmp_path`."""
    unshared = ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshared, "mount -t tmpfs none /mnt"]).returncode:
        pytest.skip("hiding a folder from a process needs unshare and the right to mount")
    address = f"127.0.0.1:{free_port()}"
    # a secret of this cluster's own, whatever the machine's other clusters use
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    common = {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    port = address.rpartition(":")[2]
    head = ray_words("--head", "--port", port, "--num-cpus", "0", "--include-dashboard", "false")
    second = [*unshared, ELSEWHERE, str(tmp_path), *ray_words("--address", address, "--num-cpus", "1")]
    nodes = [subprocess.Popen(head, **common)]
    try:
        monkeypatch.setenv("RAY_ADDRESS", address)
        wait_for_node(address, 1)
        nodes.append(subprocess.Popen(second, **common))
        wait_for_node(address, 2)
        yield
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)


def wait_for_node(address: str, count: int) -> None:
    """Returns when the cluster has so many nodes; asked in a process of its own, which leaves no driver behind."""
    script = (
        "import sys, time, ray\n"
        "for _ in range(60):\n"
        "    try:\n"
        "        ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "        break\n"
        "    except ConnectionError:\n"
        "        time.sleep(1)\n"
        "while len(ray.nodes()) < int(sys.argv[2]):\n"
        "    time.sleep(0.2)\n"
    )
    subprocess.run([sys.executable, "-c", script, address, str(count)], check=True, timeout=120, cwd="/")


def test_what_a_job_needs_travels_through_ray(two_nodes: None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return random.integers(0, 256, (count, SIZE, SIZE, CHANNELS), np.uint8)

    labels = np.arange(80) % CLASSES
    np.savez(tmp_path / "data.npz", x_train=images(80), y_train=labels, x_test=images(80), y_test=labels)
    np.savez(tmp_path / "transfer.npz", x=images(20))
    write_handmade_bundle(tmp_path / "student")
    words = [
        "simulate", "--data", str(tmp_path / "data.npz"), "--transfer", str(tmp_path / "transfer.npz"),
        "--transfer-count", "16", "--bundle", str(tmp_path / "student"), "--devices", "4", "--rounds", "2",
        "--learning-rate", "0.002", "--json", "--workers", "1",
    ]  # fmt: skip
    summaries = []
    for more in ([], ["--ray"]):
        # a process of its own: Ray reads a cluster's secret once
        command = [
            sys.executable,
            "-m",
            "edgestill.runtime.cli",
            *words,
            "--work-dir",
            str(tmp_path / f"work{len(more)}"),
        ]
        ran = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert ran.returncode == 0, ran.stderr
        summary = json.loads(ran.stdout.splitlines()[-1])["summary"]
        summaries.append({name: value for name, value in summary.items() if not name.endswith("_s")})
    assert summaries[0] == summaries[1] and summaries[0]["digest"]
