"""The onnxruntime-training engine: a handmade bundle in a subprocess, against NumPy and the stock engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines import onnxruntime_training as engine
from edgestill.runtime.engines import onnxruntime_training_worker as worker
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import EngineError, UsageError
from edgestill.runtime.machine import peak_rss_of
from tests.support import handmade_bundle as handmade

needs_training_build = pytest.mark.skipif(engine.check() is not None, reason=str(engine.check()))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The handmade bundle with its graphs under both engines' names: plain operators run in either build."""
    folder = handmade.write_handmade_bundle(tmp_path / "bundle")
    shutil.copytree(folder / "onnxruntime", folder / engine.NAME)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"][engine.NAME] = {
        name: graph | {"file": f"{engine.NAME}/{name}.onnx"}
        for name, graph in manifest["graphs"]["onnxruntime"].items()
    }
    handmade.write_manifest(folder, manifest | {"files": handmade.file_records(folder)})
    return Bundle.open(folder)


@pytest.fixture
def runner() -> Iterator[engine.OnnxRuntimeTraining]:
    runner = engine.open_runner(threads=1, timeout_s=60)
    yield runner
    runner.close()


@pytest.fixture
def opened(bundle: Bundle, runner: engine.OnnxRuntimeTraining) -> Iterator[Engine]:
    opened = Engine(bundle, engine.NAME, runner)
    yield opened
    opened.close()


def batch(seed: int, **changed: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    size = handmade.BATCH
    numbers = {"alpha": 0.4, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01} | changed
    shape = (size, handmade.CHANNELS, handmade.SIZE, handmade.SIZE)
    return {
        "images": random.integers(0, 256, shape, dtype=np.uint8),
        "labels": random.integers(0, handmade.CLASSES, size),
        "label_weights": random.uniform(0, 1, size).astype(np.float32),
        "teacher_latents": random.standard_normal((size, handmade.LATENT)).astype(np.float32),
        "teacher_weights": random.uniform(0, 1, size).astype(np.float32),
    } | {name: np.array([number], np.float32) for name, number in numbers.items()}


@needs_training_build
@pytest.mark.contract
def test_steps_equal_numpy(bundle: Bundle, opened) -> None:
    expected = bundle.initial_state()
    for seed in range(5):
        inputs = batch(seed)
        expected, metrics = handmade.reference_step(expected, inputs)
        got = opened.train_step(inputs)
        assert set(got) == set(metrics)
        for name in metrics:
            np.testing.assert_allclose(got[name], metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    state = opened.state()
    assert set(state) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@needs_training_build
@pytest.mark.contract
def test_state_moves_to_stock_onnxruntime_and_back(bundle: Bundle, opened) -> None:
    other = open_engine(bundle, "onnxruntime", 1)
    opened.train_step(batch(0))
    other.load_state(opened.state())
    other.train_step(batch(1))
    images = batch(2)["images"]
    opened.load_state(other.state())
    for mine, its in zip(opened.encode(images), other.encode(images), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)
    bundle.check_state(opened.state())
    np.testing.assert_array_equal(opened.state()["output.weight"], other.state()["output.weight"])
    other.close()


@needs_training_build
@pytest.mark.contract
def test_a_returned_state_is_not_changed_by_later_steps(opened) -> None:
    before = opened.state()
    kept = {name: array.copy() for name, array in before.items()}
    first = opened.train_step(batch(0))
    loss = first["loss"].copy()
    opened.train_step(batch(1))
    assert all(np.array_equal(before[name], kept[name]) for name in kept)
    assert first["loss"] == loss
    assert not np.array_equal(opened.state()["output.weight"], kept["output.weight"])


@needs_training_build
@pytest.mark.contract
def test_a_failed_call_names_the_input_and_keeps_state_and_worker(opened) -> None:
    opened.train_step(batch(0))
    before = opened.state()
    lacking = batch(1)
    del lacking["teacher_latents"]
    with pytest.raises(EngineError, match="'teacher_latents' is missing"):
        opened.train_step(lacking)
    with pytest.raises(EngineError, match="'images' is uint8"):
        opened.train_step(batch(1) | {"images": batch(1)["images"][:2]})
    with pytest.raises(EngineError, match="'labels' is float32"):
        opened.train_step(batch(1) | {"labels": batch(1)["label_weights"]})
    with pytest.raises(EngineError, match="bind failed: IndexError"):
        opened._runner.process.call("bind", program=9, inputs=[], outputs=[])
    after = opened.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    opened.train_step(batch(1))


@needs_training_build
@pytest.mark.contract
def test_a_killed_worker_is_reported_and_the_state_is_as_before(opened, runner) -> None:
    opened.train_step(batch(0))
    before = opened.state()
    os.kill(runner.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="signal 9") as caught:
        opened.train_step(batch(0))
    assert "memory" in caught.value.hint
    with pytest.raises(EngineError, match="the worker is gone"):
        opened.train_step(batch(0))
    assert all(np.array_equal(array, before[name]) for name, array in opened.state().items())
    opened.close()
    opened.close()


@needs_training_build
@pytest.mark.contract
def test_close_ends_the_worker_and_a_closed_engine_says_so(bundle: Bundle) -> None:
    runner = engine.open_runner(threads=1)
    opened, pid = Engine(bundle, engine.NAME, runner), runner.process.pid
    opened.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineError, match="is closed"):
        opened.train_step(batch(0))
    with pytest.raises(EngineError, match="it was closed"):
        runner.process.call("run", bound=0)


@needs_training_build
@pytest.mark.contract
def test_the_worker_ends_when_its_parent_is_killed() -> None:
    code = (
        "import time; from edgestill.runtime.engines import onnxruntime_training as e; "
        "runner = e.open_runner(1); print(runner.process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        child = int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    for _ in range(100):
        if not runs(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_training_build
@pytest.mark.contract
def test_peak_memory_is_the_workers_own(opened, runner) -> None:
    opened.train_step(batch(0))
    ballast = np.ones(300 * 2**20 // 8)  # of this process, which a child must not report as its own
    size_bytes = peak_rss_of(runner.process.pid)
    assert size_bytes is not None and 20 * 2**20 < size_bytes < ballast.nbytes


@needs_training_build
@pytest.mark.contract
def test_the_engine_reports_the_training_builds_version() -> None:
    assert engine.version().startswith("1.19")


@needs_training_build
@pytest.mark.contract
def test_arrays_that_both_processes_share_are_the_runners_own(runner: engine.OnnxRuntimeTraining) -> None:
    first, second = (runner.allocate([TensorSpec(name, (3, 2), "float32")])[name] for name in "ab")
    assert not first.any() and not second.any()
    first[...] = 1
    assert runner.place("a", first[1:])[3] - runner.place("a", first)[3] == 8
    assert runner.place("b", second)[:3] == ["b", "float32", [3, 2]] and not second.any()
    with pytest.raises(EngineError, match="c does not lie in shared memory"):
        runner.place("c", np.zeros(2, np.float32))


def test_a_bundle_without_its_graphs_is_refused(tmp_path: Path) -> None:
    bundle = Bundle.open(handmade.write_handmade_bundle(tmp_path / "bundle"))
    with pytest.raises(UsageError, match=engine.NAME):
        open_engine(bundle, engine.NAME)


def process(code: str, timeout_s: float = 20) -> engine.WorkerProcess:
    """A worker that runs `code`: `reply(…)` sends a frame, `wait()` waits for the parent's next bytes."""
    prelude = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from edgestill.runtime.engines.onnxruntime_training_worker import frame
def reply(**message):
    sys.stdout.buffer.write(frame(message))
    sys.stdout.buffer.flush()
def wait(): sys.stdin.buffer.read(1)
"""
    return engine.WorkerProcess([sys.executable, "-c", prelude + code], timeout_s)


@pytest.mark.contract
def test_a_worker_that_hangs_is_stopped() -> None:
    hangs = process("reply(ok=True)\nimport time; time.sleep(60)", timeout_s=3)
    started_s = time.monotonic()
    with pytest.raises(EngineError, match="no answer within 3 s"):
        hangs.call("run")
    assert time.monotonic() - started_s < 20
    assert not runs(hangs.pid)
    hangs.close()


@pytest.mark.contract
def test_a_worker_that_hangs_while_it_is_written_to_is_stopped() -> None:
    hangs = process("reply(ok=True)\nimport time; time.sleep(60)", timeout_s=3)
    with pytest.raises(EngineError, match="no answer within 3 s"):
        hangs.call("open", path="x" * 2**20)
    hangs.close()


@pytest.mark.contract
def test_what_a_dying_worker_wrote_on_stderr_is_shown() -> None:
    dies = process("reply(ok=True)\nwait()\nsys.exit('out of luck')")
    with pytest.raises(EngineError, match="exit code 1") as caught:
        dies.call("run")
    assert "out of luck" in caught.value.message
    dies.close()


@pytest.mark.contract
def test_a_worker_that_does_not_start_is_reported() -> None:
    with pytest.raises(EngineError, match="no module named x_y"):
        process("sys.exit('no module named x_y')")
    with pytest.raises(EngineError, match="cannot start"):
        engine.WorkerProcess(["/nowhere/python"])


@pytest.mark.contract
def test_bytes_that_are_no_frame_are_reported() -> None:
    chats = process("reply(ok=True)\nwait()\nprint('hello, I am no frame, only a chatty library')")
    with pytest.raises(EngineError, match="not a frame"):
        chats.call("run")
    chats.close()


@pytest.mark.contract
def test_after_an_interrupted_call_the_next_one_does_not_read_its_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = process("reply(ok=True)\nwait()\nreply(ok=True, late=1)\nwait()\nreply(ok=True)")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(slow, "_read_exactly", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slow.call("run")
    with pytest.raises(EngineError, match="run.*was interrupted"):
        slow.call("bind")
    slow.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_a_frame_is_read_as_it_was_written(message: dict[str, object]) -> None:
    assert worker.read_frame(reader_of(worker.frame(message))) == message


@given(st.binary(max_size=60) | st.integers().map(lambda number: worker.frame([number])))
def test_other_bytes_are_refused_as_a_frame(data: bytes) -> None:
    with pytest.raises((ValueError, EOFError)):
        worker.read_frame(reader_of(data))


def reader_of(data: bytes):
    position = 0

    def read_exactly(size_bytes: int) -> bytearray:
        nonlocal position
        position += size_bytes
        if position > len(data):
            raise EOFError
        return bytearray(data[position - size_bytes : position])

    return read_exactly


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 3\n")
    path.chmod(0o755)
    return path


def test_the_interpreter_is_found_by_variable_then_beside_the_environment_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "project" / ".venv"))
    monkeypatch.delenv(engine.INTERPRETER_VARIABLE, raising=False)
    with pytest.raises(EngineError, match="no Python with onnxruntime-training") as caught:
        engine.find_interpreter()
    assert "pip install onnxruntime-training" in caught.value.hint
    relative = Path(engine.ENVIRONMENT_FOLDER, "bin", "python")
    here = executable(tmp_path / "here" / relative)
    assert engine.find_interpreter() == here
    beside = executable(tmp_path / "project" / relative)
    assert engine.find_interpreter() == beside
    named = executable(tmp_path / "elsewhere" / "python")
    monkeypatch.setenv(engine.INTERPRETER_VARIABLE, str(named))
    assert engine.find_interpreter() == named
    assert "exit code 3" in engine.check()
    monkeypatch.setenv(engine.INTERPRETER_VARIABLE, str(tmp_path / "missing"))
    assert "missing" in engine.check()


def test_a_plain_installation_is_told_by_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter here ends with exit code 3, so the version cannot come from running it."""
    monkeypatch.setenv(engine.INTERPRETER_VARIABLE, str(executable(tmp_path / "bin" / "python")))
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "onnxruntime_training-1.19.2.dist-info").mkdir(parents=True)
    assert "exit code 3" in engine.check()
    (packages / "numpy").mkdir()
    assert engine.check() is None
    assert engine.version() == "1.19.2"
    (packages / "onnxruntime-1.31.1.dist-info").mkdir()
    assert "exit code 3" in engine.check()


def test_an_interpreter_without_the_training_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment has stock onnxruntime under the same import name."""
    monkeypatch.setenv(engine.INTERPRETER_VARIABLE, sys.executable)
    assert "no training build" in engine.check()
