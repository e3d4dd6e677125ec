"""Parity of every engine with eager PyTorch: each step from the same state, judged by eager float32's own error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgestill.export.parity.fidelity import random_samples
from edgestill.export.parity.reference import Arrays, ReferenceStep, rebuild_student
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.writer import replacing, write_manifest
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.engines.registry import ENGINES, Engine, open_engine
from edgestill.runtime.errors import DataError, EngineError, UsageError
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS, default

ROUNDING, SHARE = 2e-7, 1e-5
"""Eager's error counts as at least this share of a tensor, and of its update: it may be exact by luck."""
DRIFT, LOSS_SHARE = 10, 0.02
"""How many times eager's distance, or this share of it, a loss of free running may be from float64's."""
SAME_CLASS = 0.99
EVALUATED_BATCHES = 8
_LARGEST = float(np.finfo(np.float32).max)


def verify_bundle(
    path: Path,
    steps: int = 20,
    engines: tuple[str, ...] | None = None,
    data: str | None = None,
    student: str | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    resize: bool = False,
    skip_broken: bool = False,
) -> dict[str, dict]:
    """Compares engines with eager PyTorch; returns and writes into the manifest their parity records (docs/bundle.md).

    An engine that cannot be opened has `ok` (false), `error` and `hint`; its record in the manifest stays as it was.
    Errors: BundleError for a damaged bundle, UsageError, EngineError of an engine that fails, DataError.
    """
    path, report, running = Path(path), {}, {}
    with Bundle.open(path) as bundle, ExitStack() as opened:
        chosen = engines or bundle.engines
        for name in (name for name in chosen if name not in bundle.engines):
            raise UsageError(f"{path} has no graphs for {name!r}", hint=f"it has {', '.join(bundle.engines)}")
        # One thread: PyTorch's threads wait by spinning, which on a busy machine takes ten times as long.
        opened.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        model, random = rebuild_student(bundle, student), np.random.default_rng(seed)
        batches = draw_batches(bundle, *_samples(bundle, model, data, random, progress, resize, skip_broken), random)
        for name in chosen:
            try:
                running[name] = open_engine(bundle, name, threads)
                opened.callback(running[name].close)
            except EngineError as error:  # the others are worth their report
                report[name] = {"ok": False, "error": error.message, "hint": error.hint}
        if running:
            progress(f"{', '.join(running)} beside eager PyTorch: {steps} steps")
            records = compare(bundle, running, lambda: rebuild_student(bundle, student), batches, steps)
            _record(bundle, records)
            report |= records
    return {name: report[name] for name in chosen}


def compare(
    bundle: Bundle,
    engines: Mapping[str, Engine],
    build: Callable[[], nn.Module],
    batches: Iterator[Arrays],
    steps: int,
) -> dict[str, dict]:
    """The parity record of each engine over `steps` training steps and some batches in inference mode.

    `build` makes the student anew: a closure in a copy of one would still call the original.
    Every step starts from the state of the oracle, eager PyTorch in float64. The yardstick is the error of eager
    float32 from there, and from a state moved by rounding. Errors: UsageError where the oracle diverges.
    """
    students = [build() for _ in range(4)]
    if students[0] is students[1]:  # a factory that keeps what it makes
        students = [copy.deepcopy(one) for one in students]
    dtypes = (torch.float64, torch.float32, torch.float32, torch.float32)
    oracle, eager, moved, alone = (ReferenceStep(bundle, *pair) for pair in zip(students, dtypes, strict=True))
    random, state, curve = np.random.default_rng(0), bundle.initial_state(), []
    free = {name: (runner, state, []) for name, runner in [*engines.items(), ("", alone)]}
    seen: dict[str, dict[str, list]] = {name: {} for name in engines}
    same: dict[str, list] = {name: [] for name in engines}

    def see(name: str, found: Arrays, *others) -> None:
        for key, row in _compared(found, *others).items():
            seen[name].setdefault(key, []).append(row)

    for step in range(steps):
        batch = next(batches)
        expected = _step(oracle, state, batch)
        if not all(np.isfinite(array).all() for array in expected.values()):
            message = f"eager PyTorch itself gives NaN or infinity in step {step + 1}"
            raise UsageError(message, hint="check the student's weights and the data")
        near = _step(eager, state, batch), _step(moved, _moved(state, random), batch)
        for name, engine in engines.items():
            see(name, _step(engine, state, batch), expected, near, state)
        for name, (runner, own, losses) in free.items():
            after = _step(runner, own, batch)
            losses.append(float(after["loss"][0]))
            free[name] = runner, {key: after[key] for key in state}, losses
        curve.append(float(expected["loss"][0]))
        state = {key: expected[key].astype(np.float32) for key in state}
    for runner in (oracle, eager, *engines.values()):
        runner.load_state(state)
    moved.load_state(_moved(state, random))
    for batch in (next(batches) for _ in range(EVALUATED_BATCHES)):
        samples = [batch[spec.name] for spec in oracle.samples]
        expected, *near = (_encode(runner, samples) for runner in (oracle, eager, moved))
        logits = expected["encode.logits"]
        for name, engine in engines.items():
            found = _encode(engine, samples)
            see(name, found, expected, near, {})
            ours = np.take_along_axis(logits, found["encode.logits"].argmax(1, keepdims=True), 1)
            same[name] += [logits.max(1, keepdims=True) - ours <= 1e-4 * np.abs(logits).max()]  # ties do no harm
    curves = {name: losses for name, (_, _, losses) in free.items()} | {"oracle": curve}
    return {name: _judged(name, seen[name], curves, tuple(state), float(np.mean(same[name]))) for name in engines}


def _step(runner: Engine, state: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    runner.load_state(state)
    metrics = runner.train_step(batch)
    return runner.state() | metrics


def _encode(runner: Engine, samples: list[np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(("encode.latents", "encode.logits"), runner.encode(*samples), strict=True))


def _moved(state: Arrays, random: np.random.Generator) -> dict[str, np.ndarray]:
    return {n: (a * (1 + 2.0**-24 * random.uniform(-1, 1, a.shape))).astype(np.float32) for n, a in state.items()}


def _compared(found: Arrays, expected: Arrays, near, before: Arrays) -> dict[str, tuple[float, float, float]]:
    """For each tensor the multiple of eager's error, and the largest difference, absolute and of the largest entry.

    The last is left 0 where the tensor's update is nothing but rounding.
    """

    def norm(array: np.ndarray) -> float:
        return float(np.linalg.norm(np.asarray(array, np.float64).ravel()))

    rows = {}
    for name in expected:
        # AdamW's mean square as its root, as it is used: an error of it is one of the gradient, not of its square
        read = np.sqrt if name.startswith("optimizer.exp_avg_sq.") else np.asarray
        wanted, start, got, *eager = (read(one.get(name, 0.0)) for one in (expected, before, found, *near))
        update, own = norm(wanted - start), max(norm(one - wanted) for one in eager)
        apart = np.nan_to_num(np.abs(got - wanted), nan=_LARGEST, posinf=_LARGEST)
        unit = max(own, ROUNDING * norm(wanted), SHARE * update, 1e-30)
        largest, scale = float(apart.max(initial=0)), float(np.abs(wanted).max(initial=1e-30))
        rows[name] = norm(apart) / unit, largest, largest / scale if own < 0.1 * update else 0.0
    return rows


def _judged(name: str, seen: dict[str, list], curves: dict[str, list], state: tuple[str, ...], same: float) -> dict:
    tensors = {}
    for key, rows in seen.items():
        multiples, absolute, relative = np.minimum(rows, _LARGEST).T
        tensors[key] = [float(absolute.max()), float(relative.max()), float(np.median(multiples))]
    worst = max(tensors, key=lambda key: tensors[key][2])
    drift, of_eager = (float(np.abs(np.subtract(curves[key], curves["oracle"])).max()) for key in (name, ""))
    drifts = drift <= DRIFT * max(of_eager, LOSS_SHARE * np.abs(curves["oracle"]).max())
    return {
        "ok": bool(tensors[worst][2] <= ENGINES[name].tolerance and drifts and same >= SAME_CLASS),
        "steps": len(curves[name]),
        "multiple": tensors[worst][2],
        "worst": worst,
        "loss_max_abs": max(value[0] for key, value in tensors.items() if key.endswith("loss")),
        "state_max_abs": max(tensors[key][0] for key in state),
        "state_max_rel": max(tensors[key][1] for key in state),
        "latents_max_abs": max(tensors["latents"][0], tensors["encode.latents"][0]),
        "same_class": same,
        "drift": float(np.nan_to_num(drift, nan=_LARGEST)),
        "eager_drift": float(np.nan_to_num(of_eager, nan=_LARGEST)),
        "losses": [float(np.nan_to_num(loss, nan=_LARGEST)) for loss in curves[name]],
        "tensors": tensors,
    }


def _samples(
    bundle: Bundle,
    student: nn.Module,
    data: str | None,
    random: np.random.Generator,
    progress: Callable,
    resize: bool = False,
    skip_broken: bool = False,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The tensors of some samples, and labels."""
    specs = bundle.samples
    if data is None and [(spec.shape, spec.dtype) for spec in specs] == [((3, 32, 32), "uint8")]:
        data = "cifar10-mini"
    if data is None:
        progress("random samples, for want of --data")
        count = 8 * bundle.batch
        return random_samples(student, specs, count, random), random.integers(0, bundle.classes, count)
    try:
        train = load_splits(data, bundle.input, max(bundle.classes, 10), resize, skip_broken=skip_broken).train
    except DataError as error:
        raise UsageError(f"cannot verify on {data}: {error.message}", hint=error.hint) from error
    return [train.images], train.labels % bundle.classes


def draw_batches(bundle: Bundle, tensors, labels, random: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """With uneven sample weights, some weight decay and a norm that clips much, so that a step that ignored them would
    be found out."""
    kinds = (bundle.objective.name, bundle.optimizer.name)
    numbers = {name: default(name, *kinds) for name in HYPERPARAMETERS}
    numbers |= {"logit_share": 0.4, "weight_decay": 1e-2, "clip_norm": 0.1}
    while True:
        drawn = random.choice(len(labels), bundle.batch, replace=len(labels) < bundle.batch)
        batch = {spec.name: tensor[drawn] for spec, tensor in zip(bundle.samples, tensors, strict=True)}
        batch["labels"] = labels[drawn].astype(np.int64)
        for spec in bundle.inputs("train_step"):
            if spec.name in numbers:
                batch[spec.name] = np.full(spec.shape, numbers[spec.name], np.float32)
            elif spec.name.endswith("_weights"):
                batch[spec.name] = random.uniform(0.5, 1.5, spec.shape).astype(np.float32)
            elif spec.name.startswith("noise."):
                batch[spec.name] = random.random(spec.shape, np.float32)
            elif spec.name not in batch:
                batch[spec.name] = random.standard_normal(spec.shape).astype(np.float32)
        yield batch


def _record(bundle: Bundle, records: dict[str, dict]) -> None:
    """Writes them into the manifest; a zipped bundle is packed again."""
    manifest = json.loads(bundle.file("manifest.json").read_bytes())
    manifest["parity"] = manifest.get("parity", {}) | records
    place = bundle.source
    with nullcontext(place) if place.is_dir() else replacing(place, bundle.path) as folder:
        write_manifest(folder, manifest)


def print_report(report: dict[str, dict]) -> None:
    """A table a tensor and a line an engine, for people."""
    lines = []
    for name, entry in report.items():
        if "error" in entry:
            lines.append(f"FAIL {name}: not compared: {entry['error']}\n     hint: {entry['hint']}")
            continue
        width = max(map(len, entry["tensors"]))
        print(f"{name}: largest difference from float64 over {entry['steps']} steps, multiple of eager float32's")
        print(f"  {'tensor':{width}}  {'absolute':>9}  {'relative':>9}  {'multiple':>9}")
        for tensor, (absolute, relative, multiple) in entry["tensors"].items():
            print(f"  {tensor:{width}}  {absolute:9.1e}  {relative:9.1e}  {multiple:9.3g}")
        lines.append(
            f"{'ok  ' if entry['ok'] else 'FAIL'} {name}: at most {entry['multiple']:.3g} times eager float32's error "
            f"(≤ {ENGINES[name].tolerance:g}; {entry['worst']}), same class for {entry['same_class']:.1%} "
            f"(≥ {SAME_CLASS:.0%}), free-running losses {entry['drift']:.1e} off (eager: {entry['eager_drift']:.1e})"
        )
    print("\n".join(lines))
