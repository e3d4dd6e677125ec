"""The child process that holds one engine and steps it when told to: `python -m edgestill.benchmarks.worker SPEC`.

SPEC is a JSON object (`WorkerSpec`). Requests and replies are JSON lines on stdin and stdout:
`{"do": "steps", "count": n}` → `{"step_ms": […], "losses": […]}`; `{"do": "peak"}` → `{"flops_per_s": x}`;
`{"do": "memory"}` → `{"peak_rss_bytes": n, "imported": […]}`. End of input ends the worker.
For an engine of the device nothing is imported here that a device would not import.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol, TextIO

from edgestill.runtime.machine import peak_rss_of

EAGER = "torch-eager"
EAGER_CHANNELS_LAST = "torch-eager-channels-last"
MATRIX_PRODUCT = "matrix-product"
NUMPY = "numpy"
"""No engine: what Python and NumPy take alone."""


class Steps(Protocol):
    """What the worker needs of an engine; `edgestill.runtime.engines.engine.Engine` and `EagerStep` have it."""

    def train_step(self, inputs: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class WorkerSpec:
    """Which engine to open on which bundle. `engine` may also be `package.module:function`, called as
    `function(bundle_folder, threads)`."""

    engine: str
    bundle: str
    threads: int
    seed: int


def open_steps(spec: WorkerSpec) -> Steps:
    """The engine that the spec names, ready for its first step."""
    folder = Path(spec.bundle)
    if spec.engine in (EAGER, EAGER_CHANNELS_LAST):
        from edgestill.benchmarks.eager_student import open_eager

        return open_eager(folder, spec.threads, channels_last=spec.engine == EAGER_CHANNELS_LAST)
    if ":" in spec.engine:
        module, function = spec.engine.split(":", 1)
        return getattr(importlib.import_module(module), function)(folder, spec.threads)
    from edgestill.runtime.bundle.bundle import Bundle
    from edgestill.runtime.engines.registry import open_engine

    return open_engine(Bundle.open(folder), spec.engine, spec.threads)


def own_peak_rss_bytes() -> int:
    """Peak resident memory of this process; from `getrusage` where there is no /proc."""
    unit = 1 if sys.platform == "darwin" else 1024
    return peak_rss_of(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunJob:
    """Steps an engine through the workload's batches and takes the time of every step."""

    def __init__(self, spec: WorkerSpec) -> None:
        from edgestill.benchmarks.workload import make_batches, read_manifest

        self.engine = open_steps(spec)
        self._batches = cycle(make_batches(read_manifest(Path(spec.bundle)), spec.seed))

    def run(self, count: int) -> dict[str, list[float]]:
        step_ms, losses = [], []
        for _ in range(count):
            batch = next(self._batches)
            started = time.perf_counter_ns()
            metrics = self.engine.train_step(batch)
            step_ms.append((time.perf_counter_ns() - started) / 1e6)
            loss = metrics["loss"]
            losses.append(loss if isinstance(loss, float) else float(loss.reshape(-1)[0]))
        return {"step_ms": step_ms, "losses": losses}


def serve(spec: WorkerSpec, requests: TextIO, replies: TextIO) -> None:
    """Answers requests until their end."""

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    if spec.engine == MATRIX_PRODUCT:
        from edgestill.benchmarks.peak import PeakMeter

        meter = PeakMeter(spec.threads)
        reply({"ready": True})
        for _ in iter(requests.readline, ""):
            reply({"flops_per_s": meter.measure()})
        return
    if spec.engine == NUMPY:
        importlib.import_module("numpy")
        reply({"ready": True})
        for _ in iter(requests.readline, ""):
            reply({"peak_rss_bytes": own_peak_rss_bytes(), "imported": []})
        return
    runner = RunJob(spec)
    reply({"ready": True})
    try:
        for line in iter(requests.readline, ""):
            request = json.loads(line)
            if request["do"] == "steps":
                reply(runner.run(request["count"]))
            else:
                heavy = sorted({"torch", "onnx", "matplotlib"} & set(sys.modules))
                reply({"peak_rss_bytes": own_peak_rss_bytes(), "imported": heavy})
    finally:
        runner.engine.close()


def main(argv: list[str]) -> int:
    # Native libraries print to file descriptor 1 as they like: replies get a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(WorkerSpec(**json.loads(argv[0])), sys.stdin, replies)
    except Exception as error:  # the parent reports it and goes on with the other engines
        replies.write(
            json.dumps({"error": f"{type(error).__name__}: {error}", "hint": getattr(error, "hint", None)})
            + "\n"
        )
        replies.flush()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
