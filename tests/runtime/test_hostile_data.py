"""Data that nobody makes on purpose: named in one message, refused before anything is trained, never waited for."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.cli import main
from edgestill.runtime.data import npz_file
from edgestill.runtime.data.dataset import class_names_of, load_splits
from edgestill.runtime.errors import DataError
from tests.support.handmade_bundle import CHANNELS, CLASSES, SIZE, write_handmade_bundle

FORM = InputSpec((CHANNELS, SIZE, SIZE))


def write_npz(path: Path, classes: object) -> Path:
    x = np.zeros((2 * CLASSES, CHANNELS, SIZE, SIZE), np.uint8)
    np.savez(path, x=x, y=np.arange(2 * CLASSES) % CLASSES, classes=classes)
    return path


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "cat", "owl"], "'cat' names two classes"),
        (["cat", " ", "owl"], "a class has an empty name"),
        ([["cat", "dog", "owl"]], r"the names of the classes are <U3\[1, 3\]"),
        (["cat", "\ud800", "owl"], "which is not Unicode text"),
    ],
)
def test_names_that_name_no_class_are_refused(classes: list, message: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz", classes)
    with pytest.raises(DataError, match=message):
        load_splits(path, FORM, CLASSES)


def test_names_of_bytes_are_names(tmp_path: Path) -> None:
    assert class_names_of(write_npz(tmp_path / "d.npz", [b"cat", b"dog", b"owl"])) == ("cat", "dog", "owl")


def test_a_folder_whose_name_is_no_text_is_refused_before_training(tmp_path: Path) -> None:
    for name in (b"cat", b"d\xffg"):
        folder = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        try:
            folder.mkdir()
        except OSError:
            pytest.skip("this file system has no such names")
        Image.new("RGB", (SIZE, SIZE)).save(folder / "0.png")
    with pytest.raises(DataError, match="which is not Unicode text"):
        load_splits(tmp_path, FORM, CLASSES)


def test_an_array_that_says_that_it_is_enormous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, CHANNELS, SIZE, SIZE)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("x.npy", header.getvalue() + b"0" * 100)
    with pytest.raises(DataError, match=r"d\.npz"):
        load_splits(tmp_path / "d.npz", FORM, CLASSES)

    def full(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 28.6 GiB")

    monkeypatch.setattr(npz_file.np, "load", full)
    with pytest.raises(DataError, match="more than fits memory"):
        load_splits(tmp_path / "d.npz", FORM, CLASSES)


@pytest.mark.timeout(30)
def test_a_pipe_that_is_called_a_picture_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_handmade_bundle(tmp_path / "bundle")
    os.mkfifo(tmp_path / "p.png")
    assert main(["predict", str(bundle), str(tmp_path / "p.png"), "--engine", "onnxruntime"]) == 1
    assert "p.png: is no file" in capsys.readouterr().err


def test_short_memory_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    bundle = write_handmade_bundle(tmp_path / "bundle")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "open", full)
    assert main(["predict", str(bundle), str(tmp_path / "p.png"), "--engine", "onnxruntime"]) == 1
    assert "out of memory" in capsys.readouterr().err


def test_holding_everything_out_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, data = write_handmade_bundle(tmp_path / "bundle"), write_npz(tmp_path / "d.npz", ["a", "b", "c"][:CLASSES])
    words = ["train", str(bundle), "--data", str(data), "--state", str(tmp_path / "s"), "--holdout", "0.999"]
    assert main([*words, "--alpha", "0"]) == 2
    assert "--holdout 0.999 holds all" in capsys.readouterr().err
