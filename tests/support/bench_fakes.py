"""Engines with a known step time, and a manifest small enough to write by hand, for the benchmark's tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

QUICK_S, SLOW_S = 0.004, 0.012


def manifest(
    objective: str = "lkd", optimizer: str = "sgd", dtype: str = "uint8", **changes: Any
) -> dict[str, Any]:
    """A manifest with the fields that the benchmark reads: batch 8, images 3×8×8, l = 5, 4 classes."""
    batch = [8]
    inputs = [
        ("images", [8, 3, 8, 8], dtype),
        ("labels", batch, "int64"),
        ("label_weights", batch, "float32"),
    ]
    if objective != "ce":
        teacher = ("teacher_latents", [8, 5]) if objective == "lkd" else ("teacher_logits", [8, 4])
        inputs += [(*teacher, "float32"), ("teacher_weights", batch, "float32"), ("alpha", [1], "float32")]
    names = ("beta1", "beta2", "epsilon") if optimizer == "adamw" else ("momentum",)
    inputs += [(name, [1], "float32") for name in ("learning_rate", *names, "weight_decay")]
    return {
        "student": {"name": "fake", "options": {}},
        "batch": 8,
        "classes": 4,
        "latent_size": 5,
        "input": {"shape": [3, 8, 8], "dtype": dtype, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
        "objective": {"name": objective, "kd_loss": "mse" if objective == "kd" else None},
        "optimizer": {"name": optimizer, "nesterov": False},
        "flops_per_step": 1_000_000,
        "state": {"file": "state.safetensors", "tensors": []},
        "inputs": {
            "train_step": [{"name": name, "shape": shape, "dtype": kind} for name, shape, kind in inputs]
        },
        **changes,
    }


def write_bundle(folder: Path, **options: Any) -> Path:
    """A folder with a manifest and nothing else; fakes need no more."""
    (folder / "manifest.json").write_text(json.dumps(manifest(**options)), encoding="utf-8")
    return folder


class FakeEngine:
    """Sleeps for a known time a step; its loss counts the steps."""

    def __init__(self, sleep_s: float) -> None:
        self._sleep_s = sleep_s
        self._steps = 0

    def train_step(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self._sleep_s)
        self._steps += 1
        return {"loss": np.array([self._steps], np.float32)}

    def close(self) -> None:
        pass


class DyingEngine(FakeEngine):
    """Ends its process without a word on the seventh step: after the warm-up."""

    def train_step(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._steps == 6:
            print("fake engine: out of memory", file=sys.stderr, flush=True)
            os._exit(9)
        return super().train_step(inputs)


class RestlessEngine(FakeEngine):
    """Burns processor time in a thread of its own while it should rest."""

    def __init__(self) -> None:
        super().__init__(QUICK_S)
        threading.Thread(target=self._burn, daemon=True).start()

    def _burn(self) -> None:
        while True:
            sum(range(10000))


class LargeChildEngine(FakeEngine):
    """Holds a child process with 60 MB, as an engine that runs elsewhere does."""

    def __init__(self) -> None:
        super().__init__(QUICK_S)
        code = "data = bytearray(60_000_000); print(flush=True); input()"
        self._child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._child.stdout.readline()

    def close(self) -> None:
        self._child.communicate()


def quick(bundle: Path, threads: int) -> FakeEngine:
    print("a library that writes to stdout")
    os.write(1, b"and one that does so without Python\n")
    return FakeEngine(QUICK_S)


def slow(bundle: Path, threads: int) -> FakeEngine:
    return FakeEngine(SLOW_S)


def dying(bundle: Path, threads: int) -> FakeEngine:
    return DyingEngine(QUICK_S)


def restless(bundle: Path, threads: int) -> FakeEngine:
    return RestlessEngine()


def large_child(bundle: Path, threads: int) -> FakeEngine:
    return LargeChildEngine()


def absent(bundle: Path, threads: int) -> FakeEngine:
    raise ModuleNotFoundError("No module named 'absent_engine'")
