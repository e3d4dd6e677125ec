"""The engine `onnxruntime`: the step graph in stock ONNX Runtime on the CPU.

State lives in two sets of arrays that a step reads and writes in turn, bound to the session once; a step
copies nothing but its batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle, GraphSpec, TensorSpec
from edgestill.runtime.engines.protocol import Arrays
from edgestill.runtime.errors import EngineError

if TYPE_CHECKING:
    import onnxruntime

INSTALL_HINT = "pip install 'edgestill[onnxruntime]'"
NEXT = "next."


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


def open(bundle: Bundle, threads: int = 0) -> OnnxRuntimeEngine:
    """Opens a bundle with its initial state; `threads` 0 means all cores. Errors: EngineError, StateError."""
    return OnnxRuntimeEngine(bundle, threads)


class OnnxRuntimeEngine:
    """The engine protocol over one session for `train_step` and, once asked for, one for `encode`."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._bundle = bundle
        self._threads = threads
        self._step_spec = bundle.graph(self.name, "train_step")
        self._written = {spec.name for spec in bundle.state_specs if spec.written}
        # a tensor that no step writes has one array, in both sets
        fixed = {spec.name: _empty(spec) for spec in bundle.state_specs if not spec.written}
        self._sets = [
            {
                spec.name: fixed.get(spec.name, _empty(spec) if spec.written else None)
                for spec in bundle.state_specs
            }
            for _ in range(2)
        ]
        self._current = 0
        self._batch = {spec.name: _empty(spec) for spec in bundle.inputs("train_step")}
        self._metrics = {spec.name: _empty(spec) for spec in bundle.outputs("train_step")}
        self._step_session: onnxruntime.InferenceSession | None = None
        self._bindings: list[onnxruntime.IOBinding] = []
        self._encode_session: onnxruntime.InferenceSession | None = None
        self.load_state(bundle.initial_state())

    def load_state(self, state: Arrays) -> None:
        for name, array in self._sets[self._current].items():
            np.copyto(array, state[name], casting="no")

    def state(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self._sets[self._current].items()}

    def train_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        if self._step_session is None:
            self._open_step()
        for name, array in self._batch.items():
            np.copyto(array, inputs[name], casting="same_kind")
        binding = self._bindings[self._current]
        try:
            self._step_session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has no common base for its errors
            raise EngineError(f"onnxruntime failed in train_step: {error}") from error
        self._current = 1 - self._current
        return {name: array.copy() for name, array in self._metrics.items()}

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._encode_session is None:
            self._encode_session = self._open_session(self._bundle.graph(self.name, "encode"))
        spec = self._bundle.graph(self.name, "encode")
        state = self._sets[self._current]
        feeds = {name: images if name == "images" else state[name] for name in spec.inputs}
        try:
            latents, logits = self._encode_session.run(["latents", "logits"], feeds)
        except Exception as error:
            raise EngineError(f"onnxruntime failed in encode: {error}") from error
        return latents, logits

    def close(self) -> None:
        self._bindings.clear()
        self._step_session = self._encode_session = None

    def _open_step(self) -> None:
        import onnxruntime

        self._step_session = session = self._open_session(self._step_spec)
        value = onnxruntime.OrtValue.ortvalue_from_numpy  # a view of the array, not a copy
        shared_in = {name: value(array) for name, array in self._batch.items()}
        shared_out = {name: value(array) for name, array in self._metrics.items()}
        values = [{name: value(array) for name, array in arrays.items()} for arrays in self._sets]
        for source, target in ((values[0], values[1]), (values[1], values[0])):
            binding = session.io_binding()
            for name in self._step_spec.inputs:
                binding.bind_ortvalue_input(name, shared_in[name] if name in shared_in else source[name])
            for name in self._step_spec.outputs:
                bound = shared_out[name] if name in shared_out else target[name.removeprefix(NEXT)]
                binding.bind_ortvalue_output(name, bound)
            self._bindings.append(binding)

    def _open_session(self, spec: GraphSpec) -> onnxruntime.InferenceSession:
        return open_session(self._bundle.file(spec.file), self._threads)


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


def _empty(spec: TensorSpec) -> np.ndarray:
    """A zeroed array at a multiple of 64 bytes, as vector kernels like it."""
    buffer = np.zeros(spec.size_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + spec.size_bytes].view(spec.numpy_dtype).reshape(spec.shape)
