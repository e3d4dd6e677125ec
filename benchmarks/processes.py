"""The parent's side of a benchmark worker: start, ask, watch and end one child process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgestill.benchmarks.worker import WorkerSpec
from edgestill.runtime.machine import peak_rss_of, process_tree

REPLY_TIMEOUT_S = 600.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkerFailed(Exception):
    """An engine could not be opened or broke while stepping; the message is for people."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class WorkerProcess:
    """One engine in its own process. `started_s` is `time.monotonic()` from before the process existed.

    `command`: a worker of one's own, which answers as worker.py does.
    """

    def __init__(
        self, spec: WorkerSpec, timeout_s: float = REPLY_TIMEOUT_S, command: Sequence[str] | None = None
    ) -> None:
        self.spec = spec
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()
        self._buffer = b""
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "edgestill.benchmarks.worker", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(spec.threads),
        )
        self._cpu_s = 0.0

    def wait_ready(self) -> dict[str, Any]:
        """Returns when the engine is open, with what the worker says; raises WorkerFailed if it can't be."""
        reply = self._read()
        self._cpu_s = tree_cpu_s(self._process.pid)
        return reply

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one request and waits for its reply; raises WorkerFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reply says why, or that there is none
        reply = self._read()
        self._cpu_s = tree_cpu_s(self._process.pid)
        return reply

    def cpu_s(self) -> float:
        """Processor time of the process and its children so far."""
        return tree_cpu_s(self._process.pid)

    def idle_cpu_s(self) -> float:
        """Processor time that the process and its children used since the last reply, unasked."""
        return self.cpu_s() - self._cpu_s

    def peak_rss_bytes(self) -> int:
        """Peak resident memory of the process and its children; pages that they share count in each."""
        own = self.ask("memory")["peak_rss_bytes"]
        return own + sum(peak_rss_of(pid) or 0 for pid in process_tree(self._process.pid)[1:])

    def close(self) -> None:
        """Ends the process: by the end of its input, or by force."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                self._process.kill()
                raise WorkerFailed(f"{self.spec.engine}: no answer within {self._timeout_s:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise WorkerFailed(
                    f"{self.spec.engine}: the process ended with status "
                    f"{self._process.wait()}{self._last_words()}"
                )
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(reply["error"], reply.get("hint"))
        return reply

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "; last lines of its stderr:\n" + "\n".join(lines[-8:]) if lines else ""


def worker_environment(threads: int) -> dict[str, str]:
    """A worker's environment: thread counts for OpenMP and the BLAS libraries, bytecode as installed code has."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | dict.fromkeys(THREAD_VARIABLES, str(threads))


def tree_cpu_s(pid: int) -> float:
    """Processor time of a process and its descendants in seconds; 0 where there is no /proc."""
    total_ticks = 0
    for member in process_tree(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            total_ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        except (OSError, IndexError):
            pass
    return total_ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuUse:
    """Processor time so far in seconds over all cores: of the whole machine, of that what was not idle
    (what a hypervisor stole included), and of this process with its children, living and ended."""

    total_s: float
    busy_s: float
    own_s: float

    def share_of_others_until(self, later: CpuUse) -> float:
        """Share of the machine, 0 to 1, that others used between the two; 0 where nothing was counted."""
        others_s = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        total_s = later.total_s - self.total_s
        return min(1.0, max(0.0, others_s / total_s)) if total_s > 0 else 0.0


def read_cpu_use() -> CpuUse | None:
    """None where there is no /proc/stat."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal, proc(5); guest time is part of user time already
    ticks = [int(field) for field in line.split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    ended = os.times()
    own_s = tree_cpu_s(os.getpid()) + ended.children_user + ended.children_system
    return CpuUse(sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4]) / second, own_s)
