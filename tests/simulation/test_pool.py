"""Worker processes of simulations and experiments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from edgestill.simulation.pool import ONE_THREAD, worker_processes

PARENT = """
import os, time
from edgestill.simulation.pool import worker_processes
if __name__ == "__main__":
    with worker_processes(1) as executor:
        print(executor.submit(os.getpid).result(), flush=True)
        executor.submit(time.sleep, 600).result()
"""


def test_workers_compute_on_one_thread() -> None:
    with worker_processes(1) as executor:
        assert {name: executor.submit(os.getenv, name).result() for name in ONE_THREAD} == ONE_THREAD


def test_a_killed_parent_takes_its_busy_workers_along(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    worker = Path("/proc") / parent.stdout.readline().strip()
    assert worker.exists()
    time.sleep(0.2)  # the worker may have begun its long job or not: it ends all the same
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(300):
        if not worker.exists() or "\nState:\tZ" in (worker / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{worker} outlived its parent")
