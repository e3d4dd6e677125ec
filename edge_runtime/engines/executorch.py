"""Engine `executorch`: a bundle's .pte graphs on stock ExecuTorch with XNNPACK, in this process, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle, TensorSpec
from edgestill.runtime.engines.protocol import Arrays
from edgestill.runtime.errors import EngineError
from edgestill.runtime.native.build import INSTALL_HINT, find_wheel
from edgestill.runtime.native.program import Pointers, Program, allocate, load_library, set_threads

__all__ = ["INSTALL_HINT", "NAME", "ExecuTorchEngine", "check", "open", "version"]

NAME = "executorch"
NEXT = "next."


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


def open(bundle: Bundle, threads: int) -> ExecuTorchEngine:
    """Opens a bundle with its initial state.

    `threads` counts the calling one, 0 means all cores; engines open in one process share the number.
    Errors: EngineError when ExecuTorch is missing or a graph does not load or fit the manifest; BundleError
    when the bundle has no graphs for this engine.
    """
    return ExecuTorchEngine(bundle, threads or len(os.sched_getaffinity(0)))


class ExecuTorchEngine:
    """Holds two sets of state buffers: a step reads one and writes the other, then they change places.

    Nothing of the state is copied in a step, and a step that fails leaves the state as it was.
    """

    name = NAME

    def __init__(self, bundle: Bundle, threads: int) -> None:
        outputs = bundle.graph(NAME, "train_step").outputs
        set_threads(threads)
        self._bundle = bundle
        written = {name.removeprefix(NEXT) for name in outputs if name.startswith(NEXT)}
        current = _allocate(bundle.state_specs)
        spare = _allocate([spec for spec in bundle.state_specs if spec.name in written])
        # What no step writes has one buffer, which is in both sets.
        self._sets = (current, {**current, **spare})
        self._now = 0
        batch = {spec.name: spec for graph in ("train_step", "encode") for spec in bundle.inputs(graph)}
        self._batch = _allocate(tuple(batch.values()))
        self._metrics = _allocate(bundle.outputs("train_step"))
        self._encoded = _allocate(bundle.outputs("encode"))
        self._encode: Program | None = None
        self._step = self._load("train_step")
        # Index: which set is read.
        self._step_inputs = tuple(self._pointers("train_step", "inputs", state) for state in self._sets)
        self._step_outputs = tuple(
            self._pointers("train_step", "outputs", state) for state in self._sets[::-1]
        )
        self.load_state(bundle.initial_state())

    @property
    def arena_bytes(self) -> int:
        """Memory-planned bytes of the training step; XNNPACK's workspace comes on top."""
        return self._step.arena_bytes

    def load_state(self, state: Arrays) -> None:
        for name, buffer in self._sets[self._now].items():
            buffer[...] = state[name]

    def state(self) -> dict[str, np.ndarray]:
        return {name: buffer.copy() for name, buffer in self._sets[self._now].items()}

    def train_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        self._put("train_step", inputs)
        self._step.run(self._step_inputs[self._now], self._step_outputs[self._now])
        self._now = 1 - self._now
        return {name: buffer.copy() for name, buffer in self._metrics.items()}

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._encode is None:
            # Loaded at first use: a device that only trains does not pay for it.
            self._encode = self._load("encode")
            self._encode_inputs = tuple(self._pointers("encode", "inputs", state) for state in self._sets)
            self._encode_outputs = self._pointers("encode", "outputs", {})
        self._put("encode", {"images": images})
        self._encode.run(self._encode_inputs[self._now], self._encode_outputs)
        return self._encoded["latents"].copy(), self._encoded["logits"].copy()

    def close(self) -> None:
        self._step.close()
        if self._encode is not None:
            self._encode.close()

    def _put(self, graph: str, inputs: Arrays) -> None:
        """Copies a graph's inputs into their buffers. Errors: EngineError for one missing or not fitting."""
        for spec in self._bundle.inputs(graph):
            if spec.name not in inputs:
                raise EngineError(
                    f"input {spec.name!r} is missing", "give every input that the manifest lists"
                )
            array = np.asarray(inputs[spec.name])
            if array.shape != spec.shape or not np.can_cast(array.dtype, spec.numpy_dtype, "same_kind"):
                raise EngineError(
                    f"input {spec.name!r} is {array.dtype}{[*array.shape]}, not {spec.dtype}{[*spec.shape]}",
                    "give the shapes and dtypes that the manifest lists",
                )
            self._batch[spec.name][...] = array

    def _load(self, graph: str) -> Program:
        """Errors: EngineError when the program's tensors are not those of the manifest."""
        spec = self._bundle.graph(NAME, graph)
        program = Program(self._bundle.file(spec.file))
        for side, names, slots in (
            ("input", spec.inputs, program.inputs),
            ("output", spec.outputs, program.outputs),
        ):
            expected = [(tensor.shape, tensor.numpy_dtype) for tensor in self._tensors(graph, names)]
            for index, (said, slot) in enumerate(zip_longest(expected, slots)):
                if slot is None or said != (slot.shape, slot.dtype):
                    program.close()
                    name = names[index] if index < len(names) else "none"
                    raise EngineError(
                        f"{spec.file}: {side} {index} is {slot}, but the manifest says otherwise of {name!r}",
                        "export the bundle again",
                    )
        return program

    def _tensors(self, graph: str, names: Sequence[str]) -> Iterator[TensorSpec]:
        specs = (*self._bundle.state_specs, *self._bundle.inputs(graph), *self._bundle.outputs(graph))
        named = {spec.name: spec for spec in specs}
        return (named[name.removeprefix(NEXT)] for name in names)

    def _pointers(self, graph: str, side: str, state: Mapping[str, np.ndarray]) -> Pointers:
        """Addresses of a graph's inputs or outputs (`side`) with one of the two sets as the state."""
        named = {**self._batch, **(self._metrics if graph == "train_step" else self._encoded)}
        if side == "inputs":
            named |= state
        else:
            named |= {NEXT + name: buffer for name, buffer in state.items()}
        return Pointers([named[name] for name in getattr(self._bundle.graph(NAME, graph), side)])


def _allocate(specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    arrays = allocate([(spec.shape, spec.numpy_dtype) for spec in specs])
    return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}
