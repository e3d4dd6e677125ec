"""The process that holds training sessions: run as a script by the interpreter that has onnxruntime-training.

That build installs into the same import package as onnxruntime, so it lives in an environment of its own, with numpy
and nothing else. The parent imports this module only for the frames; onnxruntime is imported in `Worker` alone.

A frame is 4 bytes `<I` (the size) and a JSON object. Tensors are in no frame: they lie in memory that both processes
map, and a frame says where.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PREFIX = struct.Struct("<I")
MAX_FRAME_BYTES = 16 * 2**20


def frame(message: Mapping[str, object]) -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode()
    return PREFIX.pack(len(text)) + text


def read_frame(read_exactly: Callable[[int], bytearray]) -> dict[str, Any]:
    """One frame through `read_exactly(size_bytes)`. Errors: ValueError for bytes that are not a frame."""
    (size_bytes,) = PREFIX.unpack(read_exactly(PREFIX.size))
    if size_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"not a frame: {size_bytes} bytes")
    message = json.loads(read_exactly(size_bytes))
    if not isinstance(message, dict):
        raise ValueError("not a frame: no JSON object")
    return message


class Worker:
    """The sessions that were opened, and what they were bound to; it holds no state."""

    def __init__(self, threads: int, memory_fd: int) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self._onnxruntime = onnxruntime
        self._threads = threads
        self._memory_fd = memory_fd
        self._regions: list[tuple[int, np.ndarray]] = []
        self._sessions: list[Any] = []
        self._bound: list[tuple[Any, Any]] = []

    def map(self, offset: int, size_bytes: int) -> dict[str, object]:
        """Maps a further piece of the shared memory."""
        block = mmap.mmap(self._memory_fd, size_bytes, offset=offset)
        self._regions.append((offset, np.frombuffer(block, np.uint8)))
        return {}

    def open(self, path: str) -> dict[str, object]:
        """Loads a graph; the reply names it."""
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Spinning threads gain about 15 % with two threads on an idle machine, and cost a factor of 2.5 where
        # anything else runs; a device has other things to run.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions.append(
            self._onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        )
        return {"program": len(self._sessions) - 1}

    def bind(self, program: int, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, object]:
        """Binds a graph's tensors (name, dtype, shape, offset) to shared memory; the reply names the binding."""
        session = self._sessions[program]
        binding = session.io_binding()
        # A view of the array, not a copy. Outputs of our own, instead of the session's, save 23 MB of a 131 MB peak
        # (cnn3 32/64/128, batch 32).
        value = self._onnxruntime.OrtValue.ortvalue_from_numpy
        for name, *place in inputs:
            binding.bind_ortvalue_input(name, value(self._array(*place)))
        for name, *place in outputs:
            binding.bind_ortvalue_output(name, value(self._array(*place)))
        self._bound.append((session, binding))
        return {"bound": len(self._bound) - 1}

    def run(self, bound: int) -> dict[str, object]:
        session, binding = self._bound[bound]
        session.run_with_iobinding(binding)
        return {}

    def _array(self, dtype: str, shape: Sequence[int], offset: int) -> np.ndarray:
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        for start, block in self._regions:
            if start <= offset and offset + size_bytes <= start + len(block):
                return block[offset - start : offset - start + size_bytes].view(dtype).reshape(shape)
        raise ValueError(f"offset {offset} is not in the shared memory")


CALLS = ("map", "open", "bind", "run")


def answer(worker: Worker, message: dict[str, Any]) -> dict[str, object]:
    """Carries out one call and gives its reply."""
    call = message.pop("call")
    if call not in CALLS:
        raise ValueError(f"unknown call {call!r}")
    return {"ok": True, **getattr(worker, call)(**message)}


def serve(worker: Worker, read_exactly: Callable[[int], bytearray], write: Callable[[bytes], None]) -> None:
    """Answers calls until the parent closes its end; a failed call is answered with its error, and serving goes on."""
    write(frame({"ok": True}))
    while True:
        try:
            message = read_frame(read_exactly)
        except EOFError:
            return
        try:
            reply = answer(worker, message)
        except Exception as error:  # whatever failed belongs to the parent
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        write(frame(reply))


def main() -> int:
    # what ends the parent goes to the whole process group; it still wants the state, and ends us
    # by closing the pipe.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGPWR"):
        if name in signal.Signals.__members__:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    # Native code that prints must not land between frames.
    replies_fd = os.dup(1)
    os.dup2(2, 1)

    def read_exactly(size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        view, done = memoryview(data), 0
        while done < size_bytes:
            count = sys.stdin.buffer.readinto(view[done:])
            if not count:
                raise EOFError
            done += count
        return data

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(replies_fd, view) :]

    try:
        serve(Worker(int(sys.argv[1]), int(sys.argv[2])), read_exactly, write)
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
