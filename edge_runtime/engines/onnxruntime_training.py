"""Engine `onnxruntime-training`: that build's own gradient kernels, in a subprocess of the environment that has them.

It is installed under the same import name as onnxruntime, so the two never share an environment. Tensors lie in memory
that both processes map; calls and errors cross a pipe (frames: see onnxruntime_training_worker).
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines import onnxruntime_training_worker as worker
from edgestill.runtime.engines.program import Arrays, Buffers, allocate
from edgestill.runtime.engines.registry import ENGINES
from edgestill.runtime.errors import EngineError
from edgestill.runtime.machine import threads_or_cores

NAME = "onnxruntime-training"
INTERPRETER_VARIABLE = "EDGESTILL_ORT_TRAINING_PYTHON"
ENVIRONMENT_FOLDER = ".venv-ort-training"
INSTALL_HINT = ENGINES[NAME].hint
CALL_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 5.0
_STDERR_TAIL_BYTES = 4000
# Stock onnxruntime imports as well, but has no gradient builder.
_PROBE = (
    "import numpy, onnxruntime; from onnxruntime.capi._pybind_state import GradientGraphBuilder; "
    "print(onnxruntime.__version__)"
)


def find_interpreter() -> Path:
    """The Python of the onnxruntime-training environment: the one that EDGESTILL_ORT_TRAINING_PYTHON names,
    else `.venv-ort-training` beside the running environment's folder, else in the current folder.

    Errors: EngineError where there is none.
    """
    named = os.environ.get(INTERPRETER_VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise EngineError(f"{INTERPRETER_VARIABLE} names {named}, which is no program", INSTALL_HINT)
        return Path(named)
    folders = dict.fromkeys((Path(sys.prefix).parent, Path.cwd()))
    candidates = [folder / ENVIRONMENT_FOLDER / "bin" / "python" for folder in folders]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise EngineError(
        f"no Python with onnxruntime-training in {' or '.join(map(str, candidates))}",
        INSTALL_HINT,
    )


def check() -> str | None:
    """None where the engine works, else the reason why not."""
    try:
        version()
    except EngineError as error:
        return error.message
    return None


def version() -> str:
    """The version of onnxruntime-training in its environment. Errors: EngineError where it does not work."""
    interpreter = find_interpreter()
    return _installed_version(interpreter) or _probe(interpreter)


def _installed_version(interpreter: Path) -> str | None:
    """The version by the packages' folders, where these leave no doubt: starting a Python takes a third of a
    second, and an engine is checked each time it is opened."""
    for packages in interpreter.parent.parent.glob("lib/python3*/site-packages"):
        found = [*packages.glob("onnxruntime_training-*.dist-info")]
        # Stock onnxruntime in the same environment overwrites the training build's files.
        mixed = any(packages.glob("onnxruntime-*.dist-info"))
        if len(found) == 1 and not mixed and (packages / "numpy").is_dir():
            return found[0].name.removesuffix(".dist-info").partition("-")[2]
    return None


@lru_cache
def _probe(interpreter: Path) -> str:
    """The version that an interpreter imports. Errors: EngineError where that is no training build."""
    try:
        done = subprocess.run([interpreter, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{interpreter} does not run: {error}", INSTALL_HINT) from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EngineError(f"{interpreter} has no training build of onnxruntime: {reason[0]}", INSTALL_HINT)
    return done.stdout.split()[-1]


class WorkerProcess:
    """The subprocess and its pipes; `call` is the only way to speak to it.

    Errors: EngineError from every method: the worker's own error with its type, or that it ended (with its
    exit code or signal and the end of its stderr), or that it was stopped because no answer came in time.
    After any but the first the process is gone.
    """

    def __init__(
        self, command: list[str], timeout_s: float = CALL_TIMEOUT_S, inherited: Sequence[int] = ()
    ) -> None:
        """`inherited`: file descriptors that the worker keeps."""
        self._timeout_s = timeout_s
        self._call = "start"
        self._lost: str | None = None
        self._stderr = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                pass_fds=tuple(inherited),
            )
        except OSError as error:
            self._stderr.close()
            raise EngineError(f"{NAME}: cannot start {command[0]}: {error}", INSTALL_HINT) from error
        self._write_fd, self._read_fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        # Non-blocking, so that a worker that hangs while we write is noticed as well.
        os.set_blocking(self._write_fd, False)
        try:
            self._deadline_s = time.monotonic() + timeout_s
            self._read_reply()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, name: str, **values: object) -> dict[str, Any]:
        """Sends one call and waits for its reply."""
        if self._lost:
            raise EngineError(
                f"{NAME}: the worker is gone: {self._lost}", "open the engine again and load a checkpoint"
            )
        self._call, self._deadline_s = name, time.monotonic() + self._timeout_s
        # Broken unless the reply is read to its end: an interrupted exchange leaves half a frame in a pipe.
        self._lost = f"an earlier call ({name}) was interrupted"
        try:
            self._write(memoryview(worker.frame({"call": name, **values})))
        except BrokenPipeError:
            self._fail()
        reply = self._read_reply()
        self._lost = None
        if not reply.pop("ok"):
            raise EngineError(
                f"{NAME}: {name} failed: {reply['error']}", "run `edgestill verify` on the bundle"
            )
        return reply

    def close(self) -> None:
        """Ends the process: by closing its input, and by force if it does not go."""
        self._lost = self._lost or "it was closed"
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            stream.close()

    def _read_reply(self) -> dict[str, Any]:
        try:
            return worker.read_frame(self._read_exactly)
        except EOFError:
            self._fail()
        except ValueError as error:
            self._fail(str(error))

    def _read_exactly(self, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        view, done = memoryview(data), 0
        while done < size_bytes:
            self._wait(self._read_fd, select.POLLIN)
            count = os.readv(self._read_fd, [view[done:]])
            if not count:
                raise EOFError
            done += count
        return data

    def _write(self, view: memoryview) -> None:
        while view:
            self._wait(self._write_fd, select.POLLOUT)
            view = view[os.write(self._write_fd, view) :]

    def _wait(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0 or not poll.poll(remaining_s * 1000):
            self._fail(f"no answer within {self._timeout_s:g} s, so it was stopped")

    def _fail(self, reason: str | None = None) -> NoReturn:
        if reason:
            self._process.kill()
        try:
            code = self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._lost = reason or (
            f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
        )
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_TAIL_BYTES))
        tail = self._stderr.read().decode(errors="replace").strip()
        raise EngineError(
            f"{NAME}: the worker was lost in `{self._call}`: {self._lost}" + (f"\n{tail}" if tail else ""),
            "open the engine again and load a checkpoint; signal 9 often means that memory ran out",
        )


class OnnxRuntimeTraining:
    """One worker process, and the memory that it shares with this one: one file without a name, which only grows."""

    def __init__(self, threads: int, timeout_s: float) -> None:
        self._memory_fd = os.memfd_create("edgestill")
        self._regions: list[tuple[int, int, int]] = []
        """Of each piece of the memory: its address here, its size and where in the file it starts."""
        # -I keeps this folder, whose modules are named after engines, and PYTHONPATH out of the worker's imports.
        command = [
            str(find_interpreter()), "-I", worker.__file__, str(threads), str(self._memory_fd),
        ]  # fmt: skip
        try:
            self.process = WorkerProcess(command, timeout_s, inherited=(self._memory_fd,))
        except BaseException:
            os.close(self._memory_fd)
            raise

    def allocate(self, specs: Sequence[TensorSpec]) -> Buffers:
        return allocate(specs, self._share)

    def load(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> WorkerProgram:
        program = self.process.call("open", path=str(path.resolve()))["program"]
        return WorkerProgram(self, program)

    def place(self, name: str, array: np.ndarray) -> list[object]:
        """The array as the worker finds it: name, dtype, shape and where in the shared memory."""
        address = array.ctypes.data
        for start, size_bytes, offset in self._regions:
            if start <= address and address + array.nbytes <= start + size_bytes:
                return [name, array.dtype.name, list(array.shape), offset + address - start]
        raise EngineError(f"{NAME}: {name} does not lie in shared memory", "take arrays of `allocate`")

    def close(self) -> None:
        self.process.close()
        fd, self._memory_fd = self._memory_fd, -1
        if fd >= 0:
            os.close(fd)

    def _share(self, size_bytes: int) -> np.ndarray:
        """Zeroed bytes of memory that both processes have."""
        offset = os.fstat(self._memory_fd).st_size
        size_bytes = -(-size_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._memory_fd, offset + size_bytes)
        block = np.frombuffer(mmap.mmap(self._memory_fd, size_bytes, offset=offset), np.uint8)
        self.process.call("map", offset=offset, size_bytes=size_bytes)
        self._regions.append((block.ctypes.data, size_bytes, offset))
        return block


class WorkerProgram:
    def __init__(self, runner: OnnxRuntimeTraining, program: int) -> None:
        self._runner = runner
        self._program = program

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        places = [
            [self._runner.place(name, array) for name, array in side.items()] for side in (inputs, outputs)
        ]
        call = self._runner.process.call
        bound = call("bind", program=self._program, inputs=places[0], outputs=places[1])["bound"]
        return partial(call, "run", bound=bound)

    def close(self) -> None:
        """Ends with the worker."""


def open_runner(threads: int, timeout_s: float = CALL_TIMEOUT_S) -> OnnxRuntimeTraining:
    """Starts a worker; `threads` 0 means all cores that may be used, `timeout_s` bounds every call, opening a
    graph included.

    Errors: EngineError.
    """
    return OnnxRuntimeTraining(threads_or_cores(threads), timeout_s)
