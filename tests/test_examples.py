"""The scripts in examples/ run as they say, with few and tiny data."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgestill
from tests.test_docs import PARSERS

pytestmark = pytest.mark.contract
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def ran(name: str, *words: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_example_is_run_here_and_has_cells() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert [path.name for path in scripts] == ["own_images.py", "sensor_windows.py"]
    assert all(path.read_text().count("\n# %%") >= 4 for path in scripts)


def test_own_images_of_any_size(tmp_path: Path) -> None:
    """Two colours are learned from pictures of several sizes, and the command at the end says what the script said."""
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("red", (230, 30, 30)), ("blue", (20, 40, 220))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            picture = image.new("RGB", (30 + 7 * number, 50), colour)
            picture.save(tmp_path / "photos" / name / f"{number}.png")
    said = ran("own_images.py", "photos", "work", 4, cwd=tmp_path)
    assert "classes: blue, red" in said and "accuracy 100% of 24 pictures that it was trained on" in said
    found = re.search(r"photos/blue/0\.png: (\w+), (\d+)%", said)
    assert found is not None and found[1] == "blue"
    command = said.splitlines()[-1]
    PARSERS[""].parse_args(shlex.split(command)[1:])
    with edgestill.open(tmp_path / "work/bundle", resize=True) as model:
        model.load_state(tmp_path / "work/student.safetensors")
        (one,) = model.classify(tmp_path / "photos/blue/0.png")
        assert f"{one.probability:.0%}" == f"{found[2]}%"
        every = model.classify(tmp_path / "photos")
        assert len(every) == 24 and all(Path(each.sample).parent.name == each.class_name for each in every)


def test_own_images_in_splits(tmp_path: Path) -> None:
    """Classes are what lies in train/, the test images alone are counted, and a name with a space is one word."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in (("red", (230, 30, 30)), ("blue", (20, 40, 220))):
            (tmp_path / "my photos" / split / name).mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (40, 50), colour).save(tmp_path / "my photos" / split / name / f"{number}.png")
    (tmp_path / "my photos/.DS_Store").write_bytes(b"\0")
    said = ran("own_images.py", "my photos", "work", 4, cwd=tmp_path)
    assert "classes: blue, red" in said and "accuracy 100% of 10 test pictures" in said
    parsed = PARSERS[""].parse_args(shlex.split(said.splitlines()[-1])[1:])
    assert parsed.pictures == [Path("my photos/test/blue/0.png")]


def test_own_images_without_any(tmp_path: Path) -> None:
    assert "classes: airplane, cat, ship" in ran("own_images.py", "photos", "work", 1, cwd=tmp_path)


def test_sensor_windows(tmp_path: Path) -> None:
    said = ran("sensor_windows.py", cwd=tmp_path)
    assert "'x_train': (360, 6, 128)" in said and "window 2: " in said
    accuracy = re.search(r"accuracy (\d+)% of the test windows", said)
    assert accuracy is not None and int(accuracy[1]) > 80  # of three classes
    with np.load(tmp_path / "windows.npz") as data:
        assert set(data) == set(
            re.findall(r"`([xy]_\w+|classes|users_train)`", (EXAMPLES / "sensor_windows.py").read_text())
        )


def test_sensor_windows_without_split_names_and_users(tmp_path: Path) -> None:
    """The arrays that the table says may be left out."""
    levels = np.repeat(np.arange(2), 20)
    draw = np.random.default_rng(0)
    x = (draw.normal(0, 0.05, (40, 3, 64)) + 0.8 * levels[:, None, None]).astype(np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=levels)
    said = ran("sensor_windows.py", "own.npz", "work", 8, cwd=tmp_path)
    accuracy = re.search(r"accuracy (\d+)% of the same windows", said)
    assert accuracy is not None and int(accuracy[1]) > 80
    assert re.search(r"window 2: [01], ", said)
