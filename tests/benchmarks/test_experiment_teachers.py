"""A teacher sees its own images alone, its outputs stand in the rows of their images, and it is trained once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.benchmarks.experiments.devices import divide
from edgestill.benchmarks.experiments.grid import Context
from edgestill.benchmarks.experiments.teachers import (
    prepare_teacher,
    score_teacher,
    stock_outputs,
    transfer_set,
)
from edgestill.export.parity.reference import load_student_state, rebuild_student
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import Objective
from edgestill.runtime.cli import main
from edgestill.runtime.engines.engine import Engine
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.teacher import TeacherOutputs

pytestmark = pytest.mark.contract

TRAIN, TEST, TRANSFER = range(175), range(175, 235), range(235, 265)
"""The numbers of the images of each set; an image's index in the training split is its number."""
LABELS = np.arange(len(TRAIN) + len(TEST)) % 7
"""How red an image is, which a teacher of so few steps learns."""
TEACHERS, BATCH, EPOCHS, HEAD_EPOCHS = 56, 8, 16, 2
PLAIN: dict[str, Any] = {
    "data": "numbered",
    "division": {"teacher": TEACHERS, "validation": 42},
    "transfer_samples": 20,
    "teacher": {"student": "cnn3", "widths": [4, 4, 8], "latent_size": 6, "epochs": EPOCHS, "batch": BATCH,
                "learning_rate": 2e-3, "seed": 0},
}  # fmt: skip
HEADS = {"latent_size": 9, "epochs": HEAD_EPOCHS, "of_latent_size": 6, "base_epochs": EPOCHS}
HEAD = {**PLAIN, "teacher": {**PLAIN["teacher"], **HEADS}}
DIVISION = divide(LABELS[: len(TRAIN)], **PLAIN["division"])
STEPS, HEAD_STEPS = EPOCHS * TEACHERS // BATCH, HEAD_EPOCHS * TEACHERS // BATCH
both = pytest.mark.parametrize("settings", [PLAIN, HEAD], ids=["whole", "head"])


def images_of(numbers: range | np.ndarray) -> np.ndarray:
    """Images of one colour, which is their number: no flip and no crop hides it."""
    colours = 40 * (np.asarray(numbers)[:, None] // [1, 7, 49] % 7)
    return np.broadcast_to(colours[:, :, None, None], (len(numbers), 3, 32, 32)).astype(np.uint8)


def numbers_of(images: np.ndarray) -> list[int]:
    return (images[:, :, 16, 16] // 40 @ [1, 7, 49]).tolist()


class Watch:
    """What engines are given while it looks on: numbers of images, and the labels that training gets with them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.trained: list[int] = []
        self.labels: list[int] = []
        self.encoded: list[int] = []
        self.interrupted_after: float = float("inf")
        """How many more batches an engine takes before a key is pressed."""

    def note(self, seen: list[int], images: np.ndarray) -> None:
        if self.interrupted_after == 0:
            raise KeyboardInterrupt
        self.interrupted_after -= 1
        seen += numbers_of(images)

    @property
    def steps(self) -> int:
        return len(self.trained) // BATCH


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    train_step, encode = Engine.train_step, Engine.encode

    def watched_step(engine: Engine, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        watch.note(watch.trained, inputs["images"])
        watch.labels += inputs["labels"].tolist()
        return train_step(engine, inputs)

    def watched_encode(engine: Engine, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        watch.note(watch.encoded, images)
        return encode(engine, images)

    monkeypatch.setattr(Engine, "train_step", watched_step)
    monkeypatch.setattr(Engine, "encode", watched_encode)
    return watch


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with both sets and the bundles, which are exported in this process: torch is loaded once."""
    folder = tmp_path_factory.mktemp("teachers")
    (folder / "bundles").mkdir()
    np.savez(folder / "data.npz", x_train=images_of(TRAIN), y_train=LABELS[: len(TRAIN)],
             x_test=images_of(TEST), y_test=LABELS[len(TRAIN) :])  # fmt: skip
    np.savez(folder / "transfer.npz", x=images_of(TRANSFER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgestill.simulation.bundles.run_export", lambda words: main(list(words)))
        yield folder


def new_context(shared: Path, cache: Path) -> Context:
    """A context whose cache holds bundles and no teachers."""
    cache.mkdir()
    (cache / "bundles").symlink_to(shared / "bundles")
    return Context(str(shared / "data.npz"), str(shared / "transfer.npz"), cache)


@pytest.fixture
def context(shared: Path, tmp_path: Path) -> Context:
    return new_context(shared, tmp_path / "cache")


def student_of(settings: Mapping[str, Any], context: Context) -> Bundle:
    """A student that distils from this teacher; of the teacher's own form, which fits."""
    teacher = Bundle.open(prepare_teacher(settings, context)[0])
    return replace(teacher, manifest=replace(teacher.manifest, objective=Objective("lkd")))


def state_of(settings: Mapping[str, Any], context: Context) -> dict[str, np.ndarray]:
    return wire.load(prepare_teacher(settings, context)[1]).arrays


def eager_outputs(settings: Mapping[str, Any], context: Context, images: np.ndarray) -> TeacherOutputs:
    """The trained teacher in PyTorch, all images at once; no two of them have rows that could be confused."""
    bundle = Bundle.open(prepare_teacher(settings, context)[0])
    teacher = rebuild_student(bundle)
    load_student_state(teacher, state_of(settings, context))
    mean, deviation = (torch.tensor(v).view(1, -1, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    with torch.no_grad():
        outputs = teacher.eval()((torch.tensor(images) / 255 - mean) / deviation)
    for rows in outputs:
        assert torch.cdist(rows, rows).fill_diagonal_(1.0).min() > 0.01
    return TeacherOutputs(*(rows.numpy() for rows in outputs))


def assert_same(found: TeacherOutputs, expected: TeacherOutputs) -> None:
    assert found.latents.shape == expected.latents.shape
    for mine, other in ((found.latents, expected.latents), (found.logits, expected.logits)):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_training_meets_the_teachers_images_and_no_others(context: Context, watch: Watch) -> None:
    forbidden = {*DIVISION.stock.tolist(), *DIVISION.validation.tolist(), *TEST, *TRANSFER}
    own = DIVISION.teacher.tolist()
    assert len(own) == TEACHERS and forbidden.isdisjoint(own)
    for settings, epochs in (
        (PLAIN, EPOCHS),
        (HEAD, HEAD_EPOCHS),
    ):  # the head's base is the teacher before it
        watch.forget()
        prepare_teacher(settings, context)
        assert forbidden.isdisjoint(watch.trained + watch.encoded)
        assert Counter(watch.trained) == dict.fromkeys(own, epochs)
        assert watch.labels == LABELS[watch.trained].tolist()


@both
def test_stock_outputs_have_each_images_row_and_zeros_elsewhere(
    settings: Mapping[str, Any], context: Context
) -> None:
    outputs = stock_outputs(settings, context, student_of(settings, context))
    assert outputs.latents.shape == (len(TRAIN), settings["teacher"]["latent_size"])
    assert outputs.logits.shape == (len(TRAIN), 10)
    assert_same(outputs.take(DIVISION.stock), eager_outputs(settings, context, images_of(DIVISION.stock)))
    others = outputs.take(np.concatenate([DIVISION.teacher, DIVISION.validation]))
    assert not others.latents.any() and not others.logits.any()


@both
def test_transfer_images_come_with_their_own_rows(settings: Mapping[str, Any], context: Context) -> None:
    student = student_of(settings, context)
    transfer = transfer_set(settings, context, student)
    numbers = numbers_of(transfer.images)
    assert len(numbers) == len(set(numbers)) == 20 and set(numbers) < set(TRANSFER)
    assert np.array_equal(transfer.images, images_of(np.array(numbers)))
    assert_same(transfer.outputs, eager_outputs(settings, context, transfer.images))
    fewer = transfer_set({**settings, "transfer_samples": 7}, context, student)
    assert numbers_of(fewer.images) == numbers[:7] != sorted(numbers)[:7]
    assert np.array_equal(fewer.outputs.latents, transfer.outputs.latents[:7])
    with pytest.raises(UsageError, match="30 images, the experiment takes up to 31"):
        transfer_set({**settings, "transfer_samples": 31}, context, student)


def test_a_head_teacher_has_the_perception_module_of_its_base(context: Context) -> None:
    base, head = state_of(PLAIN, context), state_of(HEAD, context)
    with Bundle.open(prepare_teacher(HEAD, context)[0]) as bundle:
        initial, latent_size = bundle.initial_state(), bundle.latent_size
    perception = [name for name in base if name.startswith("perception.")]
    assert perception and perception == [name for name in head if name.startswith("perception.")]
    assert all(np.array_equal(head[name], base[name]) for name in perception)
    assert not any(np.array_equal(head[name], initial[name]) for name in perception)
    assert latent_size == 9 and [len(state["representation.1.weight"]) for state in (base, head)] == [6, 9]
    for name in ("representation.1.weight", "output.weight"):  # these are trained
        assert not np.array_equal(head[name], initial[name])


def test_a_teachers_score_is_its_accuracy_on_all_test_images(context: Context) -> None:
    logits = eager_outputs(PLAIN, context, images_of(TEST)).logits
    found = score_teacher(PLAIN, context)
    assert found["uni"] == pytest.approx(np.mean(logits.argmax(axis=1) == LABELS[len(TRAIN) :]))
    assert found["uni"] > 0.3  # of 7 classes: it has been trained
    assert found == score_teacher(PLAIN, context)
    assert found["digest"] != score_teacher(HEAD, context)["digest"]


def test_a_finished_teacher_is_found_again_with_its_outputs(context: Context, watch: Watch) -> None:
    watch.interrupted_after = STEPS + 2
    with pytest.raises(KeyboardInterrupt):  # among the outputs, which take 10 batches
        stock_outputs(PLAIN, context, student_of(PLAIN, context))
    assert watch.steps == STEPS and len(watch.encoded) == 2 * BATCH
    watch.forget()
    first = stock_outputs(PLAIN, context, student_of(PLAIN, context))
    assert watch.steps == 0 and len(watch.encoded) == 10 * BATCH
    watch.forget()
    # of another device, with another seed: neither is the teacher's business
    again = stock_outputs({**PLAIN, "seed": 7, "samples": 20}, context, student_of(PLAIN, context))
    assert watch.steps == 0 and not watch.encoded
    assert np.array_equal(first.latents, again.latents) and np.array_equal(first.logits, again.logits)


@pytest.mark.parametrize(
    ("settings", "interrupted_after", "steps_left"),
    # there is a checkpoint after 100 steps; a head's base is finished when its own steps begin
    [(PLAIN, STEPS - 5, STEPS - 100), (HEAD, STEPS + 5, HEAD_STEPS)],
    ids=["whole", "head"],
)
def test_interrupted_training_goes_on_and_is_never_taken_for_finished(
    settings: Mapping[str, Any],
    interrupted_after: int,
    steps_left: int,
    shared: Path,
    context: Context,
    tmp_path: Path,
    watch: Watch,
) -> None:
    watch.interrupted_after = interrupted_after
    with pytest.raises(KeyboardInterrupt):
        prepare_teacher(settings, context)
    watch.forget()
    interrupted = state_of(settings, context)
    assert watch.steps == steps_left
    undisturbed = state_of(settings, new_context(shared, tmp_path / "undisturbed"))
    assert interrupted.keys() == undisturbed.keys()
    assert all(np.array_equal(interrupted[name], undisturbed[name]) for name in undisturbed)


def test_what_decides_a_teacher_makes_another(context: Context, watch: Watch) -> None:
    """A teacher of another division would have learnt from images that are private in this one."""
    prepare_teacher(PLAIN, context)
    for change in (
        {"data": "other"},
        {"division": {"teacher": TEACHERS - 7, "validation": 42}},
        {"teacher": {**PLAIN["teacher"], "epochs": EPOCHS + 1}},
    ):
        watch.forget()
        watch.interrupted_after = 0
        with pytest.raises(KeyboardInterrupt):
            prepare_teacher({**PLAIN, **change}, context)
