"""The coordinator dies at every durable write of a task, one after another, and is started again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.coordinator_crash import Crash, Faults, check, crashing_service, play

pytestmark = pytest.mark.simulation
ROOT = Path(__file__).parents[2]


def count_writes(folder: Path) -> int:
    faults = Faults()
    folder.mkdir()
    service = crashing_service(folder, faults)
    play(service, folder)
    check(service, folder)
    return faults.writes


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_at_every_durable_write(tmp_path: Path, when: str) -> None:
    writes = count_writes(tmp_path / "whole")
    assert writes >= 14, "fewer durable writes than a task has steps"
    for number in range(1, writes + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Crash):
            play(crashing_service(folder, Faults(number, when)), folder)
        service = crashing_service(folder, Faults())
        play(service, folder)
        check(service, folder)


def test_two_failures_in_a_row(tmp_path: Path) -> None:
    writes = count_writes(tmp_path / "whole")
    for number in range(1, writes, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Crash):
            play(crashing_service(folder, Faults(number, "after")), folder)
        with pytest.raises(Crash):
            play(crashing_service(folder, Faults(1, "before")), folder)
        service = crashing_service(folder, Faults())
        play(service, folder)
        check(service, folder)


def test_kill_9_at_every_durable_write(tmp_path: Path) -> None:
    writes = count_writes(tmp_path / "whole")
    for number in range(1, writes + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        when = "after" if number % 2 else "before"
        assert start(folder, number, when).returncode == -9
        again = start(folder, 0, when)
        assert again.returncode == 0, again.stderr
        check(crashing_service(folder, Faults()), folder)


def start(folder: Path, number: int, when: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.coordinator_crash_process", str(folder), str(number), when]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
