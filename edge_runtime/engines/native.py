"""Engine `native`: a bundle's plans on libedgestill, which needs nothing else (docs/native.md)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines.program import ALIGNMENT_BYTES, Arrays, allocate
from edgestill.runtime.errors import EngineError
from edgestill.runtime.machine import threads_or_cores
from edgestill.runtime.native.architecture import HINT, LEVELS, library_path, machine
from edgestill.runtime.native.plan_work import HEAD_WORDS, VERSION

_Job = tuple[Callable[[int], None], threading.Lock]
_WORD = ctypes.c_int64
LIMIT_VARIABLE = "EDGESTILL_NATIVE_LEVEL"
"""3 keeps the engine to AVX2 on a processor with AVX-512: for comparisons."""


class _Run(ctypes.Structure):
    """`struct run` of library/plan.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("plan", "bases", "scratch")),
        *((name, _WORD) for name in ("threads", "arrived", "generation", "taken")),
    ]


def check() -> str | None:
    """None if the engine works on this machine, else the reason."""
    try:
        _library()
    except EngineError as error:
        return error.message
    return None


def version() -> str:
    """What plans it runs, and on which instructions. Errors: EngineError."""
    names = {3: "AVX2", 4: "AVX-512"}
    return f"plan {VERSION}, {names.get(_library().edgestill_level(), 'NEON')}"


@lru_cache
def _library() -> ctypes.CDLL:
    return load_library(library_path())


def load_library(path: Path) -> ctypes.CDLL:
    """Errors: EngineError where it is not there, or this processor is too old for it."""
    if machine() not in LEVELS:
        raise EngineError(f"libedgestill is not made for {machine()} (it is for {', '.join(LEVELS)})")
    if not path.is_file():
        raise EngineError("libedgestill is not compiled for this machine", HINT)
    try:
        library = ctypes.CDLL(str(path))
        library.edgestill_check.restype = ctypes.c_char_p
        library.edgestill_check.argtypes = (ctypes.c_void_p, _WORD, ctypes.POINTER(_WORD))
        library.edgestill_run.restype = None
        library.edgestill_run.argtypes = (ctypes.POINTER(_Run), _WORD, ctypes.c_int)
    except (OSError, AttributeError) as error:
        raise EngineError(f"libedgestill cannot be loaded: {error}", HINT) from error
    if library.edgestill_level() == 0:
        raise EngineError("this processor has no AVX2 and FMA, which libedgestill needs (x86-64-v3, since 2013)")
    return library


def open_runner(threads: int) -> Native:
    """`threads` 0 means all cores that may be used. Errors: EngineError where the library does not work here."""
    return Native(threads_or_cores(threads))


class Native:
    """Loads plans; its threads share the work of each kernel. Plain ones: concurrent.futures takes long to import."""

    allocate = staticmethod(allocate)

    def __init__(self, threads: int) -> None:
        _library()
        self.threads = threads
        self._jobs = [SimpleQueue[_Job | None]() for _ in range(threads if threads > 1 else 0)]
        self._others = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(len(self._jobs))]
        for other in self._others:
            other.start()

    def load(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> PlanProgram:
        return PlanProgram(self, path, inputs, outputs)

    def run(self, call: Callable[[int], None]) -> None:
        """call(0) … call(threads − 1) at the same time; they meet at their ends, and call(0) has ended then."""
        if not self._jobs:
            call(0)
            return
        done = threading.Lock()
        done.acquire()
        self._jobs[0].put((call, done))  # not in the caller's thread: an interrupt there would leave the others waiting
        done.acquire()

    def _serve(self, number: int) -> None:
        while (job := self._jobs[number].get()) is not None:
            call, done = job
            if number == 0:
                for jobs in self._jobs[1:]:
                    jobs.put(job)
            call(number)
            if number == 0:
                done.release()

    def close(self) -> None:
        for jobs in self._jobs:
            jobs.put(None)
        for other in self._others:
            other.join()


class PlanProgram:
    """A plan that has been checked, and its memory."""

    def __init__(
        self, runner: Native, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        with path.open("rb") as file:
            self._plan = _aligned(os.fstat(file.fileno()).st_size)
            file.readinto(self._plan)
        call = _WORD()
        if wrong := _library().edgestill_check(self._plan.ctypes.data, self._plan.nbytes, ctypes.byref(call)):
            where = f" (call {call.value})" if call.value >= 0 else ""
            raise EngineError(f"{path.name}: {wrong.decode()}{where}", "export the bundle again")
        head = self._plan[: 8 * HEAD_WORDS].view(np.int64)
        bases, self._arena_bytes, self._scratch_bytes, self._constants = (int(head[i]) for i in (2, 3, 4, 7))
        memories = self._plan[8 * HEAD_WORDS : 8 * (HEAD_WORDS + 2 * bases)].view(np.int64)[4:]
        sizes, written = memories[::2], memories[1::2]
        wanted = [spec.size_bytes for spec in (*inputs, *outputs)]
        if [int(size) for size in sizes] != wanted:
            raise EngineError(
                f"{path.name} takes other tensors than the manifest says: {len(sizes)} of {int(sizes.sum())} bytes, "
                f"not {len(wanted)} of {sum(wanted)}",
                "export the bundle again",
            )
        if [bool(word) for word in written] != [False] * len(inputs) + [True] * len(outputs):
            raise EngineError(f"{path.name} writes to its inputs, or not to its outputs", "export the bundle again")
        self._runner, self._memory = runner, None

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        if self._memory is None:
            try:
                self._memory = _aligned(self._arena_bytes), _aligned(self._scratch_bytes * self._runner.threads)
            except MemoryError as error:
                raise EngineError(f"no memory for a plan of {self._arena_bytes} bytes") from error
        arena, scratch = self._memory
        constants = self._plan.ctypes.data + 8 * self._constants
        given = [array.ctypes.data for array in (*inputs.values(), *outputs.values())]
        bases = np.array([arena.ctypes.data, constants, *given], np.uint64)
        state = _Run(self._plan.ctypes.data, bases.ctypes.data, scratch.ctypes.data, self._runner.threads, 0, 0, 0)
        level, plan = min(int(os.environ.get(LIMIT_VARIABLE, "4")), _library().edgestill_level()), self._plan
        held = (bases, arena, scratch, plan)  # by a thread that is on its way out, too

        def call(thread: int, held: tuple = held) -> None:
            _library().edgestill_run(ctypes.byref(state), thread, level)

        return lambda: self._runner.run(call)

    def close(self) -> None:
        self._memory = None


def _aligned(size: int) -> np.ndarray:
    block = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -block.ctypes.data % ALIGNMENT_BYTES
    return block[start : start + size]
