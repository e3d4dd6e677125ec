"""Every network of the corpus exported, verified and timed beside eager PyTorch: `make networks ENGINE=onnxruntime`.

Writes a line a network to a file, and goes on where it stopped. Times are CPU times of one thread, in turn with eager's
in the same process, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgestill.benchmarks.machine import commit_record, machine_record
from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.parity.fidelity import as_float
from edgestill.export.parity.verify import compare, draw_batches
from edgestill.export.students import ARCHITECTURES
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import EdgestillError
from tests.support.networks import BEYOND_EXPORT, NETWORKS
from tests.support.networks.network import CLASSES, LATENT_SIZE, VOCABULARY

STEPS, ROUNDS = 12, 5  # of 4 steps, an activation that crosses a kink in two moves the median


@dataclass(frozen=True)
class _Options(ExportOptions):
    """Export options whose student is made by a function."""

    make: Callable[[], nn.Module] | None = None

    def build(self) -> nn.Module:
        return super().build() if self.make is None else self.make()


def options_of(name: str, engine: str, batch: int) -> _Options:
    """How to export a network of the corpus, or `built-in:NAME`."""
    kind, _, own = name.partition("built-in:")
    if not kind:
        return _Options(own, batch=batch, objective=Objective("ce"), engines=(engine,))
    network = NETWORKS[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return network.build()

    return _Options(
        name, LATENT_SIZE, CLASSES, batch, input=InputSpec(network.input_shape, network.input_dtype),
        objective=Objective("ce"), engines=(engine,), make=make,
    )  # fmt: skip


def measure(name: str, engine: str, batch: int) -> dict[str, object]:
    """`ok`, the largest multiple of eager's error, the ratio of step times, and the seconds that export took."""
    options = options_of(name, engine, batch)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        with Bundle.open(export_bundle(options, Path(folder, "bundle"))) as bundle:
            record: dict[str, object] = {"network": name, "export_cpu_s": round(time.process_time() - start, 1)}
            random = np.random.default_rng(0)
            specs = options.samples
            samples = [_random(spec, 4 * batch, random) for spec in specs]
            batches = draw_batches(bundle, samples, random.integers(0, bundle.classes, 4 * batch), random)
            running = open_engine(bundle, engine, 1)
            try:
                entry = compare(bundle, {engine: running}, options.build, batches, STEPS)[engine]
                record |= {key: entry[key] for key in ("ok", "multiple", "worst") if key in entry}
                record |= _timed(running, options, bundle, next(batches))
            finally:
                running.close()
    return record


def _random(spec: InputSpec, count: int, random: np.random.Generator) -> np.ndarray:
    if spec.dtype == "int64":
        return random.integers(0, VOCABULARY, (count, *spec.shape))
    if spec.dtype == "uint8":
        return random.integers(0, 256, (count, *spec.shape)).astype(np.uint8)
    return random.standard_normal((count, *spec.shape)).astype(np.float32)


def _timed(engine: Engine, options: _Options, bundle: Bundle, batch: dict[str, np.ndarray]) -> dict[str, float]:
    student = options.build().train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.001, 0.9, weight_decay=1e-4)
    inputs = [as_float(batch[spec.name], spec) for spec in bundle.samples]
    labels = torch.from_numpy(batch["labels"])

    def eager() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = student.output(student.representation(student.perception(*inputs)))
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    def cpu_ms(run: Callable[[], object], steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            start = time.process_time()
            run()
            times.append((time.process_time() - start) * 1e3)
        return times

    def step() -> object:
        return engine.train_step(batch)

    once = cpu_ms(eager, 2)[1] + cpu_ms(step, 2)[1]
    steps = int(min(max(300 / max(once, 1e-3), 1), 20))
    theirs, ours = [], []
    for _ in range(ROUNDS):
        theirs += cpu_ms(eager, steps)
        ours += cpu_ms(step, steps)
    eager_ms, engine_ms = float(np.median(theirs)), float(np.median(ours))
    return {"eager_ms": round(eager_ms, 3), "engine_ms": round(engine_ms, 3), "ratio": round(engine_ms / eager_ms, 3)}


def chosen(kinds: Iterable[str]) -> list[str]:
    names = [f"built-in:{name}" for name in ARCHITECTURES] if "built-in" in kinds else []
    return names + [n for n, one in NETWORKS.items() if one.kind in kinds and n not in BEYOND_EXPORT]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--kinds", default="built-in,published,layer", help="built-in, published, layer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl that is appended to")
    parser.add_argument("--limit", type=int, help="at most so many more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    known = {record.get("network") for record in done}
    names = [name for name in chosen(args.kinds.split(",")) if name not in known][: args.limit]
    with args.output.open("a") as file:
        if not done:
            machine = {"machine": machine_record(), "commit": commit_record()}
            file.write(json.dumps({"engine": args.engine, "batch": args.batch, **machine}) + "\n")
        for i, name in enumerate(names, 1):
            try:
                record = measure(name, args.engine, args.batch)
            except Exception as error:  # one network's fault must not end the run
                what = error.message if isinstance(error, EdgestillError) else f"{type(error).__name__}: {error}"
                record = {"network": name, "ok": False, "error": what}
            done.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{i} of {len(names)}: {record}", file=sys.stderr, flush=True)
    measured = [record for record in done if "network" in record]
    passed = sum(bool(record["ok"]) for record in measured)
    ratios = sorted(record["ratio"] for record in measured if "ratio" in record)
    median = ratios[len(ratios) // 2] if ratios else None
    print(f"{passed} of {len(measured)} export and pass; step ÷ eager: median {median}, largest {ratios[-3:]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
