"""The double-buffered state of an engine against a plain dictionary, and the engine on a toy program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edgestill.runtime.bundle.bundle import Bundle, TensorSpec
from edgestill.runtime.bundle.manifest import GraphSpec
from edgestill.runtime.engines.engine import Engine
from edgestill.runtime.engines.program import Arrays, allocate
from edgestill.runtime.engines.registry import ENGINES
from edgestill.runtime.engines.state import State
from edgestill.runtime.errors import EngineError
from edgestill.runtime.native.build import EXECUTORCH_VERSION
from edgestill.runtime.randomness import noise
from tests.support.handmade_bundle import BATCH, CLASSES, reference_step, write_handmade_bundle

SPECS = (
    TensorSpec("weight", (2,), "float32", role="parameter", written=True),
    TensorSpec("frozen", (2,), "float32", role="parameter"),
)
STEP = GraphSpec("step", ("frozen", "batch", "weight"), ("loss", "next.weight"), {}, None)
NUMBERS = st.integers(-9, 9)


class StateMachine(RuleBasedStateMachine):
    """Steps `weight ← weight + frozen + batch`, some of which fail halfway, in any order with loading and copying."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(SPECS, allocate)
        self.expected = {spec.name: np.zeros(2, np.float32) for spec in SPECS}
        self.others = {"batch": np.zeros(2, np.float32), "loss": np.zeros(1, np.float32)}
        self.bound: dict[int, tuple[Arrays, Arrays]] = {}
        self.copies: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    @rule(weight=NUMBERS, frozen=NUMBERS)
    def load(self, weight: int, frozen: int) -> None:
        self.expected = {"weight": np.full(2, weight, np.float32), "frozen": np.full(2, frozen, np.float32)}
        self.state.load(self.expected)

    @rule(batch=NUMBERS, fails=st.booleans())
    def step(self, batch: int, fails: bool) -> None:
        if self.state.current not in self.bound:  # once, as an engine binds
            self.bound[self.state.current] = self.state.tensors_of(STEP, self.others)
        inputs, outputs = self.bound[self.state.current]
        assert (tuple(inputs), tuple(outputs)) == (STEP.inputs, STEP.outputs)
        self.others["batch"][...] = batch
        outputs["next.weight"][...] = inputs["weight"] + inputs["frozen"] + inputs["batch"]
        if not fails:
            self.state.advance()
            self.expected = self.expected | {
                "weight": self.expected["weight"] + self.expected["frozen"] + batch
            }

    @rule()
    def keep_a_copy(self) -> None:
        self.copies.append((self.state.copy(), self.expected))

    @invariant()
    def the_state_and_all_copies_are_as_expected(self) -> None:
        for found, expected in ((self.state.copy(), self.expected), *self.copies):
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in expected)


StateMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
TestState = StateMachine.TestCase


class Toy:
    """A runner whose programs are NumPy: the handmade bundle's own reference."""

    allocate = staticmethod(allocate)

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.fails = self.closed = False

    def load(self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Toy:
        self.loaded.append(path.stem)
        return self

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        def run() -> None:
            state, metrics = reference_step(dict(inputs), dict(inputs))
            for name, array in outputs.items():
                array[...] = metrics[name] if name in metrics else state[name.removeprefix("next.")]
            if self.fails:
                raise EngineError("the toy failed")

        return run

    def close(self) -> None:
        self.closed = True


def test_an_engine_is_what_its_programs_make_of_the_state(tmp_path: Path) -> None:
    bundle, toy = Bundle.open(write_handmade_bundle(tmp_path / "bundle", dropout=True)), Toy()
    (tmp_path / "bundle" / "onnxruntime" / "train_step.onnx").unlink()  # nobody but the runner opens a graph
    engine, expected = Engine(bundle, "onnxruntime", toy), bundle.initial_state()
    assert toy.loaded == []
    for step in range(4):
        inputs = {
            spec.name: noise(1, step, f"noise.{index}", spec.shape)
            for index, spec in enumerate(bundle.inputs("train_step"))
        } | {"labels": np.arange(BATCH) % CLASSES}
        inputs["images"] = (255 * inputs["images"]).astype(np.uint8)
        toy.fails = step == 2
        if toy.fails:
            with pytest.raises(EngineError, match="the toy failed"):
                engine.train_step(inputs)
        else:
            expected, metrics = reference_step(expected, inputs)
            np.testing.assert_allclose(engine.train_step(inputs)["loss"], metrics["loss"], rtol=1e-5)
        for name, array in engine.state().items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert toy.loaded == ["train_step"]
    engine.close()
    engine.close()
    assert toy.closed
    with pytest.raises(EngineError, match="engine onnxruntime is closed"):
        engine.train_step(inputs)


@pytest.mark.tiny
def test_a_record_says_all_that_is_known_of_an_engine() -> None:
    for name, record in ENGINES.items():
        assert record.name == name and record.hint and 1 < record.tolerance < 20
        assert record.runner.startswith("edgestill.runtime.engines.")
        assert record.exporter.startswith("edgestill.export.targets.")
    assert ENGINES["executorch"].hint.endswith(f"executorch=={EXECUTORCH_VERSION}")
    assert ENGINES["onnxruntime"].hint == f"pip install 'edgestill[{ENGINES['onnxruntime'].extra}]'"
