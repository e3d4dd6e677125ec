"""`edgestill predict` against NumPy: pictures, folders and arrays; words, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgestill
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.runtime.data.classes import names_as_metadata
from edgestill.runtime.errors import DataError
from tests.support.handmade_bundle import BATCH, MEAN, SIZE, STD, write_handmade_bundle

pytestmark = pytest.mark.unit
NAMES = ("apple", "banana, ripe", "cherry", "Dattel ü")
PREDICT = "predict c --state s.safetensors --threads 1".split()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Images [N, H, W, C] of pictures in a folder: more than a batch; beside them a bundle and a state."""
    write_handmade_bundle(tmp_path / "c", objective="ce", scale=0.3)
    monkeypatch.chdir(tmp_path)
    state = {name: array * np.float32(1.5) for name, array in Bundle.open("c").initial_state().items()}
    wire.save(Path("s.safetensors"), state, names_as_metadata(NAMES))
    images = np.random.default_rng(1).integers(0, 256, (BATCH + 3, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        path = Path("photos", "deep" if number % 2 else "", f"{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images


def expected(images: np.ndarray, state_file: str = "s.safetensors") -> np.ndarray:
    """Softmax of the linear student, in float64."""
    state = {name: array.astype(np.float64) for name, array in wire.load(Path(state_file)).arrays.items()}
    x = (images.transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    latents = x.reshape(len(x), -1) @ state["representation.weight"].T + state["representation.bias"]
    powers = np.exp(latents @ state["output.weight"].T + state["output.bias"])
    return powers / powers.sum(axis=1, keepdims=True)


def said_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict]:
    assert main([*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_pictures_and_folders_in_their_order(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    *said, last = said_of([*PREDICT, "photos/06.png", "photos", "photos/deep/01.png"], capsys)
    order = [6, *range(0, len(images), 2), *range(1, len(images), 2), 1]
    names = [f"photos/deep/{n:02}.png" if n % 2 else f"photos/{n:02}.png" for n in order]
    assert [one["sample"] for one in said] == names
    wanted = expected(images)[order]
    np.testing.assert_allclose([one["probabilities"] for one in said], wanted, rtol=1e-4, atol=1e-7)
    for one, row in zip(said, wanted, strict=True):
        assert (one["class"], one["number"]) == (NAMES[row.argmax()], row.argmax())
        assert one["probability"] == one["probabilities"][one["number"]]
    assert last["summary"]["samples"] == len(order) and last["summary"]["class_names"] == list(NAMES)
    assert last["summary"]["engine"] == "onnxruntime" and last["summary"]["notices"] == []


def test_arrays_with_and_without_labels(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("x.npz", x=images)
    np.savez("split.npz", x_train=images[:5], y_train=np.zeros(5, int), x_test=images[5:], y_test=np.zeros(6, int))
    wanted = expected(images)
    for words, rows in (
        ("--data x.npz", wanted), ("--data split.npz", wanted[5:]), ("--data split.npz --split train", wanted[:5]),
        ("--data photos", wanted[[*range(0, len(images), 2), *range(1, len(images), 2)]]),
    ):  # fmt: skip
        *said, last = said_of([*PREDICT, *words.split()], capsys)
        np.testing.assert_allclose([one["probabilities"] for one in said], rows, rtol=1e-4, atol=1e-7)
        assert last["summary"]["samples"] == len(rows)
    assert main([*PREDICT, "--data", "x.npz", "--split", "test"]) == 2
    assert "has no test split" in capsys.readouterr().err


def test_a_folder_is_split_as_evaluate_splits_it(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken picture beside them is left out where that is asked for; in Python as on the command line."""
    for number in range(6):
        path = Path("divided", "train" if number < 4 else "test", "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(path)
    trained = ("train/a/0", "train/a/2", "train/b/1", "train/b/3")
    names = [f"divided/{one}.png" for one in ("test/a/4", "test/b/5", *trained)]
    wanted = expected(images)
    for words, order in (
        ("--data divided", names[:2]), ("--data divided --split test", names[:2]),
        ("--data divided --split train", names[2:]), ("divided", names),
        ("--data divided/train --split train", names[2:]),
    ):  # fmt: skip
        *said, _ = said_of([*PREDICT, *words.split()], capsys)
        assert [one["sample"] for one in said] == order, words
        rows = wanted[[int(Path(name).stem) for name in order]]
        np.testing.assert_allclose([one["probabilities"] for one in said], rows, rtol=1e-4, atol=1e-7)
    assert main([*PREDICT, "--data", "divided", "--split", "validation"]) == 2
    assert "divided has no validation split" in capsys.readouterr().err
    Path("divided/test/a/broken.png").write_bytes(b"no picture")
    np.savez("split.npz", x_train=images[:5], y_train=np.zeros(5, int), x_test=images[5:], y_test=np.zeros(6, int))
    with edgestill.open("c", threads=1, skip_broken=True) as opened:
        opened.load_state("s.safetensors")
        for source, count in (("divided", 2), ("divided/train", 4), ("divided/train/a/0.png", 1), ("split.npz", 6)):
            classified, outputs = opened.classify(source), opened.predict(source)
            assert len(classified) == len(outputs.logits) == count
            best = [NAMES[number] for number in outputs.logits.argmax(axis=1)]
            assert [one.class_name for one in classified] == best
    capsys.readouterr()
    with edgestill.open("c", threads=1, skip_broken=True) as opened:
        assert opened.evaluate("divided").samples == 2 and len(opened.train("divided", epochs=1)) == 1
    assert "divided: 1 file skipped" in capsys.readouterr().err
    with edgestill.open("c", threads=1) as opened, pytest.raises(DataError, match=r"broken\.png: not a readable"):
        opened.evaluate("divided")


def test_csv_is_a_table(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "photos", "--csv"]) == 0
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head == ["sample", "class", "probability", *NAMES]
    order = [*range(0, len(images), 2), *range(1, len(images), 2)]
    wanted = expected(images)[order]
    np.testing.assert_allclose(np.array(rows)[:, 3:].astype(float), wanted, rtol=1e-4, atol=1e-6)
    assert [row[1] for row in rows] == [NAMES[n] for n in wanted.argmax(axis=1)]


def test_words_without_names(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are numbers where neither state nor bundle names them; names cannot steer the terminal."""
    Path("photos/00.png").rename("photos/0\x1b[31m.png")
    assert main("predict c photos --threads 1".split()) == 0
    output = capsys.readouterr()
    assert "no --state" in output.err and "\x1b" not in output.out
    first = output.out.splitlines()[0]
    row = expected(images[:1], "c/state.safetensors")[0]
    best, second, third = np.argsort(-row)[:3]
    assert first.startswith("photos/0\\x1b[31m.png  ")
    assert first.endswith(f"{best}  {row[best]:.3f}  ({second} {row[second]:.3f}, {third} {row[third]:.3f})")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "predict what?"),
        ("photos --data photos", 2, "pictures and --data"),
        ("photos --split test", 2, "--split without --data"),
        ("--data photos --split test", 2, "photos has no test split"),
        ("nowhere.png", 2, "nowhere.png: no such file"),
        ("large.png", 1, "large.png: 9x5 pixels, the bundle takes 6x6"),
        ("photos broken.png", 1, "broken.png: not a readable image"),
        ("empty", 1, "empty: no images"),
        ("photos --state none.safetensors", 2, "no such state"),
    ],
)
def test_mistakes(
    words: str, code: int, message: str, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 5)).save("large.png")
    Path("broken.png").write_bytes(b"no picture")
    Path("empty").mkdir()
    assert main([*PREDICT, *words.split()]) == code
    assert message in capsys.readouterr().err


def test_what_is_broken_is_counted_and_what_is_large_scaled(
    images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.kron(images[0], np.ones((4, 4, 1), np.uint8))).save("large.png")
    Path("broken.png").write_bytes(b"no picture")
    *said, last = said_of([*PREDICT, "broken.png", "large.png", "--resize", "--skip-broken"], capsys)
    assert [one["sample"] for one in said] == ["large.png"]
    with Image.open("large.png") as large:
        scaled = np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.testing.assert_allclose([said[0]["probabilities"]], expected(scaled[None]), rtol=1e-4, atol=1e-7)
    assert [notice["kind"] for notice in last["summary"]["notices"]] == ["skipped"]
