"""Training runs: against NumPy, resumed, killed, mixed with a transfer set, and refused."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.runtime.commands.train import stop_requests
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import Interrupted, StateError, TrainingError, UsageError
from edgestill.runtime.stop_signals import STOP_SIGNALS
from edgestill.runtime.training.checkpoint import load_checkpoint
from edgestill.runtime.training.evaluation import score
from edgestill.runtime.training.hyperparameters import resolve
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.schedule import Schedule
from edgestill.runtime.training.teacher import Teacher, encode_all, split_teacher_name
from edgestill.runtime.training.trainer import prepare, train
from tests.support.handmade_bundle import CLASSES, SIZE, reference_step, write_handmade_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a student `s`, a teacher `t`, a plain `ce` student `c`, data and a transfer set."""
    write_handmade_bundle(tmp_path / "s")
    write_handmade_bundle(tmp_path / "t", seed=1)
    write_handmade_bundle(tmp_path / "c", objective="ce", scale=0.05)
    draw = np.random.default_rng(0)
    y = draw.integers(0, CLASSES, 90)
    x = (draw.integers(0, 120, (90, SIZE, SIZE, 3)) + 40 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    np.savez(tmp_path / "o.npz", x=draw.integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8))
    return tmp_path


def run_of(work: Path, settings: TrainSettings) -> Run:
    bundle = Bundle.open(work / "s")
    data = load_splits(work / "d.npz", bundle.input, bundle.classes).train
    teacher = Teacher(str(work / "t"), bundle, None, 1)
    outputs = teacher.outputs(data.images, data.digest, work / "cache.safetensors")
    teacher.close()
    return plan(bundle, data, settings, teacher=outputs, origins={"teacher": teacher.digest})


SETTINGS = TrainSettings(
    epochs=3, seed=5, schedule=Schedule("cosine", 3), augmentations=("flip", "crop"),
    hyperparameters={"learning_rate": 0.02, "alpha": 0.3},
)  # fmt: skip


def test_a_run_follows_numpy(work: Path) -> None:
    run = run_of(work, SETTINGS)
    engine = open_engine(run.bundle, threads=1)
    state = run.bundle.initial_state()
    assert prepare(engine, run, work / "state.safetensors") == 0
    for record in train(engine, run, work / "state.safetensors", checkpoint_every=7):
        state, metrics = reference_step(state, run.inputs(record.step - 1))
        assert record.loss == pytest.approx(metrics["loss"][0], rel=1e-4)
        assert record.distillation_loss == pytest.approx(metrics["distillation_loss"][0], rel=1e-4)
        labels = run.inputs(record.step - 1)["labels"]
        assert record.accuracy == np.mean(metrics["logits"].argmax(axis=1) == labels)
    assert (record.step, record.epoch) == (24, 3)
    # the official package reads the state file
    saved = safetensors.numpy.load_file(work / "state.safetensors")
    for name, array in saved.items():
        np.testing.assert_allclose(array, state[name], rtol=1e-4, atol=1e-5)


def finish(run: Run, state_path: Path, stop_after: int | None = None) -> bytes:
    engine = open_engine(run.bundle, threads=1)
    first = prepare(engine, run, state_path)
    asked = iter(range(1, 1000))
    steps = train(
        engine, run, state_path, first_step=first, checkpoint_every=5,
        should_stop=lambda: next(asked) == stop_after,
    )  # fmt: skip
    if stop_after is None:
        assert len(list(steps)) == run.total_steps - first
    else:
        with pytest.raises(Interrupted):
            list(steps)
    return state_path.read_bytes()


def test_an_interrupted_run_ends_with_the_same_bytes(work: Path) -> None:
    whole = finish(run_of(work, SETTINGS), work / "whole.safetensors")
    for stop_after in (1, 7, 1, 5):
        partial = finish(run_of(work, SETTINGS), work / "parts.safetensors", stop_after)
        assert partial != whole
    assert load_checkpoint(work / "parts.safetensors", Bundle.open(work / "s")).step == 14
    assert finish(run_of(work, SETTINGS), work / "parts.safetensors") == whole


def test_other_settings_are_named(work: Path) -> None:
    path = work / "state.safetensors"
    finish(run_of(work, SETTINGS), path, stop_after=3)
    other = run_of(work, TrainSettings(epochs=4, seed=5, hyperparameters={"alpha": 0.1}))
    engine = open_engine(other.bundle, threads=1)
    with pytest.raises(StateError) as error:
        prepare(engine, other, path)
    assert "a run at step 3" in error.value.message and "alpha 0.3 → 0.1" in error.value.message
    assert "--restart" in error.value.hint
    assert prepare(engine, other, path, restart=True) == 0


def test_alpha_walks_to_its_end_and_an_interrupted_run_knows_where_it_was(work: Path) -> None:
    settings = replace(SETTINGS, alpha_end=0.9)
    run = run_of(work, settings)
    alphas = [run.inputs(step)["alpha"][0] for step in range(run.total_steps)]
    np.testing.assert_allclose(alphas, np.linspace(0.3, 0.9, 24), rtol=1e-6)
    whole = finish(run, work / "whole.safetensors")
    assert whole != finish(run_of(work, SETTINGS), work / "constant.safetensors")
    finish(run_of(work, settings), work / "parts.safetensors", stop_after=7)
    with pytest.raises(StateError, match="alpha_end"):
        prepare(open_engine(run.bundle, threads=1), run_of(work, SETTINGS), work / "parts.safetensors")
    assert finish(run_of(work, settings), work / "parts.safetensors") == whole


def test_a_file_that_is_no_run_is_not_overwritten(work: Path) -> None:
    run = run_of(work, SETTINGS)
    path = work / "s/state.safetensors"
    with pytest.raises(StateError, match="not the state of a training run"):
        prepare(open_engine(run.bundle), run, path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(work: Path) -> None:
    run = run_of(work, TrainSettings(epochs=50, hyperparameters={"learning_rate": 1000}))
    path, engine = work / "state.safetensors", open_engine(run.bundle, threads=1)
    prepare(engine, run, path)
    with pytest.raises(TrainingError, match="keeps the state of step"):
        for _ in train(engine, run, path, checkpoint_every=1):
            pass
    kept = load_checkpoint(path, run.bundle)
    assert kept.step >= 1 and all(np.isfinite(array).all() for array in kept.state.values())


def test_hyperparameters_that_the_step_does_not_take_are_refused(work: Path) -> None:
    student, plain = Bundle.open(work / "s"), Bundle.open(work / "c")
    expected = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0, "alpha": 0.5}
    assert resolve(student, {}) == expected
    for bundle, given in ((plain, "alpha"), (student, "temperature"), (student, "beta1")):
        with pytest.raises(UsageError, match=f"takes no {given}"):
            resolve(bundle, {given: 0.5})
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="out of range"):
            resolve(student, {"alpha": value})


def test_the_teacher_is_asked_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(work / "s")
    images = load_splits(work / "d.npz", bundle.input, CLASSES).train.images[:13]
    first = Teacher(str(work / "t"), bundle, "onnxruntime", 1)
    computed = first.outputs(images, "digest", work / "cache.safetensors")
    engine = open_engine(Bundle.open(work / "t"))
    for i, image in enumerate(images):  # one by one, as an oracle for the batching
        latents, logits = engine.encode(np.repeat(image[None], 8, axis=0))
        np.testing.assert_allclose(computed.latents[i], latents[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(computed.logits[i], logits[0], rtol=1e-5, atol=1e-6)

    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return encode_all(*arguments)

    monkeypatch.setattr("edgestill.runtime.training.teacher.encode_all", counted)
    again = Teacher(str(work / "t"), bundle, "onnxruntime", 1)
    cached = again.outputs(images, "digest", work / "cache.safetensors")
    np.testing.assert_array_equal(cached.latents, computed.latents)
    assert not calls
    again.outputs(images, "other images", work / "cache.safetensors")
    (work / "cache.safetensors").write_bytes(b"damaged")
    again.outputs(images, "other images", work / "cache.safetensors")
    assert len(calls) == 2


def test_a_file_that_is_no_teacher_cache_is_kept(work: Path) -> None:
    foreign = work / "kept.teacher.safetensors"
    safetensors.numpy.save_file({"mine": np.ones(3, np.float32)}, foreign)
    before = foreign.read_bytes()
    with Bundle.open(work / "s") as bundle:
        teacher = Teacher(str(work / "t"), bundle, None, 1)
        with pytest.raises(UsageError, match="another file"):
            teacher.outputs(bundle_images(bundle), "digest", foreign)
        teacher.close()
    assert foreign.read_bytes() == before


def bundle_images(bundle: Bundle) -> np.ndarray:
    return np.zeros((bundle.batch, *bundle.input.shape), bundle.input.dtype)


def test_teacher_names_split_at_the_last_colon(tmp_path: Path) -> None:
    assert split_teacher_name("b:s.safetensors") == (Path("b"), Path("s.safetensors"))
    assert split_teacher_name("b") == (Path("b"), None)
    (tmp_path / "a:b").mkdir()
    assert split_teacher_name(str(tmp_path / "a:b")) == (tmp_path / "a:b", None)


def test_scores_by_hand() -> None:
    logits = np.array([[2, 0, 0], [0, 3, 0], [5, 0, 0], [1000, 0, 0]], np.float32)
    result = score(logits, np.array([0, 1, 1, 0]), 3, ("a", "b", "c"))
    assert result.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert (result.accuracy, result.per_class, result.samples) == (0.75, [1.0, 0.5, None], 4)
    shares = [np.exp(2) / (np.exp(2) + 2), np.exp(3) / (np.exp(3) + 2), 1 / (np.exp(5) + 2), 1]
    assert result.loss == pytest.approx(-np.log(shares).mean())


def arguments(work: Path, state: str, *more: str) -> list[str]:
    return [
        "train", str(work / "s"), "--data", str(work / "d.npz"), "--teacher", str(work / "t"),
        "--state", str(work / state), "--threads", "1", "--json", *more,
    ]  # fmt: skip


def test_train_prints_a_line_a_step_and_a_summary(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(work, "x.safetensors", "--epochs", "2")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(1, 17))
    summary = lines[-1]["summary"]
    assert summary["samples"] == 30 and summary["ms_per_step_median"] > 0
    assert 10e6 < summary["peak_rss_bytes"] < 10e9
    # evaluate says the same about the state
    common = ["--data", str(work / "d.npz"), "--json"]
    assert main(["evaluate", str(work / "s"), "--state", str(work / "x.safetensors"), *common]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == summary["accuracy"] and evaluated["per_class"] == summary["per_class"]
    # a finished run says so, and trains no more
    before = (work / "x.safetensors").read_bytes()
    assert main(arguments(work, "x.safetensors", "--epochs", "2")) == 0
    output = capsys.readouterr()
    assert "finished" in output.err and len(output.out.splitlines()) == 1
    assert json.loads(output.out)["summary"]["accuracy"] == summary["accuracy"]
    assert (work / "x.safetensors").read_bytes() == before
    # and its state is where another run may start
    more = ["--epochs", "1", "--init", str(work / "x.safetensors")]
    assert main(arguments(work, "y.safetensors", *more)) == 0
    continued = json.loads(capsys.readouterr().out.splitlines()[0])
    assert continued["loss"] < lines[0]["loss"]


def test_train_mixes_a_transfer_set_in(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--transfer", str(work / "o.npz"), "--transfer-fraction", "0.25"]
    assert main(arguments(work, "x.safetensors", *more)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) - 1 == 60 // 6  # six of eight samples in a batch are private
    assert {round(line["accuracy"] * 6, 6) % 1 for line in lines[:-1]} == {0.0}
    cached = safetensors.numpy.load_file(work / "x.teacher-transfer.safetensors")
    assert cached["latents"].shape == (20, 5)


TRAIN = ("{w}/c", "--data", "{w}/d.npz", "--state", "{w}/x")


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["train", "{w}/s", "--data", "{w}/d.npz", "--state", "{w}/x"], 2, "needs a teacher"),
        (["train", *TRAIN, "--teacher", "{w}/t"], 2, "takes no teacher"),
        (["train", *TRAIN, "--alpha", "0.1"], 2, "takes no alpha"),
        (["train", *TRAIN, "--alpha-end", "0.1"], 2, "takes no alpha"),
        (["train", "{w}/s", *TRAIN[1:], "--teacher", "{w}/t", "--alpha-end", "1.1"], 2, "alpha 1.1 is out of range"),
        (["train", *TRAIN, "--transfer", "{w}/o.npz"], 2, "--teacher"),
        (["train", "{w}/c", "--data", "{w}/d.npz", "--state", "{w}/c/x"], 2, "lies in the bundle"),
        (["train", *TRAIN, "--augment", "spin"], 2, "'spin'"),
        (["train", *TRAIN, "--epochs", "0"], 2, "--epochs 1"),
        (["train", "{w}/c", "--data", "{w}/d.npz"], 2, "--state"),
        (["train", *TRAIN, "--engine", "executorch"], 2, "--engines"),
        (["train", "{w}/none", "--data", "{w}/d.npz", "--state", "{w}/x"], 2, "no such bundle"),
        (["evaluate", "{w}/c", "--data", "nothing"], 2, "no data called"),
        (["evaluate", "{w}/c", "--data", "cifar10-mini"], 1, "32x32x3, the bundle takes 3x6x6"),
        (["evaluate", "{w}/c", "--data", "{w}/d.npz", "--state", "{w}/none"], 2, "no such state"),
        (["evaluate", "{w}/c", "--data", "{w}/d.npz", "--state", "{w}/d.npz"], 1, "safetensors"),
        (["train", *TRAIN, "--threads", "-1"], 2, "--threads -1"),
        (["fly"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)  # fmt: skip
def test_mistakes_have_a_message_and_a_code(
    work: Path, capsys: pytest.CaptureFixture[str], command: list[str], code: int, message: str
) -> None:
    assert main([part.format(w=work) for part in command]) == code
    output = capsys.readouterr()
    assert message in output.err and output.out == ""


def test_a_confusion_matrix_is_drawn(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = work / "confusion.png"
    command = ["evaluate", str(work / "c"), "--data", str(work / "d.npz"), "--confusion", str(picture)]
    assert main(command) == 0
    assert "accuracy" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_inspect_and_doctor_speak_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(work / "s"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engines"]["onnxruntime"]["train_step"]["operators"]["Gemm"] == 4
    assert report["state"]["slot"]["elements"] == report["student"]["parameters"] == 569
    assert main(["inspect", str(work / "s")]) == 0
    assert "handmade-linear" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    engines = {engine["name"]: engine for engine in json.loads(capsys.readouterr().out)["engines"]}
    assert engines["onnxruntime"]["usable"] is True


def start(work: Path, state: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgestill.runtime.cli", *arguments(work, state, "--epochs", "150", *more)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.contract
def test_killed_runs_end_with_the_same_bytes(work: Path) -> None:
    more = ("--checkpoint-every", "3", "--augment", "flip,crop", "--schedule", "cosine")
    output, errors = start(work, "whole.safetensors", *more).communicate(timeout=120)
    assert errors == "" and len(output.splitlines()) == 1201
    draw, kills = random.Random(7), 0
    for _ in range(4):
        process = start(work, "killed.safetensors", *more)
        process.stdout.readline()  # it has made a step
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1
    last = start(work, "killed.safetensors", *more)
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0 and "going on from step" in errors + "going on from step" * (
        "finished" in errors
    )
    assert (work / "killed.safetensors").read_bytes() == (work / "whole.safetensors").read_bytes()


@pytest.mark.contract
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_with_a_checkpoint_of_the_last_step(work: Path, number: signal.Signals) -> None:
    process = start(work, "x.safetensors", "--epochs", "100000", "--checkpoint-every", "1000000")
    process.stdout.readline()
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "run the same command again" in errors
    last = json.loads(output.splitlines()[-1])["step"]
    assert load_checkpoint(work / "x.safetensors", Bundle.open(work / "s")).step == last


@pytest.mark.contract
def test_the_runtime_imports_neither_torch_nor_onnx_nor_an_engine_for_help() -> None:
    code = (
        "import sys, edgestill.runtime.cli, edgestill.runtime.commands.train, edgestill.runtime.commands.evaluate\n"
        "import edgestill.runtime.commands.doctor, edgestill.runtime.commands.inspect\n"
        "import edgestill.runtime.commands.predict, edgestill.runtime.training.event_file\n"
        "edgestill.runtime.cli.main(['--help'])\n"
        "found = {'torch', 'onnx', 'onnxruntime', 'executorch', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "raise SystemExit(', '.join(found) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "bench" in result.stdout


@pytest.mark.contract
def test_training_needs_nothing_but_numpy_and_an_engine(work: Path) -> None:
    """As on a device: every import beyond the standard library, NumPy, ONNX Runtime and the runtime fails."""
    code = (
        "import sys, importlib.abc\n"
        "allowed = {*sys.stdlib_module_names, 'numpy', 'onnxruntime', 'edgestill'}\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        ours = name.startswith('edgestill.') and not name.startswith('edgestill.runtime')\n"
        "        if ours or name.split('.')[0] not in allowed:\n"
        "            raise ModuleNotFoundError(f'a device has no {name}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from edgestill.runtime.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "for command in ('export', 'bench'):\n"
        "    assert main([command]) == 1\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments(work, "x.safetensors")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "summary" in result.stdout.splitlines()[-1]
    assert "pip install 'edgestill[export]'" in result.stderr


LONG = ("--epochs", "100000", "--checkpoint-every", "1000000")


@pytest.mark.contract
def test_who_ignores_a_closing_terminal_goes_on(work: Path) -> None:
    """As `nohup` starts a command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(work, "x.safetensors", *LONG)
    finally:
        signal.signal(signal.SIGHUP, before)
    first = json.loads(process.stdout.readline())["step"]
    process.send_signal(signal.SIGHUP)
    assert [json.loads(process.stdout.readline())["step"] for _ in range(50)] == [*range(first + 1, first + 51)]
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 1 and load_checkpoint(work / "x.safetensors", Bundle.open(work / "s")).step > first


def test_after_a_signal_each_acts_as_it_always_did() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with stop_requests() as requests:
        assert any(signal.getsignal(number) != handler for number, handler in before.items())
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests == [signal.SIGTERM]
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.contract
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_terminal_leaves_a_checkpoint(work: Path, more: list[str]) -> None:
    master, slave = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    words = [*arguments(work, "x.safetensors"), *LONG]
    words = [word for word in words if word != "--json"] + more
    process = subprocess.Popen(
        [sys.executable, "-m", "edgestill.runtime.cli", *words],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(slave)
    written = b""
    while b"loss" not in written:
        written += os.read(master, 65536)
    os.close(master)
    assert process.wait(timeout=60) == 1
    assert load_checkpoint(work / "x.safetensors", Bundle.open(work / "s")).step > 0


@pytest.mark.contract
def test_a_reader_that_leaves_ends_a_run_with_a_checkpoint(work: Path) -> None:
    process = start(work, "x.safetensors", *LONG)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 1 and "run the same command again" in errors and "Traceback" not in errors
    assert load_checkpoint(work / "x.safetensors", Bundle.open(work / "s")).step > 0


def test_a_run_that_fails_names_only_a_checkpoint_of_its_own(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weight decay multiplies the weights by about a million a step."""
    kept, wild = work / "x.safetensors", ("--lr", "1000", "--weight-decay", "1000")

    def fails(*more: str) -> str:
        capsys.readouterr()
        assert main(arguments(work, "x.safetensors", *wild, *more)) == 1
        return capsys.readouterr().err.partition("hint:")[0]

    assert str(kept) not in fails() and not kept.exists()
    assert main(arguments(work, "x.safetensors")) == 0
    before = kept.read_bytes()
    # an older run's file, which --restart would overwrite, holds nothing of this one
    assert str(kept) not in fails("--restart") and kept.read_bytes() == before
