"""The process that holds a training session: run as a script by the interpreter that has
onnxruntime-training.

That build installs into the same import package as onnxruntime, so it lives in an environment of its own,
with numpy and nothing else. The parent imports this module only for the frames; onnxruntime is imported in
`main` alone.

A frame is 12 bytes `<IQ` (header size, body size), a JSON header, and the arrays' bytes one after another in
C order. The header holds plain values, and under "arrays" a list of [name, dtype, shape] in the order of the
bytes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

PREFIX = struct.Struct("<IQ")
MAX_HEADER_BYTES = 16 * 2**20
MAX_BODY_BYTES = 4 * 2**30
_TYPES = {
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "float16": "tensor(float16)",
    "uint8": "tensor(uint8)",
    "int8": "tensor(int8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}
"""The dtypes that a frame may hold, as onnxruntime names them."""


def frame_chunks(
    header: Mapping[str, object], arrays: Mapping[str, np.ndarray] | None = None
) -> list[bytes | memoryview]:
    """The frame as chunks to write one after another; arrays are not copied where they are contiguous."""
    specs, views = [], []
    for name, array in (arrays or {}).items():
        data = np.ascontiguousarray(array)
        specs.append([name, data.dtype.name, list(np.shape(array))])
        views.append(memoryview(data.reshape(-1)).cast("B") if data.size else b"")
    text = json.dumps({**header, "arrays": specs}, separators=(",", ":")).encode()
    return [PREFIX.pack(len(text), sum(len(view) for view in views)) + text, *views]


def read_frame(read_exactly: Callable[[int], bytearray]) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """One frame through `read_exactly(size_bytes)`. Errors: ValueError for bytes that are not a frame."""
    header_bytes, body_bytes = PREFIX.unpack(read_exactly(PREFIX.size))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise ValueError(f"not a frame: header of {header_bytes} and body of {body_bytes} bytes")
    header = json.loads(read_exactly(header_bytes))
    body = memoryview(read_exactly(body_bytes))
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for name, dtype_name, shape in header.pop("arrays"):
        if dtype_name not in _TYPES:
            raise ValueError(f"not a frame: array {name!r} has dtype {dtype_name!r}")
        dtype, count = np.dtype(dtype_name), math.prod(shape)
        arrays[name] = (
            np.frombuffer(body, dtype, count, offset).reshape(shape) if count else np.empty(shape, dtype)
        )
        offset += count * dtype.itemsize
    if offset != body_bytes:
        raise ValueError(f"not a frame: its arrays take {offset} bytes, its body has {body_bytes}")
    return header, arrays


class Worker:
    """The sessions that were opened, and the state between steps.

    State lies in two sets of arrays: a step reads one and writes the other, and they change places once it
    has succeeded. Binding the outputs to arrays of our own, instead of letting the session allocate them,
    saves 23 MB of a 131 MB peak (cnn3 32/64/128, batch 32).
    """

    def __init__(self, threads: int) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self._onnxruntime = onnxruntime
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._state: dict[str, np.ndarray] = {}
        self._spare: dict[str, np.ndarray] = {}

    @property
    def version(self) -> str:
        return str(self._onnxruntime.__version__)

    def open(self, graph: str, path: str) -> None:
        """Loads a graph under a name."""
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Spinning threads gain about 15 % with two threads on an idle machine, and cost a factor of 2.5 where
        # anything else runs; a device has other things to run.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions[graph] = self._onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        # Copies: a frame's arrays lie unaligned in one buffer.
        self._state = {name: array.copy() for name, array in arrays.items()}
        self._spare = {}

    def state(self) -> dict[str, np.ndarray]:
        """The state itself, not a copy: valid until the next run."""
        return self._state

    def run(self, graph: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a graph on the state and `arrays`; outputs named `next.*` become the state, the others are
        returned.

        A run that fails leaves the state as it was. Errors: ValueError for an input that nobody has.
        """
        session = self._sessions[graph]
        value = self._onnxruntime.OrtValue.ortvalue_from_numpy  # a view of the array, not a copy
        binding = session.io_binding()
        given = {name: array.copy() for name, array in arrays.items()}
        for spec in session.get_inputs():
            array = given.get(spec.name, self._state.get(spec.name))
            if array is None:
                raise ValueError(f"{graph} needs {spec.name}, which is neither in the state nor given")
            if (list(array.shape), _TYPES[array.dtype.name]) != (spec.shape, spec.type):
                raise ValueError(
                    f"{graph}: {spec.name} is {array.dtype}{list(array.shape)}, not {spec.type}{spec.shape}"
                )
            binding.bind_ortvalue_input(spec.name, value(array))
        written, results = {}, {}
        for spec in session.get_outputs():
            name = spec.name.removeprefix("next.")
            target, reuse = (results, {}) if name == spec.name else (written, self._spare)
            target[name] = reuse[name] if name in reuse else np.empty(spec.shape, np.float32)
            binding.bind_ortvalue_output(spec.name, value(target[name]))
        session.run_with_iobinding(binding)
        self._spare = {name: self._state[name] for name in written}
        self._state = {**self._state, **written}
        return results


def answer(
    worker: Worker, header: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> list[bytes | memoryview]:
    """Carries out one call and gives the reply's chunks."""
    call = header["call"]
    if call == "open":
        worker.open(str(header["graph"]), str(header["path"]))
        return frame_chunks({"ok": True})
    if call == "load_state":
        worker.load_state(arrays)
        return frame_chunks({"ok": True})
    if call == "state":
        return frame_chunks({"ok": True}, worker.state())
    if call == "run":
        return frame_chunks({"ok": True}, worker.run(str(header["graph"]), arrays))
    raise ValueError(f"unknown call {call!r}")


def serve(
    worker: Worker, read_exactly: Callable[[int], bytearray], write: Callable[[Iterable], None]
) -> None:
    """Answers calls until the parent closes its end; a failed call is answered with its error, and serving
    goes on."""
    write(frame_chunks({"ok": True, "version": worker.version}))
    while True:
        try:
            header, arrays = read_frame(read_exactly)
        except EOFError:
            return
        try:
            reply = answer(worker, header, arrays)
        except Exception as error:  # whatever failed belongs to the parent
            reply = frame_chunks({"ok": False, "error": f"{type(error).__name__}: {error}"})
        write(reply)


def main() -> int:
    # Ctrl-C and a service's SIGTERM go to the whole process group; the parent still wants the state, and ends us
    # by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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

    def write(chunks: Iterable[bytes | memoryview]) -> None:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[os.write(replies_fd, view) :]

    try:
        serve(Worker(int(sys.argv[1])), read_exactly, write)
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
