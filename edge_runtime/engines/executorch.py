"""Engine `executorch`: a bundle's .pte graphs on stock ExecuTorch with XNNPACK, in this process, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines.program import Arrays, allocate
from edgestill.runtime.errors import EngineError
from edgestill.runtime.machine import threads_or_cores
from edgestill.runtime.native.build import INSTALL_HINT, find_wheel
from edgestill.runtime.native.program import Pointers, Program, load_library, set_threads


def check() -> str | None:
    """None if the engine works on this machine (builds the native runner at first use), else the reason."""
    try:
        load_library()
    except EngineError as error:
        other_hint = f"; {error.hint}" if error.hint not in (None, INSTALL_HINT) else ""
        return f"{error.message}{other_hint}"
    return None


def version() -> str:
    """Version of the installed `executorch` package. Errors: EngineError when there is none."""
    return find_wheel().version


def open_runner(threads: int) -> ExecuTorch:
    """`threads` counts the calling one, 0 means all cores that may be used; runners of one process share the number.

    Errors: EngineError when ExecuTorch is missing, or programs are open with another number of threads.
    """
    threads = threads_or_cores(threads)
    set_threads(threads)
    return ExecuTorch(threads)


class ExecuTorch:
    """Loads programs (.pte), whose inputs and outputs are positional."""

    allocate = staticmethod(allocate)

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def load(
        self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> ExecuTorchProgram:
        set_threads(self._threads)  # again: another runner may have been opened since
        program = Program(path)
        for side, specs, slots in (("input", inputs, program.inputs), ("output", outputs, program.outputs)):
            for index, (spec, slot) in enumerate(zip_longest(specs, slots)):
                if spec is None or slot is None or (spec.shape, spec.numpy_dtype) != (slot.shape, slot.dtype):
                    program.close()
                    raise EngineError(
                        f"{path.name}: {side} {index} is {slot}, but the manifest says otherwise of "
                        f"{spec.name if spec else 'none'!r}",
                        "export the bundle again",
                    )
        return ExecuTorchProgram(program)

    def close(self) -> None:
        """Nothing is held but by programs."""


class ExecuTorchProgram:
    def __init__(self, program: Program) -> None:
        self._program = program

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        return partial(self._program.run, Pointers([*inputs.values()]), Pointers([*outputs.values()]))

    def close(self) -> None:
        self._program.close()
