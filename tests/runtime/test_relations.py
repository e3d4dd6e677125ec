"""Negatives and neighbour weights, alone and in runs of students with objectives `crd` and `lpd`."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.coordinator.task.creation import make_task
from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.parity.reference import ReferenceStep, rebuild_student
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.runtime.cli import main
from edgestill.runtime.commands.inspect import describe, examine
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import Transfer, train_locally
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import BundleError, Interrupted, UsageError
from edgestill.runtime.training.batches import BatchPlan, TransferSet
from edgestill.runtime.training.checkpoint import load_checkpoint
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.relations import draw_negatives, neighbour_weights
from edgestill.runtime.training.teacher import TeacherOutputs
from edgestill.runtime.training.trainer import prepare, train

BATCH, SAMPLES, OTHERS, TEACHER_LATENT = 6, 20, 11, 4
OPTIONS = ExportOptions(
    student="cnn3", widths=(3, 4, 5), latent_size=5, classes=3, batch=BATCH, engines=("onnxruntime",),
    input=InputSpec((3, 8, 8)),
)  # fmt: skip
CRD = Objective("crd", negatives=9, features=8, teacher_latent_size=TEACHER_LATENT)


# negatives


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    count=st.integers(1, 50),
    samples=st.integers(2, 60),
    data=st.data(),
)
def test_negatives_are_no_samples_of_the_batch(
    seed: int, step: int, count: int, samples: int, data: st.DataObject
) -> None:
    batch = np.array(data.draw(st.lists(st.integers(0, samples - 1), max_size=samples - 1)), np.int64)
    drawn = draw_negatives(seed, step, count, samples, batch)
    assert drawn.shape == (count,) and set(drawn.tolist()) <= set(range(samples)) - set(batch.tolist())
    np.testing.assert_array_equal(drawn, draw_negatives(seed, step, count, samples, batch))


def test_every_other_sample_is_drawn_alike_and_every_step_draws_anew() -> None:
    drawn = [draw_negatives(1, step, 100, 12, np.array([2, 3])) for step in range(100)]
    counts = np.bincount(np.concatenate(drawn), minlength=12)
    assert counts[[2, 3]].sum() == 0
    # ten samples, 10,000 draws: chi-squared with 9 degrees of freedom is below 33.7 but once in 10,000
    assert ((counts[counts > 0] - 1000.0) ** 2 / 1000).sum() < 33.7
    assert len({tuple(indices) for indices in drawn}) == 100


# neighbours


def by_hand(latents: np.ndarray, known: list[bool], neighbours: int, scale: float) -> np.ndarray:
    kept = {}
    for i in range(len(latents)):
        others = [j for j in range(len(latents)) if j != i and known[j]]
        distance = {j: float(((latents[i].astype(float) - latents[j]) ** 2).sum()) for j in others}
        nearest = sorted(others, key=lambda j: (distance[j], j))[:neighbours]
        kept |= {(i, j): distance[j] for j in nearest if known[i]}
    weights = np.zeros((len(latents), len(latents)))
    for (i, j), distance in kept.items():
        weights[i, j] = np.exp(-distance / (scale**2 * np.mean(list(kept.values()))))
    return weights


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**20),
    known=st.lists(st.booleans(), min_size=2, max_size=9),
    neighbours=st.integers(1, 5),
    scale=st.sampled_from((0.5, 1.0, 3.0)),
)
def test_neighbour_weights_are_those_by_hand(
    seed: int, known: list[bool], neighbours: int, scale: float
) -> None:
    latents = np.random.default_rng(seed).standard_normal((len(known), 3)).astype(np.float32)
    found = neighbour_weights(latents, np.array(known), neighbours, scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(latents, known, neighbours, scale), rtol=1e-5, atol=1e-7)


def test_weights_do_not_depend_on_the_unit_of_the_latents() -> None:
    latents = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    everyone = np.ones(7, bool)
    np.testing.assert_allclose(
        neighbour_weights(latents, everyone, 3, 1.0),
        neighbour_weights(latents * 64, everyone, 3, 1.0),
        rtol=1e-6,
    )


def test_equal_latents_are_neighbours_of_full_weight() -> None:
    weights = neighbour_weights(np.ones((4, 3), np.float32), np.ones(4, bool), 2, 1.0)
    np.testing.assert_array_equal(weights.sum(1), 2)
    assert not np.diag(weights).any()


# batches


def labelled(samples: int, seed: int = 0) -> Dataset:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (samples, 3, 8, 8), dtype=np.uint8)
    return Dataset(images, random.integers(0, 3, samples), ("a", "b", "c"))


def outputs_of(samples: int, latent_size: int, seed: int = 1) -> TeacherOutputs:
    random = np.random.default_rng(seed)
    return TeacherOutputs(
        *(random.standard_normal((samples, size)).astype(np.float32) for size in (latent_size, 3))
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_the_negatives_of_a_batch_are_latents_of_samples_outside(mixed: bool) -> None:
    teacher, others = outputs_of(SAMPLES, 4), outputs_of(11, 4, seed=2)
    transfer = TransferSet(np.zeros((11, 3, 8, 8), np.uint8), others)
    plan = BatchPlan(
        labelled(SAMPLES), BATCH, seed=3, teacher=teacher, negatives=40,
        transfer=transfer if mixed else None, transfer_count=2 if mixed else 0,
    )  # fmt: skip
    pool = {row.tobytes() for row in teacher.latents} | (
        {row.tobytes() for row in others.latents} if mixed else set()
    )
    seen = set()
    for step in range(30):
        inputs = plan.inputs(step)
        batch = {row.tobytes() for row in inputs["teacher_latents"]}
        negatives = {row.tobytes() for row in inputs["teacher_negatives"]}
        assert inputs["teacher_negatives"].shape == (40, 4) and not batch & negatives
        seen |= negatives
        np.testing.assert_array_equal(inputs["teacher_negatives"], plan.inputs(step)["teacher_negatives"])
    assert seen == pool


# runs


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for objective in (CRD, Objective("lpd"), Objective("ce")):
        export_bundle(replace(OPTIONS, objective=objective), folder / objective.name)
    export_bundle(replace(OPTIONS, objective=Objective("ce"), latent_size=TEACHER_LATENT), folder / "teacher")
    own = replace(CRD, teacher_latent_size=None)
    export_bundle(replace(OPTIONS, objective=own), folder / "own")
    return folder


def run_of(folder: Path, name: str, **hyperparameters: float) -> Run:
    bundle = Bundle.open(folder / name)
    given = TrainSettings(epochs=3, seed=7, augmentations=("flip",), hyperparameters=hyperparameters)
    return plan(bundle, labelled(SAMPLES), given, teacher=outputs_of(SAMPLES, TEACHER_LATENT))


def finish(run: Run, path: Path, stop_after: int | None = None) -> bytes:
    engine = open_engine(run.bundle, "onnxruntime", 1)
    first, asked = prepare(engine, run, path), iter(range(1, 100))
    steps = train(engine, run, path, first_step=first, should_stop=lambda: next(asked) == stop_after)
    if stop_after is None:
        list(steps)
    else:
        with pytest.raises(Interrupted):
            list(steps)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["crd", "lpd"])
def test_an_interrupted_run_ends_with_the_same_bytes(bundles: Path, name: str, tmp_path: Path) -> None:
    whole = finish(run_of(bundles, name), tmp_path / "whole.safetensors")
    for stop_after in (1, 4):
        assert finish(run_of(bundles, name), tmp_path / "parts.safetensors", stop_after) != whole
    assert finish(run_of(bundles, name), tmp_path / "parts.safetensors") == whole


@pytest.mark.parametrize("name", ["crd", "lpd"])
def test_a_run_follows_eager_pytorch(bundles: Path, name: str, tmp_path: Path) -> None:
    """From the same inputs; the heads learn, too."""
    run = run_of(bundles, name)
    eager = ReferenceStep(run.bundle, rebuild_student(run.bundle))
    engine = open_engine(run.bundle, "onnxruntime", 1)
    prepare(engine, run, None)
    start = engine.state()
    for record in train(engine, run, None):
        expected = eager.train_step(run.inputs(record.step - 1))
        assert record.distillation_loss == pytest.approx(float(expected["distillation_loss"][0]), rel=1e-3)
        if record.step == 4:
            break
    state = engine.state()
    for tensor in (key for key in state if key.startswith("crd.")):
        assert (state[tensor] != start[tensor]).any()
        np.testing.assert_allclose(state[tensor], eager.state()[tensor], rtol=1e-3, atol=1e-4)


def test_states_evaluate_and_load_into_the_student(bundles: Path, tmp_path: Path) -> None:
    run = run_of(bundles, "crd")
    finish(run, tmp_path / "state.safetensors")
    state = load_checkpoint(tmp_path / "state.safetensors", run.bundle).state
    student = rebuild_student(run.bundle)
    own = student.state_dict()
    assert {name for name in state if name.startswith("crd.")} and own.keys() & state.keys()
    engine = open_engine(run.bundle, "onnxruntime", 1)
    engine.load_state(state)
    reference = ReferenceStep(run.bundle, student)
    reference.load_state(state)
    images = labelled(BATCH, seed=5).images
    for ours, theirs in zip(engine.encode(images), reference.encode(images), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_run_knows_its_neighbourhood_and_its_temperature(bundles: Path) -> None:
    first = run_of(bundles, "lpd").description()
    assert (first["neighbours"], first["neighbour_scale"]) == (5, 1.0)
    second = run_of(bundles, "lpd", neighbours=2, neighbour_scale=0.5)
    assert second.description() != first
    assert (second.inputs(0)["neighbour_weights"] > 0).sum(1).max() == 2
    crd = run_of(bundles, "crd")
    assert crd.hyperparameters["temperature"] == 0.07 and crd.description()["neighbours"] is None


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("crd", {"neighbours": 5}, "objective crd and optimizer sgd takes no neighbours"),
        ("lpd", {"neighbours": BATCH}, f"{BATCH} neighbours in a batch of {BATCH}"),
        ("lpd", {"neighbours": 0}, "neighbours 0 is out of range"),
        ("lpd", {"neighbour_scale": 0.0}, "neighbour scale 0.0 is out of range"),
        ("lpd", {"neighbour_scale": float("nan")}, "neighbour scale nan is out of range"),
        ("lpd", {"temperature": 1.0}, "takes no temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    bundles: Path, name: str, changed: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        run_of(bundles, name, **changed)
    assert error.value.hint


def test_latents_of_two_sizes_are_not_compared(bundles: Path) -> None:
    bundle = Bundle.open(bundles / "lpd")

    def planned(size: int, transfer: int) -> Run:
        others = TransferSet(labelled(OTHERS).images, outputs_of(OTHERS, transfer))
        return plan(bundle, labelled(SAMPLES), TrainSettings(), teacher=outputs_of(SAMPLES, size), transfer=others)

    with pytest.raises(UsageError, match="latents of size 7 on the data and of size 9 on the transfer set") as error:
        planned(7, 9)
    assert "one teacher" in error.value.hint
    inputs = planned(9, 9).inputs(0)  # of any one size
    assert inputs["neighbour_weights"].any()


def test_outputs_that_are_not_learnt_from_may_have_any_size(bundles: Path) -> None:
    bundle, latents = Bundle.open(bundles / "lpd"), outputs_of(SAMPLES, 7)
    classes = TeacherOutputs(latents.latents, np.zeros((SAMPLES, 1000), np.float32))
    others = TransferSet(labelled(OTHERS).images, TeacherOutputs(outputs_of(OTHERS, 7).latents))
    run = plan(bundle, labelled(SAMPLES), TrainSettings(), teacher=classes, transfer=others)
    assert run.inputs(0)["neighbour_weights"].any()


def test_a_batch_that_holds_every_sample_leaves_no_negatives(bundles: Path) -> None:
    bundle = Bundle.open(bundles / "crd")
    with pytest.raises(UsageError, match="one batch of 6 holds all 6") as error:
        plan(bundle, labelled(BATCH), TrainSettings(), teacher=outputs_of(BATCH, TEACHER_LATENT))
    assert "--batch" in error.value.hint
    plan(bundle, labelled(BATCH + 1), TrainSettings(), teacher=outputs_of(BATCH + 1, TEACHER_LATENT))


# rounds of a federation: private samples have no teacher, transfer samples have


def round_of(
    folder: Path, name: str, published: bool, **settings: object
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What every step of a local round was given, and the state after it."""
    bundle, seen = Bundle.open(folder / name), []
    engine = open_engine(bundle, "onnxruntime", 1)
    step = engine.train_step
    engine.train_step = lambda inputs: (seen.append({n: a.copy() for n, a in inputs.items()}), step(inputs))[1]
    others = labelled(OTHERS, seed=4).images
    outputs = {"latents": outputs_of(OTHERS, TEACHER_LATENT, seed=2).latents} if published else None
    local = LocalSettings(epochs=2, **settings)
    transfer = Transfer(others) if published else None
    initial = bundle.initial_state()
    result = train_locally(engine, bundle, labelled(SAMPLES), transfer, outputs, local, 3, initial, None)
    return seen, result.state


@pytest.mark.parametrize("name", ["crd", "lpd"])
def test_a_round_relates_transfer_samples_to_one_another(bundles: Path, name: str) -> None:
    seen, state = round_of(bundles, name, published=True)
    published = outputs_of(OTHERS, TEACHER_LATENT, seed=2).latents
    known = {row.tobytes() for row in published}
    for inputs in seen:
        assert inputs["teacher_weights"].tolist() == [0, 0, 0, 1, 1, 1]
        if name == "crd":
            negatives = {row.tobytes() for row in inputs["teacher_negatives"]}
            batch = {row.tobytes() for row in inputs["teacher_latents"][3:]}
            assert negatives <= known - batch and inputs["temperature"] == np.float32(0.07)
        else:
            # two neighbours each: as many as there are others with a teacher
            assert (inputs["neighbour_weights"] > 0).sum(axis=1).tolist() == [0, 0, 0, 2, 2, 2]
    assert all(np.isfinite(array).all() for array in state.values())


@pytest.mark.parametrize("name", ["crd", "lpd"])
def test_a_round_without_global_outputs_trains_on_labels_alone(bundles: Path, name: str) -> None:
    seen, state = round_of(bundles, name, published=False)
    assert all(inputs["alpha"] == 0 and not inputs["teacher_weights"].any() for inputs in seen)
    initial = Bundle.open(bundles / name).initial_state()
    for tensor, array in state.items():
        assert np.isfinite(array).all()
        if tensor.startswith("crd."):
            np.testing.assert_array_equal(array, initial[tensor])
    assert (state["output.weight"] != initial["output.weight"]).any()


def test_one_transfer_sample_a_batch_has_no_neighbours(bundles: Path) -> None:
    with pytest.raises(UsageError, match="objective lpd compares samples that have a teacher"):
        round_of(bundles, "lpd", published=True, transfer_fraction=1 / BATCH)


def described(bundles: Path, folder: Path, *names: str, **more: object) -> dict[str, object]:
    np.savez(folder / "d.npz", x=labelled(12).images, y=labelled(12).labels)
    paths = [str(bundles / name) for name in names]
    return {"name": "x", "bundles": paths, "transfer": str(folder / "d.npz"), **more}


def test_a_task_takes_them_and_warns_of_spaces_of_their_own(bundles: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    make_task(described(bundles, tmp_path, "lpd"), lambda _: "0" * 64, warnings.append)
    assert len(warnings) == 1 and "take --align" in warnings[0]
    aligned = described(bundles, tmp_path, "lpd", aggregation={"align": True}, global_bundle=str(bundles / "lpd"))
    make_task(aligned, lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), warnings.append)
    make_task(described(bundles, tmp_path, "crd", exchange="parameters"), lambda _: "0" * 64, warnings.append)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("crd", {}, "its heads take latents of 4, this task's are of 5"),
        ("lpd", {"exchange": "logits"}, "objective lpd does not learn from logits"),
        ("lpd", {"local": {"neighbours": 3}}, "3 neighbours in a batch of 6, 3 of which have a teacher"),
        ("own", {"transfer_count": 3}, "one batch of 6 holds all 3 that have a teacher"),
    ],
)
def test_a_task_refuses_what_they_cannot_learn_from(
    bundles: Path, tmp_path: Path, name: str, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(described(bundles, tmp_path, name, **changed), lambda _: "0" * 64)


# commands


def test_train_from_a_teacher_with_other_latents(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = labelled(SAMPLES)
    np.savez(tmp_path / "d.npz", x=data.images, y=data.labels)
    common = ["--data", str(tmp_path / "d.npz"), "--threads", "1", "--teacher"]

    def train_with(name: str, teacher: str, *more: str) -> int:
        state = str(tmp_path / f"{name}-{teacher}.safetensors")
        return main(["train", str(bundles / name), *common, str(bundles / teacher), "--state", state, *more])

    assert train_with("crd", "teacher", "--temperature", "0.1") == 0
    assert train_with("lpd", "teacher", "--neighbours", "3", "--neighbour-scale", "2") == 0
    capsys.readouterr()
    assert train_with("crd", "ce") == 1  # latents of the student's size, which are not the teacher's
    assert "export the student with --teacher-latent-size 5" in capsys.readouterr().err


def test_inspect_names_the_negatives(bundles: Path) -> None:
    with Bundle.open(bundles / "crd") as bundle:
        report = examine(bundle)
    assert report["objective"] == {
        "name": "crd", "kd_loss": None, "negatives": 9, "features": 8, "teacher_latent_size": TEACHER_LATENT
    }  # fmt: skip
    assert "crd with 9 negatives" in describe(report)
    with Bundle.open(bundles / "lpd") as bundle:
        assert examine(bundle)["objective"] == {"name": "lpd", "kd_loss": None}


def test_a_manifest_without_the_sizes_is_refused(bundles: Path, tmp_path: Path) -> None:
    text = (bundles / "crd" / "manifest.json").read_text()
    broken = tmp_path / "manifest.json"
    broken.write_text(text.replace('"negatives": 9', '"negatives": null'))
    with pytest.raises(BundleError, match="objective.negatives or .teacher_latent_size is missing"):
        Bundle.open(tmp_path)
