"""Classes are compared by their names: in state files, bundles, teachers, tasks and on devices."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import edgestill
from edgestill.coordinator.task.creation import make_task
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import Objective
from edgestill.runtime.cli import main
from edgestill.runtime.data.classes import KnownClasses, find_places, names_in_metadata, translate
from edgestill.runtime.data.dataset import class_names_from, load_splits
from edgestill.runtime.errors import BundleError, DataError, StateError, UsageError
from edgestill.runtime.training.plan import TrainSettings, plan
from edgestill.runtime.training.teacher import TeacherOutputs, in_order_of
from edgestill.simulation.virtual_device import Setup, _dealt
from tests.support.device_fakes import FakeCoordinator, served
from tests.support.handmade_bundle import CLASSES, SIZE, write_handmade_bundle, write_manifest

FRUIT = ("apple", "banana", "cherry", "date")
COLOURS = dict(zip(FRUIT, [(230, 30, 30), (230, 230, 30), (30, 30, 230), (30, 230, 30)], strict=True))
assert len(FRUIT) == CLASSES


def write_fruit(root: Path, folders: dict[str, str], each: int = 6) -> Path:
    """Folders of images: by a folder's name, which fruit is in it."""
    draw = np.random.default_rng(len(folders))
    for folder, fruit in folders.items():
        (root / folder).mkdir(parents=True)
        for number in range(each):
            noise = draw.integers(-25, 26, (SIZE, SIZE, 3))
            pixels = np.clip(np.array(COLOURS[fruit]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


def named_bundle(folder: Path, names: tuple[str, ...], objective: str = "ce") -> Path:
    write_handmade_bundle(folder, objective=objective, scale=0.05)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, manifest | {"class_names": list(names)})
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student without names in its bundle, trained on folders of fruit."""
    place = tmp_path_factory.mktemp("fruit")
    write_handmade_bundle(place / "bundle", objective="ce", scale=0.05)
    write_fruit(place / "train", dict(zip(FRUIT, FRUIT, strict=True)))
    words = ["train", str(place / "bundle"), "--data", str(place / "train"), "--epochs", "40", "--lr", "0.01"]
    assert main([*words, "--state", str(place / "s.safetensors")]) == 0
    return place


def evaluate(work: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    capsys.readouterr()
    words = ["evaluate", str(work / "bundle"), "--state", str(work / "s.safetensors"), "--data", str(data)]
    assert main([*words, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("folders", "renamed"),
    [
        (FRUIT, 0),
        (("apple", "Banana", "cherry", "DATE"), 2),  # upper case sorts first: by place, most would be wrong
        ((" apple", "banana ", "Cherry", "date"), 3),
        (("cherry", "apple"), 0),
        (("Date",), 1),
    ],
)
def test_folders_find_their_classes_by_name(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: tuple[str, ...], renamed: int
) -> None:
    data = write_fruit(tmp_path, {name: name.strip().lower() for name in folders})
    found = evaluate(work, data, capsys)
    assert found["accuracy"] == 1.0 and found["samples"] == 6 * len(folders)
    assert found["class_names"] == list(FRUIT)
    there = {name.strip().lower() for name in folders}
    assert found["per_class"] == [1.0 if name in there else None for name in FRUIT]
    assert sum(len(notice.get("renamed", {})) for notice in found["notices"]) == renamed


def test_a_split_that_lacks_classes_does_not_shift_the_others(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fruit(tmp_path / "train", dict(zip(FRUIT, FRUIT, strict=True)))
    write_fruit(tmp_path / "test", {"cherry": "cherry", "Date": "date"})
    (tmp_path / "test/unsorted").mkdir()  # without a picture it is nobody's class
    assert evaluate(work, tmp_path, capsys)["per_class"] == [None, None, 1.0, 1.0]
    splits = load_splits(tmp_path, Bundle.open(work / "bundle").input, CLASSES)
    assert splits.test is not None and splits.test.labels.tolist() == [3] * 6 + [2] * 6
    assert splits.test.class_names == FRUIT


def test_other_classes_are_refused_with_both_lists(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_fruit(tmp_path, {"apple": "apple", "kiwi": "date"})
    words = [str(work / "bundle"), "--data", str(data), "--state", str(work / "s.safetensors")]
    for command in (["evaluate", *words], ["train", *words, "--epochs", "99"]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "class kiwi" in error and "apple, kiwi" in error and "apple, banana, cherry, date" in error
        assert "s.safetensors" in error and "hint: rename" in error


def test_predictions_have_the_names_of_the_state(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fruit(tmp_path, {"Date": "date", "who knows": "banana"}, each=2)
    words = ["predict", str(work / "bundle"), "--json", "--state"]
    capsys.readouterr()
    assert main([*words, str(work / "s.safetensors"), str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["class"] for line in lines[:-1]] == ["date", "date", "banana", "banana"]
    assert lines[-1]["summary"]["class_names"] == list(FRUIT)
    # a state of fewer classes than the student has outputs: the others are called by their numbers
    file = wire.load(work / "s.safetensors")
    turned = {name: np.ascontiguousarray(array[::-1]) if name.startswith("output.") else array
              for name, array in file.arrays.items()}  # fmt: skip
    wire.save(tmp_path / "two.safetensors", turned, {"class_names": '["date", "cherry"]'})
    assert main([*words, str(tmp_path / "two.safetensors"), str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["class"] for line in lines[:-1]] == ["date", "date", "2", "2"]
    words = ["evaluate", str(work / "bundle"), "--state", str(tmp_path / "two.safetensors"), "--data", str(tmp_path)]
    (tmp_path / "who knows").rename(tmp_path / "cherry")
    assert main(words) == 0 and "\n2       no samples" in capsys.readouterr().out


def test_outputs_without_a_name_are_called_by_their_number(work: Path) -> None:
    with edgestill.open(work / "bundle", threads=1) as opened:
        opened.load_state(work / "s.safetensors")
        whole = opened.classify(work / "train")
        opened._classes = KnownClasses(FRUIT[:2], "the data")
        found = opened.classify(work / "train")
    short = dict(zip(FRUIT, (*FRUIT[:2], "2", "3"), strict=True))
    assert [one.class_name for one in found] == [short[one.class_name] for one in whole]
    assert {one.class_name for one in found} >= {"2", "3"}


def test_a_state_keeps_its_names_for_the_official_library(work: Path) -> None:
    import safetensors

    with safetensors.safe_open(work / "s.safetensors", "np") as file:
        assert json.loads(file.metadata()["class_names"]) == list(FRUIT)


def test_a_new_run_from_a_state_has_its_classes_or_says_that_they_are_new(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fruit(tmp_path / "same", {"Cherry": "cherry", "apple": "apple"})
    write_fruit(tmp_path / "other", {"fig": "apple", "kiwi": "date"})

    def start(data: str, state: str, *more: str) -> int:
        words = ["train", str(work / "bundle"), "--data", str(tmp_path / data), "--epochs", "1"]
        return main([*words, "--init", str(work / "s.safetensors"), "--state", str(tmp_path / state), *more])

    assert start("same", "a.safetensors") == 0
    assert names_in_metadata(wire.load(tmp_path / "a.safetensors").metadata) == FRUIT
    assert start("other", "b.safetensors") == 1 and "fig, kiwi" in capsys.readouterr().err
    assert start("other", "b.safetensors", "--new-classes") == 0
    assert names_in_metadata(wire.load(tmp_path / "b.safetensors").metadata) == ("fig", "kiwi")
    # a bundle of the same classes in another order: the state's outputs would mean others
    other = named_bundle(tmp_path / "reversed", FRUIT[::-1])
    words = ["train", str(other), "--data", str(tmp_path / "same"), "--init", str(work / "s.safetensors")]
    assert main([*words, "--state", str(tmp_path / "c.safetensors")]) == 1
    assert "date, cherry, banana, apple" in capsys.readouterr().err


def test_a_bundle_says_what_its_outputs_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = ("date", "apple", "cherry", "banana")
    bundle = Bundle.open(named_bundle(tmp_path / "b", order))
    data = write_fruit(tmp_path / "data", {"Apple": "apple", "banana": "banana"}, each=2)
    known = KnownClasses(bundle.class_names, "the bundle")
    told = []
    dataset = load_splits(data, bundle.input, CLASSES, known=known, tell=told.append).train
    assert dataset.labels.tolist() == [1, 1, 3, 3] and dataset.class_names == order
    assert told[0].details == {"renamed": {"Apple": "apple"}}
    # what was read without the bundle's names does not enter a run unnoticed
    with pytest.raises(DataError, match="date, apple, cherry, banana"):
        plan(bundle, load_splits(data, bundle.input, CLASSES).train, TrainSettings())
    assert main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class_names"] == list(order)
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    for wrong in (["a", "b"], ["a", "a", "b", "c"], ["", "a", "b", "c"], "abcd", [1, 2, 3, 4]):
        write_manifest(tmp_path / "b", manifest | {"class_names": wrong})
        with pytest.raises(BundleError, match="class_names"):
            Bundle.open(tmp_path / "b")


def test_arrays_that_name_their_classes_are_counted_by_name(tmp_path: Path) -> None:
    bundle = Bundle.open(named_bundle(tmp_path / "b", FRUIT))
    x = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    known = KnownClasses(bundle.class_names, "the bundle")

    def labels(**arrays: np.ndarray) -> list[int]:
        np.savez(tmp_path / "d.npz", x=x, **arrays)
        return load_splits(tmp_path / "d.npz", bundle.input, CLASSES, known=known).train.labels.tolist()

    y = np.array([0, 1, 2, 0])
    assert labels(y=y) == [0, 1, 2, 0], "nothing is named: as they stand"
    assert labels(y=y, classes=np.array(["date", "Banana", "apple"])) == [3, 1, 0, 3]
    # twelve names, of which three are met: labels beyond the bundle's classes are fine once they are named
    many = np.array([*map(str, range(9)), "date", "apple", "cherry"])
    assert labels(y=np.array([9, 10, 11, 9]), classes=many) == [3, 0, 2, 3]
    with pytest.raises(DataError, match="label 2 has no name: the data name 2 classes: apple, banana"):
        labels(y=y, classes=np.array(["apple", "banana"]))


NAMES = st.lists(st.text("aAbBéÉß ", min_size=1, max_size=3).filter(str.strip), min_size=1, max_size=6, unique=True)


@given(NAMES, NAMES, st.data())
@settings(max_examples=200, deadline=None)
def test_translation_against_a_dictionary(own: list[str], wanted: list[str], data: st.DataObject) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, len(own) - 1), max_size=8)), np.int64)

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name.casefold()).strip()

    meant: dict[str, str | None] = {}
    for name in own:
        alike = [other for other in wanted if plain(other) == plain(name)]
        rivals = [other for other in own if plain(other) == plain(name)]
        meant[name] = name if name in wanted else alike[0] if len(alike) == len(rivals) == 1 else None
    if any(meant[own[label]] is None for label in labels):
        with pytest.raises(DataError):
            translate(labels, own, KnownClasses(tuple(wanted), "x"), "here", lambda _: None)
    else:
        moved = translate(labels, own, KnownClasses(tuple(wanted), "x"), "here", lambda _: None)
        assert [wanted[label] for label in moved] == [meant[own[label]] for label in labels]


def test_accents_as_macos_writes_them() -> None:
    assert find_places([unicodedata.normalize("NFD", "Müsli")], ["müsli"]) == [0]


def test_a_teacher_of_the_same_classes_in_another_order() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    outputs = TeacherOutputs(np.zeros((3, 2), np.float32), logits)
    kd, lkd = (SimpleNamespace(objective=Objective(name, "mse")) for name in ("kd", "lkd"))
    teacher = KnownClasses(("date", "apple", "cherry", "banana"), "the teacher")
    moved = in_order_of(outputs, teacher, kd, FRUIT)
    np.testing.assert_array_equal(moved.logits, logits[:, [teacher.names.index(name) for name in FRUIT]])
    assert in_order_of(outputs, teacher, lkd, FRUIT) is outputs
    assert in_order_of(outputs, KnownClasses((), "x"), kd, FRUIT) is outputs
    with pytest.raises(UsageError, match="kiwi"):
        in_order_of(outputs, teacher, kd, ("apple", "banana", "cherry", "kiwi"))


def test_from_python(work: Path, tmp_path: Path) -> None:
    write_fruit(tmp_path / "mixed", {"Banana": "banana", "apple": "apple"})
    with edgestill.open(work / "bundle") as opened:
        assert opened.class_names == ()
        opened.load_state(work / "s.safetensors")
        assert opened.class_names == FRUIT and opened.evaluate(tmp_path / "mixed").accuracy == 1.0
        own = load_splits(tmp_path / "mixed", opened.bundle.input, CLASSES).train
        assert own.labels.tolist() == [0] * 6 + [1] * 6 and own.class_names == ("Banana", "apple")
        assert opened.evaluate(own).accuracy == 1.0
        with pytest.raises(DataError, match="fig"):
            opened.train(replace(own, class_names=("fig", "apple")))
        opened.train(replace(own, class_names=("fig", "kiwi")), new_classes=True)
        opened.save(tmp_path / "new.safetensors")
    assert names_in_metadata(wire.load(tmp_path / "new.safetensors").metadata) == ("fig", "kiwi")
    for names, goes_on in ((("fig", "kiwi"), True), (("fig", "kiwi"), True), (("kiwi", "fig"), False)):
        with edgestill.open(work / "bundle") as opened:
            run = {"checkpoint": tmp_path / "run.safetensors", "epochs": 1}
            if goes_on:
                opened.train(replace(own, class_names=names), **run)
                continue
            with pytest.raises(StateError, match="fig, kiwi; here they would mean kiwi, fig"):
                opened.train(replace(own, class_names=names), **run)


def test_a_device_counts_by_the_names_of_its_task(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fruit(tmp_path / "mine", {"Date": "date", "apple": "apple", "cherry": "cherry"}, each=10)
    write_fruit(tmp_path / "uni", {"Banana": "banana", "apple": "apple", "cherry": "cherry", "date": "date"})
    fake = FakeCoordinator(tmp_path / "c", rounds=1, epochs=40, learning_rate=0.02)
    fake.task["class_names"] = list(FRUIT)
    with served(fake) as (url, _):
        words = ["join", url, "--code", "AAAAA-BBBBB-CCCCC-DDDDD", "--data", str(tmp_path / "mine"), "--json"]
        words += ["--test", str(tmp_path / "uni"), "--ignore-conditions", "--work-dir", str(tmp_path / "w")]
        assert main(words) == 0
    report = fake.reports["birds.1"]
    assert report["class_counts"] == [10, 0, 10, 10]
    # it has never seen a banana; all else is right only where T_uni is counted by name, too
    assert report["after"]["t_priv"] == 1.0 and report["after"]["t_uni"] >= 0.75
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    renamed = [event["renamed"] for event in events if event.get("event") == "notice"]
    assert {"Date": "date"} in renamed and {"Banana": "banana"} in renamed
    (kept,) = (tmp_path / "w").glob("student-*.safetensors")
    assert names_in_metadata(wire.load(kept).metadata) == FRUIT
    # a task that names no classes: said, and refused where their number cannot be right
    del fake.task["class_names"]
    fake.codes.add("AAAAA-BBBBB-CCCCC-DDDDD")
    with served(fake) as (url, _):
        words[1], words[-1] = url, str(tmp_path / "w2")
        assert main(words) == 2 and "3 classes, the task has 4 without names" in capsys.readouterr().err
        (tmp_path / "mine/banana").mkdir()
        words[3] = "BBBBB-BBBBB-CCCCC-DDDDD"
        assert main(words) in (0, 1)
    assert "must be the same on every device" in capsys.readouterr().out


def test_a_task_takes_the_names_of_its_bundles_or_of_its_labelled_data(tmp_path: Path) -> None:
    named_bundle(tmp_path / "named", FRUIT, "lkd")
    named_bundle(tmp_path / "turned", FRUIT[::-1], "lkd")
    write_handmade_bundle(tmp_path / "unnamed", scale=0.05)
    write_fruit(tmp_path / "test", {"Apple": "apple", "banana": "banana", "cherry": "cherry", "date": "date"}, 2)
    np.savez(tmp_path / "x.npz", x=np.zeros((8, SIZE, SIZE, 3), np.uint8))
    stored: dict[str, bytes] = {}

    def add_blob(path: Path) -> str:
        stored[f"{len(stored):064x}"] = path.read_bytes()
        return f"{len(stored) - 1:064x}"

    told: list = []

    def make(*bundles: str, **fields: object) -> object:
        description = {"name": "x", "bundles": [str(tmp_path / name) for name in bundles]}
        description |= {"transfer": str(tmp_path / "x.npz"), **fields}
        return make_task(description, add_blob, tell=told.append)

    task = make("named", "unnamed", test=str(tmp_path / "test"))
    assert task.class_names == FRUIT and task.test is not None
    (tmp_path / "sent").write_bytes(stored[task.test.blob])
    assert wire.load(tmp_path / "sent").arrays["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert make("unnamed", test=str(tmp_path / "test")).class_names == ("Apple", "banana", "cherry", "date")
    task = make("unnamed", test=str(tmp_path / "test"), class_names="date,cherry,banana,apple")
    (tmp_path / "sent").write_bytes(stored[task.test.blob])
    assert task.class_names == FRUIT[::-1]
    assert sorted(wire.load(tmp_path / "sent").arrays["labels"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert wire.load(tmp_path / "sent").arrays["labels"].tolist()[:2] == [3, 3]
    told.clear()
    assert make("unnamed").class_names == () and "nobody says" in told[0].text
    with pytest.raises(UsageError, match="date, cherry, banana, apple"):
        make("named", "turned")
    with pytest.raises(UsageError, match="apple, banana, cherry, date"):
        make("named", class_names=["a", "b", "c", "d"])
    with pytest.raises(UsageError, match="class_names"):
        make("unnamed", class_names=["a", "b", "c"])


def test_simulated_devices_count_by_the_names_of_their_task(tmp_path: Path) -> None:
    bundle = Bundle.open(named_bundle(tmp_path / "b", FRUIT))
    y = np.arange(40) % 4
    x = (np.zeros((40, SIZE, SIZE, 3)) + y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=y, classes=np.array(["cherry", "Date", "banana", "apple"]))
    setup = Setup(str(tmp_path / "d.npz"), 2, 1.0, 0)
    for data in _dealt(setup, bundle.input, CLASSES, KnownClasses(FRUIT, "the task")):
        for part in (data.train, data.t_priv, data.t_uni):
            meant = np.array([2, 3, 1, 0])[part.images[:, 0, 0, 0]]
            np.testing.assert_array_equal(part.labels, meant)


def test_a_simulation_says_once_what_its_workers_leave_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = named_bundle(tmp_path / "b", FRUIT, "lkd")
    write_fruit(tmp_path / "d", {"Date": "date", "apple": "apple", "banana": "banana", "cherry": "cherry"}, 10)
    (tmp_path / "d/apple/broken.png").write_bytes(b"x")
    Image.new("RGB", (9, 9)).save(tmp_path / "d/apple/large.png")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8))
    words = ["simulate", "--data", str(tmp_path / "d"), "--transfer", str(tmp_path / "x.npz"), "--bundle", str(bundle)]
    words += ["--devices", "3", "--rounds", "2", "--mode", "consensus", "--workers", "2", "--transfer-count", "8"]
    assert main([*words, "--no-local-only", "--json", "--resize", "--skip-broken"]) == 0
    said = capsys.readouterr()
    notices = json.loads(said.out.splitlines()[-1])["summary"]["notices"]
    assert [notice["kind"] for notice in notices] == ["skipped", "classes"]
    assert notices[0]["reasons"] == {"broken images": {"count": 1, "files": ["apple/broken.png"]}}
    assert notices[1]["renamed"] == {"Date": "date"} and said.err.count("1 file skipped") == 1


def test_names_for_an_export(tmp_path: Path) -> None:
    write_fruit(tmp_path / "split/train", {"banana": "banana", "apple": "apple"}, 1)
    write_fruit(tmp_path / "split/val", {"apple": "apple"}, 1)
    assert class_names_from("apple, banana") == ("apple", "banana")
    assert class_names_from(str(tmp_path / "split")) == ("apple", "banana")
    assert class_names_from("cifar10-mini")[:2] == ("airplane", "automobile")
    for wrong in ("apple,apple", "apple,", str(tmp_path / "absent")):
        with pytest.raises((DataError, UsageError)):
            class_names_from(wrong)
