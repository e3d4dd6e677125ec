"""One method of an ExecuTorch program (.pte), run on NumPy buffers through the native runner (runner.h)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edgestill.runtime.errors import EngineError
from edgestill.runtime.native.build import ensure_library

RUNNER_VERSION = 1
MAX_RANK = 8
_DTYPES = {0: np.dtype(np.uint8), 4: np.dtype(np.int64), 6: np.dtype(np.float32)}
_INPUT, _OUTPUT = 0, 1


class _Tensor(ctypes.Structure):
    """`struct edgestill_tensor` of runner.h."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("size_bytes", ctypes.c_int64),
        ("in_arena", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Slot:
    """An input or output; `copied`: the memory plan holds a place for it, so every run copies it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    copied: bool


@cache
def load_library() -> ctypes.CDLL:
    """The native runner, built first if need be. Errors: EngineError."""
    path = ensure_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path} cannot be loaded: {error}", "remove it to have it built again") from error
    library.edgestill_error.restype = ctypes.c_char_p
    library.edgestill_set_threads.argtypes = [ctypes.c_uint32]
    library.edgestill_threads.restype = ctypes.c_uint32
    library.edgestill_open.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.edgestill_open.restype = ctypes.c_void_p
    library.edgestill_close.argtypes = [ctypes.c_void_p]
    library.edgestill_close.restype = None
    library.edgestill_count.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.edgestill_count.restype = ctypes.c_size_t
    library.edgestill_describe.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.POINTER(_Tensor),
    ]
    library.edgestill_arena_bytes.argtypes = [ctypes.c_void_p]
    library.edgestill_arena_bytes.restype = ctypes.c_int64
    library.edgestill_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    found = library.edgestill_runner_version()
    if found != RUNNER_VERSION:
        raise EngineError(f"{path} is version {found} of the runner, not {RUNNER_VERSION}", f"remove {path}")
    return library


def set_threads(threads: int) -> None:
    """Threads of kernels and XNNPACK, the caller's included: one setting for all programs of a process.

    Errors: EngineError while programs are open that were opened with another number.
    """
    library = load_library()
    if not 1 <= threads <= 1024 or library.edgestill_set_threads(threads) != 0:
        reason = _reason(library) if 1 <= threads <= 1024 else "a number from 1 to 1024 is needed"
        raise EngineError(
            f"executorch cannot run with {threads} threads: {reason}",
            "close the other engine first, or use the same number of threads in one process",
        )


def threads() -> int:
    """Threads that programs of this process run with."""
    return int(load_library().edgestill_threads())


class Pointers:
    """The addresses of some buffers, in the order in which a program takes them; keeps the buffers alive."""

    def __init__(self, buffers: Sequence[np.ndarray]) -> None:
        self.buffers = tuple(buffers)
        self.addresses = (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers))


class Program:
    """A loaded method. Its file is mapped, not read, and must stay as it is until `close`."""

    def __init__(self, path: str | Path, method: str = "forward") -> None:
        """Errors: EngineError for a file that is no program, lacks the method or needs missing kernels."""
        self._library = load_library()
        self._path = Path(path)
        self._handle = self._library.edgestill_open(os.fsencode(path), method.encode())
        if not self._handle:
            raise EngineError(
                f"{path} cannot be loaded by executorch: {_reason(self._library)}",
                "export the bundle again with the executorch version that this machine has installed",
            )
        self.inputs = self._slots(_INPUT)
        self.outputs = self._slots(_OUTPUT)
        self.arena_bytes = int(self._library.edgestill_arena_bytes(self._handle))

    def run(self, inputs: Pointers, outputs: Pointers) -> None:
        """Executes once. The caller answers for shapes, dtypes and placement of the buffers (engines/program.py).

        Errors: EngineError; the outputs then hold anything.
        """
        if self._handle is None:
            raise EngineError(f"{self._path} is closed", "open the engine again")
        if self._library.edgestill_run(self._handle, inputs.addresses, outputs.addresses) != 0:
            reason = _reason(self._library)
            raise EngineError(f"{self._path} failed: {reason}", "run `edgestill verify` on the bundle")

    def close(self) -> None:
        """Frees the program; closing twice is harmless."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.edgestill_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _slots(self, side: int) -> tuple[Slot, ...]:
        slots = []
        for index in range(self._library.edgestill_count(self._handle, side)):
            tensor = _Tensor()
            self._library.edgestill_describe(self._handle, side, index, ctypes.byref(tensor))
            shape = tuple(tensor.shape[: tensor.rank])
            slots.append(Slot(shape, _DTYPES[tensor.dtype], bool(tensor.in_arena)))
        return tuple(slots)


def _reason(library: ctypes.CDLL) -> str:
    return library.edgestill_error().decode("utf-8", "replace") or "no reason given"
