"""A bundle opened on an engine: it holds the state, makes steps and encodes samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle, TensorSpec
from edgestill.runtime.engines.program import Arrays, Program, Runner
from edgestill.runtime.engines.state import NEXT, State
from edgestill.runtime.errors import EngineError


class Engine:
    """Names, shapes and dtypes are those of the bundle's manifest (docs/bundle.md); results are copies.

    Each graph is loaded when first used, so that who only trains or only encodes does not pay for the other. A step
    copies its batch and its metrics, nothing else.
    """

    def __init__(self, bundle: Bundle, name: str, runner: Runner) -> None:
        """Holds the bundle's initial state. Errors: BundleError where the bundle has no graphs for this engine."""
        self.name = name
        self._bundle = bundle
        self._runner: Runner | None = runner
        self._programs: dict[str, Program] = {}
        self._buffers: dict[str, dict[str, np.ndarray]] = {}
        self._bound: dict[tuple[str, int], Callable[[], None]] = {}
        self._graphs = {graph: bundle.graph(name, graph) for graph in ("train_step", "encode")}
        self._state = State(bundle.state_specs, runner.allocate)
        self._state.load(bundle.initial_state())

    def load_state(self, state: Arrays) -> None:
        """Replaces the whole state by copies. The caller has checked names, shapes and dtypes."""
        self._state.load(state)

    def state(self) -> dict[str, np.ndarray]:
        """A copy of the whole state, by name."""
        return self._state.copy()

    def train_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Makes one step on everything that `train_step` takes besides state; returns the metrics by name.

        Errors: EngineError for an input that is missing or does not fit, and for a step that fails; the state is then
        as before.
        """
        metrics = self._run("train_step", inputs)
        self._state.advance()
        return metrics

    def encode(self, *samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents [B, l] and logits [B, K] of one batch of exactly B samples, in inference mode.

        samples: the tensors of a sample in the bundle's order, images [B, C, H, W] for instance. Errors: EngineError.
        """
        names = [spec.name for spec in self._bundle.inputs("encode")]
        if len(samples) != len(names):
            raise EngineError(
                f"encode takes {len(names)} tensors of a sample ({', '.join(names)}), {len(samples)} given",
                "give all of them, in this order",
            )
        outputs = self._run("encode", dict(zip(names, samples, strict=True)))
        return outputs["latents"], outputs["logits"]

    def close(self) -> None:
        """Frees what the engine holds outside Python; closing twice is harmless."""
        self._bound.clear()
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _run(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        if graph not in self._programs:
            self._load(graph)
        buffers = self._buffers[graph]
        for spec in self._bundle.inputs(graph):
            buffers[spec.name][...] = _fitting(spec, inputs)
        key = (graph, self._state.current)
        if key not in self._bound:
            tensors = self._state.tensors_of(self._graphs[graph], buffers)
            self._bound[key] = self._programs[graph].bind(*tensors)
        self._bound[key]()
        return {spec.name: buffers[spec.name].copy() for spec in self._bundle.outputs(graph)}

    def _load(self, graph: str) -> None:
        if self._runner is None:
            raise EngineError(f"engine {self.name} is closed", "open it again")
        spec = self._graphs[graph]
        others = (*self._bundle.inputs(graph), *self._bundle.outputs(graph))
        named = {tensor.name: tensor for tensor in (*self._bundle.state_specs, *others)}
        named |= {NEXT + tensor.name: tensor for tensor in self._bundle.state_specs}
        inputs, outputs = ([named[name] for name in names] for names in (spec.inputs, spec.outputs))
        self._programs[graph] = self._runner.load(self._bundle.file(spec.file), inputs, outputs)
        self._buffers[graph] = self._runner.allocate(others)


def _fitting(spec: TensorSpec, inputs: Arrays) -> np.ndarray:
    if spec.name not in inputs:
        raise EngineError(f"input {spec.name!r} is missing", "give every input that the manifest lists")
    array = np.asarray(inputs[spec.name])
    if array.shape != spec.shape or not np.can_cast(array.dtype, spec.numpy_dtype, "same_kind"):
        raise EngineError(
            f"input {spec.name!r} is {array.dtype}{[*array.shape]}, not {spec.dtype}{[*spec.shape]}",
            "give the shapes and dtypes that the manifest lists",
        )
    return array
