"""A folder to give commands in, and a coordinator as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.runtime.cli import main
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE, write_handmade_bundle


@pytest.fixture(name="place")
def make_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two bundles, data, and other data to test on; the current one."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("EDGESTILL_")]:
        monkeypatch.delenv(name)
    write_handmade_bundle(tmp_path / "one")
    write_handmade_bundle(tmp_path / "two", seed=1)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, CHANNELS, SIZE, SIZE), np.uint8)
    labels = random.integers(0, CLASSES, 20)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    np.savez(tmp_path / "test.npz", x=random.integers(0, 256, images.shape, np.uint8), y=labels)
    return tmp_path


CREATE = [
    "task",
    "create",
    "--data-dir",
    "fed",
    "--name",
    "birds",
    "--bundle",
    "one",
    "--transfer",
    "data.npz",
]


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`edgestill serve` on a free port: its address and its process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgestill.runtime.cli", "serve", "--data-dir", "fed", "--port", "0", "--json",
         *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line)["url"], process
    finally:
        process.kill()
        process.communicate()
