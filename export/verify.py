"""Parity of every engine with eager PyTorch: the same state, the same images, step by step."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from edgestill.export.exporter import publish, write_manifest
from edgestill.export.kinks import move_off_kinks
from edgestill.export.reference import ReferenceStep, rebuild_student
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.engines.protocol import Engine
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.errors import DataError, EngineError, UsageError
from edgestill.runtime.training.trainer import CONTRASTIVE_TEMPERATURE

LOSS_TOLERANCE = 1e-3
STATE_TOLERANCE = {"onnxruntime": 1e-4, "executorch": 2e-2, "onnxruntime-training": 1e-3}
SAME_CLASS = 0.99
EVALUATED_BATCHES = 16
FLOOR = 1e-3
"""A tensor whose largest entry is below this is compared with this instead: some gradients are zero but for rounding
(the scale of a BatchNorm before another), and so are their momenta."""

# With a small epsilon AdamW makes whole steps of gradients that are zero but for rounding.
HYPERPARAMETERS = {
    "learning_rate": 0.001,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-3,
    "alpha": 0.5,
    "temperature": 4.0,
    "logit_share": 0.4,
}


def verify_bundle(
    path: Path,
    steps: int = 20,
    engines: tuple[str, ...] | None = None,
    data: str | None = None,
    student: str | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """Compares the engines with eager PyTorch over consecutive steps and records the result in the bundle's manifest.

    Returns for each engine `ok`, `steps`, `loss_max_abs`, `state_max_abs`, `state_max_rel` (largest difference of a
    tensor over the largest entry of that tensor), `latents_max_abs`, `same_class` (share of images with the same
    class in evaluation after the last step), and `tensors`: [max_abs, max_rel] of each state tensor; for an engine
    that cannot be opened `ok` (false), `error` and `hint`, and its record in the manifest stays as it was.
    Errors: BundleError for a damaged bundle, UsageError, EngineError of an engine that fails, DataError.
    """
    path = Path(path)
    with Bundle.open(path) as bundle:
        chosen = engines or bundle.engines
        for engine in chosen:
            if engine not in bundle.engines:
                raise UsageError(
                    f"{path} has no graphs for {engine!r}", hint=f"it has {', '.join(bundle.engines)}"
                )
        images, labels = _samples(bundle, data, seed, progress)
        progress(f"eager PyTorch: {steps} steps")
        # One thread: PyTorch's threads wait by spinning, which on a busy machine takes ten times as long.
        torch.set_num_threads(1)
        reference = ReferenceStep(bundle, rebuild_student(bundle, student), HYPERPARAMETERS)
        random = np.random.default_rng(seed)
        batches, expected = [], []
        for _ in range(steps):
            drawn = random.choice(len(images), bundle.batch, replace=len(images) < bundle.batch)
            off_kinks = move_off_kinks(reference, images[drawn], random)
            batches.append(_batch(bundle, off_kinks, labels[drawn], random))
            expected.append((reference.train_step(batches[-1]), reference.state()))
        held_out = [images[_positions(len(images), bundle.batch, i)] for i in range(EVALUATED_BATCHES)]
        expected_outputs = [reference.encode(part) for part in held_out]
        report = {}
        for name in chosen:
            progress(f"{name}: {steps} steps")
            try:
                engine = open_engine(bundle, name, threads)
            except EngineError as error:  # the others are worth their report
                report[name] = {"ok": False, "error": error.message, "hint": error.hint}
                continue
            try:
                report[name] = _compare(name, engine, batches, expected, held_out, expected_outputs)
            finally:
                engine.close()
    _record(path, {name: entry for name, entry in report.items() if "error" not in entry})
    return report


def _samples(bundle: Bundle, data: str | None, seed: int, progress: Callable[[str], None]):
    if data is None and bundle.input.shape == (3, 32, 32) and bundle.input.dtype == "uint8":
        data = "cifar10-mini"
    if data is not None:
        try:
            train = load_splits(data, bundle.input, max(bundle.classes, 10)).train
            return train.images, train.labels % bundle.classes
        except DataError as error:
            raise UsageError(f"cannot verify on {data}: {error.message}", hint=error.hint) from error
    progress("random samples, for want of --data")
    random = np.random.default_rng(seed)
    shape = (8 * bundle.batch, *bundle.input.shape)
    if bundle.input.dtype == "uint8":
        images = random.integers(0, 256, shape).astype(np.uint8)
    else:
        images = random.standard_normal(shape).astype(np.float32)
    return images, random.integers(0, bundle.classes, len(images))


def _positions(count: int, batch: int, index: int) -> np.ndarray:
    return np.arange(index * batch, (index + 1) * batch) % count


def _batch(bundle: Bundle, images, labels, random: np.random.Generator) -> dict[str, np.ndarray]:
    """With uneven sample weights, so that a step that ignored them would be found out."""
    batch = {"images": images, "labels": labels.astype(np.int64)}
    numbers = HYPERPARAMETERS
    if bundle.objective.name == "crd":
        numbers = numbers | {"temperature": CONTRASTIVE_TEMPERATURE}
    for spec in bundle.inputs("train_step"):
        if spec.name in numbers:
            batch[spec.name] = np.full(spec.shape, numbers[spec.name], np.float32)
        elif spec.name.endswith("_weights"):
            batch[spec.name] = random.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        elif spec.name.startswith("teacher_"):
            batch[spec.name] = random.standard_normal(spec.shape).astype(np.float32)
    return batch


def _compare(name: str, engine: Engine, batches, expected, held_out, expected_outputs) -> dict:
    tensors: dict[str, list[float]] = {}
    loss_max_abs = latents_max_abs = 0.0
    for batch, (metrics, state) in zip(batches, expected, strict=True):
        ours = engine.train_step(batch)
        for key in metrics.keys() - {"latents", "logits"}:
            loss_max_abs = max(loss_max_abs, _difference(ours[key], metrics[key]))
        latents_max_abs = max(latents_max_abs, _difference(ours["latents"], metrics["latents"]))
        for key, value in engine.state().items():
            difference = _difference(value, state[key])
            relative = difference / max(float(np.abs(state[key]).max()), FLOOR)
            seen = tensors.setdefault(key, [0.0, 0.0])
            tensors[key] = [max(seen[0], difference), max(seen[1], relative)]
    same = []
    for images, (latents, logits) in zip(held_out, expected_outputs, strict=True):
        our_latents, our_logits = engine.encode(images)
        latents_max_abs = max(latents_max_abs, _difference(our_latents, latents))
        same.append(our_logits.argmax(1) == logits.argmax(1))
    state_max_rel = max(relative for _, relative in tensors.values())
    same_class = float(np.mean(same))
    ok = (
        loss_max_abs <= LOSS_TOLERANCE and state_max_rel <= STATE_TOLERANCE[name] and same_class >= SAME_CLASS
    )
    return {
        "ok": bool(ok),
        "steps": len(batches),
        "loss_max_abs": loss_max_abs,
        "state_max_abs": max(difference for difference, _ in tensors.values()),
        "state_max_rel": state_max_rel,
        "latents_max_abs": latents_max_abs,
        "same_class": same_class,
        "tensors": tensors,
    }


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    difference = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(initial=0.0))
    return difference if np.isfinite(difference) else float(np.finfo(np.float32).max)


def _record(path: Path, report: dict[str, dict]) -> None:
    """Writes the report into the manifest; a zipped bundle is packed again."""
    with Bundle.open(path) as bundle:
        source = bundle.path
        manifest = json.loads((source / "manifest.json").read_text())
        manifest["parity"] = manifest.get("parity", {}) | report
        if path.is_dir():
            write_manifest(source, manifest)
            return
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            folder = Path(scratch) / "bundle"
            shutil.copytree(source, folder)
            write_manifest(folder, manifest)
            publish(folder, path)


def print_report(report: dict[str, dict]) -> None:
    """A table a tensor and a line an engine, for people."""
    compared = {name: entry for name, entry in report.items() if "error" not in entry}
    for name, entry in compared.items():
        width = max(map(len, entry["tensors"]))
        print(f"{name}: largest difference from eager PyTorch over {entry['steps']} steps")
        print(f"  {'tensor':{width}}  {'absolute':>9}  {'relative':>9}")
        for tensor, (absolute, relative) in entry["tensors"].items():
            print(f"  {tensor:{width}}  {absolute:9.1e}  {relative:9.1e}")
    for name, entry in report.items():
        if "error" in entry:
            print(f"FAIL {name}: not compared: {entry['error']}\n     hint: {entry['hint']}")
            continue
        print(
            f"{'ok  ' if entry['ok'] else 'FAIL'} {name}: losses {entry['loss_max_abs']:.1e} (≤ {LOSS_TOLERANCE:.0e}), "
            f"state {entry['state_max_rel']:.1e} of a tensor's largest entry (≤ {STATE_TOLERANCE[name]:.0e}), "
            f"latents {entry['latents_max_abs']:.1e}, same class for {entry['same_class']:.1%} (≥ {SAME_CLASS:.0%})"
        )
