"""The native runner: its build, its errors, and portable kernels against eager PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgestill.runtime.bundle.manifest import TensorSpec
from edgestill.runtime.engines import executorch as engine_module
from edgestill.runtime.engines.program import ALIGNMENT_BYTES, SLACK_BYTES, allocate
from edgestill.runtime.errors import EngineError
from edgestill.runtime.native import build
from edgestill.runtime.native.program import Pointers, Program, Slot, set_threads, threads
from tests.support.handmade_executorch import lower


class Portable(torch.nn.Module):
    """Operators that XNNPACK leaves to portable kernels, on three types; one result twice, one input."""

    def forward(self, images, labels, values):
        floats = images.to(torch.float32) / 255
        one_hot = torch.nn.functional.one_hot(labels, 5).to(torch.float32)
        picked = values[torch.arange(4), labels]
        masked = torch.where(values > 0, values, torch.zeros_like(values)).sum(0)
        return floats.amax((1, 2)), one_hot, picked, masked, labels + 1, masked, values


@pytest.fixture(scope="module")
def portable_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    examples = (torch.zeros(4, 3, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5))
    path = tmp_path_factory.mktemp("native") / "portable.pte"
    path.write_bytes(lower(Portable(), examples))
    return path


@pytest.fixture
def portable(portable_file: Path) -> Iterator[Program]:
    program = Program(portable_file)
    yield program
    program.close()


def buffers_of(slots: tuple[Slot, ...]) -> list[np.ndarray]:
    specs = [TensorSpec(str(number), slot.shape, slot.dtype.name) for number, slot in enumerate(slots)]
    return [*allocate(specs).values()]


def test_portable_kernels_and_outputs_that_are_no_tensor_of_their_own(portable: Program) -> None:
    inputs, outputs = buffers_of(portable.inputs), buffers_of(portable.outputs)
    random = np.random.default_rng(0)
    for _ in range(3):
        inputs[0][...] = random.integers(0, 256, inputs[0].shape)
        inputs[1][...] = random.integers(0, 5, 4)
        inputs[2][...] = random.standard_normal((4, 5))
        portable.run(Pointers(inputs), Pointers(outputs))
        expected = Portable()(*(torch.from_numpy(array) for array in inputs))
        for actual, tensor in zip(outputs, expected, strict=True):
            assert actual.dtype == tensor.numpy().dtype
            np.testing.assert_allclose(actual, tensor.numpy(), rtol=1e-6)


def test_shapes_and_dtypes_are_those_of_the_export(portable: Program) -> None:
    assert [(slot.shape, slot.dtype.name) for slot in portable.inputs] == [
        ((4, 3, 2), "uint8"),
        ((4,), "int64"),
        ((4, 5), "float32"),
    ]
    assert not any(slot.copied for slot in portable.inputs)
    assert portable.arena_bytes > 0


def test_a_failing_run_says_why_and_the_program_still_works(portable: Program) -> None:
    inputs, outputs = buffers_of(portable.inputs), buffers_of(portable.outputs)
    inputs[1][...] = 5  # one past the last class
    with pytest.raises(EngineError, match=r"portable\.pte failed: .*InvalidArgument"):
        portable.run(Pointers(inputs), Pointers(outputs))
    inputs[1][...] = 4
    portable.run(Pointers(inputs), Pointers(outputs))
    np.testing.assert_array_equal(outputs[4], [5, 5, 5, 5])


def test_files_that_are_no_programs_are_refused(portable_file: Path, tmp_path: Path) -> None:
    content = portable_file.read_bytes()
    for name, data in {"text": b"x" * 4096, "empty": b"", "cut": content[: len(content) // 3]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(EngineError, match=f"{name} cannot be loaded by executorch: .+") as caught:
            Program(tmp_path / name)
        assert caught.value.hint
    with pytest.raises(EngineError, match="No such file"):
        Program(tmp_path / "missing.pte")
    with pytest.raises(EngineError, match='no method "backward"'):
        Program(portable_file, "backward")
    # None of them counts as open: the number of threads can still change.
    now = threads()
    set_threads(now + 1)
    assert threads() == now + 1
    set_threads(now)


@pytest.mark.parametrize("number", [0, -1, 100_000])
def test_impossible_numbers_of_threads_are_refused(number: int) -> None:
    with pytest.raises(EngineError, match="a number from 1 to 1024"):
        set_threads(number)


@pytest.mark.tiny
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 9), max_size=4), st.sampled_from("uint8 int64 float32".split()))
    )
)
def test_buffers_are_aligned_apart_and_followed_by_readable_bytes(specs: list[tuple[list[int], str]]) -> None:
    named = allocate([TensorSpec(str(i), tuple(shape), dtype) for i, (shape, dtype) in enumerate(specs)])
    arrays = [*named.values()]
    assert [(list(array.shape), array.dtype.name) for array in arrays] == specs
    for array in arrays:
        assert array.ctypes.data % ALIGNMENT_BYTES == 0
        assert not array.any()
        array[...] = 7
    block = arrays[-1].base if arrays else None
    while block is not None and block.base is not None:
        block = block.base
    for array in arrays:
        assert (array == 7).all()
        slack = ctypes.string_at(array.ctypes.data + array.nbytes, SLACK_BYTES)
        assert slack == bytes(SLACK_BYTES)
        assert array.ctypes.data + array.nbytes + SLACK_BYTES <= block.ctypes.data + block.nbytes


def test_the_library_is_built_once_for_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "folders", lambda: iter([tmp_path / "built"]))
    older = tmp_path / "built" / "libedgestill_runner-0123456789abcdef.so"
    older.parent.mkdir()
    older.touch()
    path = build.ensure_library()
    assert path.parent == tmp_path / "built"
    assert ctypes.CDLL(str(path)).edgestill_runner_version() == 1
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert build.ensure_library() == path
    assert {*path.parent.iterdir()} == {path, older}  # not beside the sources: another environment's, perhaps


def test_beside_the_sources_a_library_takes_the_place_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in build._SOURCES:
        (tmp_path / name).write_bytes((build._SOURCE_FOLDER / name).read_bytes())
    monkeypatch.setattr(build, "_SOURCE_FOLDER", tmp_path)
    other = tmp_path / "libother-0123456789abcdef.so"
    for path in (other, tmp_path / "libedgestill_runner-0123456789abcdef.so"):
        path.touch()
    path = build.ensure_library()
    assert {*tmp_path.glob("*.so")} == {path, other}


def test_the_name_changes_with_wheel_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build.find_wheel()
    names = {build.name_of_library(wheel), build.name_of_library(build.Wheel(wheel.folder, "9.9.9"))}
    for name in ("runner.cpp", "runner.h"):
        (tmp_path / name).write_bytes((build._SOURCE_FOLDER / name).read_bytes() + b"\n")
    monkeypatch.setattr(build, "_SOURCE_FOLDER", tmp_path)
    names.add(build.name_of_library(wheel))
    assert len(names) == 3


def test_without_a_compiler_the_engine_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "folders", lambda: iter([tmp_path]))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    engine_module.load_library.cache_clear()
    try:
        reason = engine_module.check()
    finally:
        engine_module.load_library.cache_clear()
    assert reason is not None and "no C++ compiler found" in reason and "apt install g++" in reason


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken++"
    compiler.write_text("#!/bin/sh\necho 'runner.cpp:1: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "folders", lambda: iter([tmp_path / "built"]))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EngineError, match="no such header"):
        build.ensure_library()
    assert not [*(tmp_path / "built").iterdir()]


def test_without_executorch_the_hint_is_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="not installed") as caught:
        build.find_wheel()
    assert caught.value.hint == f"pip install --no-deps executorch=={build.EXECUTORCH_VERSION}"


def test_the_command_prints_the_path_and_exits_1_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main() == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    monkeypatch.setattr(build, "folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert build.main() == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "hint: " in captured.err
