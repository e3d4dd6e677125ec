"""Is the state after many steps the same bit for bit on another architecture? `make digests`.

This machine's engine trains a bundle on 1, 2, 3 and 8 threads; steps.c does the same with the aarch64 library under
qemu. Students are small, for an emulator does a hundredth of the work; all kernels occur.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from edgestill.benchmarks.machine import commit_record, machine_record, now, results_file_name
from edgestill.benchmarks.workload import make_batches, read_manifest
from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.export.students import ARCHITECTURES
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from edgestill.runtime.engines.native import LIMIT_VARIABLE
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.engines.state import NEXT
from edgestill.runtime.native.architecture import machine
from edgestill.runtime.native.compile import SOURCES, compile_library

THREADS = (1, 2, 3, 8)
BATCH, LATENT_SIZE = 2, 8
SMALL: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "cnn3": ((16, 16, 24), (3, 16, 16)),
    "cnn4": ((8, 16, 16, 24), (3, 16, 16)),
    "cnn5": ((8, 16, 16, 16, 24), (3, 16, 16)),
    "resnet8": ((8, 16, 16), (3, 16, 16)),
    "resnet18": ((8, 16, 16, 16), (3, 16, 16)),
    "mobilenet-tiny": ((8, 16, 24), (3, 16, 16)),
    "mobilenetv2": ((4, 4, 8, 8, 8, 8, 8), (3, 16, 16)),
    "mobilenetv3-small": ((4, 8, 8, 8, 8), (3, 16, 16)),
    "efficientnet-lite0": ((4, 4, 8, 8, 8, 8, 8), (3, 16, 16)),
    "shufflenetv2": ((8, 16, 16), (3, 16, 16)),
    "convnext-atto": ((8, 8, 16, 16), (3, 32, 32)),
    "ds-cnn": ((8,) * 5, (1, 49, 10)),
    "cnn1d": ((8, 16, 8), (9, 32)),
    "gru": ((8, 8), (9, 16)),
    "text-attention": ((64,), (8,)),
    "vit-tiny": ((64,), (3, 4, 8)),
}
"""Of every built-in student the widths and the shape of a sample that an emulator trains in seconds."""


@dataclass(frozen=True)
class Run:
    """Batches in their order, and how many steps; they come again after the last."""

    bundle: Path
    steps: int
    seed: int

    @property
    def batches(self) -> list[dict[str, np.ndarray]]:
        return make_batches(read_manifest(self.bundle), self.seed)


def export_small(student: str, folder: Path) -> Path:
    """A bundle for `native` that takes everything: labels, latents and logits of a teacher."""
    widths, shape = SMALL[student]
    sample = InputSpec(shape, ARCHITECTURES[student].input_dtype)
    options = ExportOptions(
        student, LATENT_SIZE, batch=BATCH, widths=widths, input=sample,
        objective=Objective("both", "kl"), engines=("native",),
    )  # fmt: skip
    return export_bundle(options, folder / student)


def here(run: Run, threads: int) -> str:
    """SHA-256 of the state after the run on this machine's engine."""
    batches = run.batches
    with Bundle.open(run.bundle) as bundle:
        engine = open_engine(bundle, "native", threads)
        try:
            for step in range(run.steps):
                engine.train_step(batches[step % len(batches)])
            state = engine.state()
        finally:
            engine.close()
        names = [name for name in bundle.graph("native", "train_step").inputs if name in state]
    return hashlib.sha256(b"".join(state[name].tobytes() for name in names)).hexdigest()


@cache
def find_qemu() -> str | None:
    """The emulator of 64-bit ARM. Debian: `apt install qemu-user`."""
    return next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)


@dataclass(frozen=True)
class Other:
    """A libedgestill and steps.c for one architecture, and what runs its programs."""

    shared_object: Path
    steps: Path
    emulator: Sequence[str] = ()

    def digest(self, run: Run, threads: int, level: int = 4) -> str:
        """As `here`."""
        with Bundle.open(run.bundle) as bundle, tempfile.TemporaryDirectory() as folder:
            given = Path(folder, "given")
            given.write_bytes(_given(bundle, run))
            plan = bundle.file(bundle.graph("native", "train_step").file)
            command = [*self.emulator, self.steps, self.shared_object, plan, given, threads, level]
            done = subprocess.run([*map(str, command)], capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{self.steps.name}: exit code {done.returncode}: {done.stderr.decode()}")
        return hashlib.sha256(done.stdout).hexdigest()


def compile_other(architecture: str, folder: Path, emulator: Sequence[str] = ()) -> Other:
    """Both for an architecture, compiled into a folder. Errors: EngineError, CalledProcessError."""
    library = compile_library(architecture, folder / f"libedgestill-{architecture}.so")
    steps = folder / f"steps-{architecture}"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-musl", "-static"]
    source = Path(__file__).with_name("steps.c")
    subprocess.run([*command, "-O2", "-s", f"-I{SOURCES}", str(source), "-o", str(steps)], check=True)
    return Other(library, steps, emulator)


def _given(bundle: Bundle, run: Run) -> bytes:
    """The file that steps.c reads."""
    graph, state, batches = bundle.graph("native", "train_step"), bundle.initial_state(), run.batches
    head = [run.steps, len(graph.inputs), len(graph.outputs), *(name not in state for name in graph.inputs)]
    place = {NEXT + name: i for i, name in enumerate(graph.inputs) if name in state}
    head += [place.get(name, -1) for name in graph.outputs]
    parts = [np.array(head, np.int64), *(state[name] for name in graph.inputs if name in state)]
    for step in range(run.steps):
        batch = batches[step % len(batches)]
        parts += [batch[name] for name in graph.inputs if name not in state]
    return b"".join(part.tobytes() for part in parts)


@contextmanager
def _level(level: int) -> Iterator[None]:
    before = os.environ.get(LIMIT_VARIABLE)
    os.environ[LIMIT_VARIABLE] = str(level)
    try:
        yield
    finally:
        del os.environ[LIMIT_VARIABLE]
        if before is not None:
            os.environ[LIMIT_VARIABLE] = before


def digests_of(run: Run, other: Other, threads: int) -> Iterator[dict[str, object]]:
    """One of this machine, one of the other; with one thread also of this machine's narrower vectors."""

    def record(architecture: str, level: int, digest: Callable[[], str]) -> dict[str, object]:
        started = time.monotonic()
        found = {"digest": digest(), "took_s": round(time.monotonic() - started, 1)}
        return {"architecture": architecture, "threads": threads, "level": level} | found

    yield record(machine(), 4, lambda: here(run, threads))
    if threads == 1:
        with _level(3):
            yield record(machine(), 3, lambda: here(run, threads))
    yield record("aarch64", 4, lambda: other.digest(run, threads))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", default=",".join(SMALL), type=lambda text: text.split(","))
    parser.add_argument("--steps", default=200, type=int)
    parser.add_argument("--seed", default=1, type=int)
    parser.add_argument("--threads", default=THREADS, type=lambda text: [*map(int, text.split(","))])
    parser.add_argument("--append", action="store_true", help="to what an earlier run of the day wrote")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the results")
    options = parser.parse_args()
    qemu = find_qemu()
    if qemu is None:
        print("error: no qemu-aarch64. Debian: apt install qemu-user", file=sys.stderr)
        return 1
    about = machine_record()
    file = options.output / results_file_name(about, now()).replace("step-", "digests-", 1)
    emulator = subprocess.run([qemu, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    head = {"machine": about, "commit": commit_record(), "time": now(), "emulator": emulator}
    head |= {"seed": options.seed, "batch": BATCH, "latent_size": LATENT_SIZE}
    found: dict[str, set[object]] = defaultdict(set)
    with tempfile.TemporaryDirectory() as name, file.open("a" if options.append else "w") as out:

        def write(record: dict[str, object]) -> None:
            print(json.dumps(record), file=out, flush=True)

        folder = Path(name)
        other = compile_other("aarch64", folder, [qemu])
        write(head)
        runs = {s: Run(export_small(s, folder), options.steps, options.seed) for s in options.students}
        for threads in options.threads:  # all students with one thread first: the others take much longer
            for student, run in runs.items():
                widths, shape = SMALL[student]
                for record in digests_of(run, other, threads):
                    write(
                        {"student": student, "widths": widths, "sample": shape, "steps": run.steps} | record
                    )
                    found[student].add(record["digest"])
                same = "same" if len(found[student]) == 1 else "DIFFERENT"
                print(f"{student}, {threads} threads: {same}", file=sys.stderr)
    print(file)
    return int(any(len(digests) > 1 for digests in found.values()))


if __name__ == "__main__":
    sys.exit(main())
