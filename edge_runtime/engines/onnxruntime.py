"""Engine `onnxruntime`: a bundle's .onnx graphs in stock ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines.program import Arrays, allocate
from edgestill.runtime.errors import EngineError
from edgestill.runtime.machine import cores

if TYPE_CHECKING:
    import onnxruntime


def check() -> str | None:
    """None when ONNX Runtime works here, else the reason."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"ONNX Runtime cannot be imported: {error}"
    # onnxruntime-training shares the import package, and leaves an empty one when removed
    if not hasattr(onnxruntime, "InferenceSession"):
        return "the package `onnxruntime` found here is empty or damaged"
    return None


def version() -> str:
    """The installed version of ONNX Runtime."""
    import onnxruntime

    return str(onnxruntime.__version__)


def open_runner(threads: int) -> OnnxRuntime:
    """`threads` 0 means all cores that may be used."""
    return OnnxRuntime(threads or own_choice())


def own_choice() -> int:
    """0, with which ONNX Runtime counts the machine's cores itself, unless this process may not use them all."""
    usable = cores()
    return usable if usable < (os.cpu_count() or 1) else 0


class OnnxRuntime:
    """Loads models (.onnx), each in a session of its own."""

    allocate = staticmethod(allocate)

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def load(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> OnnxProgram:
        return OnnxProgram(path, open_session(path, self._threads))

    def close(self) -> None:
        """Nothing is held but by programs."""


class OnnxProgram:
    def __init__(self, path: Path, session: onnxruntime.InferenceSession) -> None:
        self._path = path
        self._session: onnxruntime.InferenceSession | None = session

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy  # a view of the array, not a copy
        session, where = self._session, self._path.name
        try:
            binding = session.io_binding()
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, value(array))
            for name, array in outputs.items():
                binding.bind_ortvalue_output(name, value(array))
        except Exception as error:  # ONNX Runtime has no common base for its errors
            raise EngineError(f"onnxruntime: {where}: {error}", "export the bundle again") from error

        def run() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise EngineError(f"onnxruntime failed in {where}: {error}") from error

        return run

    def close(self) -> None:
        self._session = None


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session of one graph with the settings that measured best. Errors: EngineError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # A step of cnn3 planned as one block peaks at 163 MB, with single buffers at 118, and is no faster.
    options.enable_mem_pattern = False
    # How long idle threads spin between operators. Two threads on two cores, ms a step of cnn3 alone / beside a
    # busy process: default 19.6/67, 200 us 20/53, 100 us 20.1/47, 10 us 21.4/37. A device has other things to do.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(
            f"onnxruntime cannot open {path.name}: {error}",
            "install a newer onnxruntime, or export the bundle again",
        ) from error
