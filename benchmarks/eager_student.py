"""Opens a bundle's student as an ordinary PyTorch training step."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.eager import EagerStep
from benchmarks.workload import read_manifest
from edge_runtime import wire
from export.student import StudentOptions, build_student


def open_eager(bundle: Path, threads: int, channels_last: bool) -> EagerStep:
    """The student of a bundle's folder with its initial state, on `threads` threads.

    Errors: UsageError when the student can't be built here, KeyError when the state is not its own.
    """
    torch.set_num_threads(threads)
    manifest = read_manifest(bundle)
    own = manifest["student"]["options"]
    widths = own.get("widths")
    options = StudentOptions(
        tuple(manifest["input"]["shape"]),
        manifest["latent_size"],
        manifest["classes"],
        tuple(widths) if widths else None,
        own.get("normalization", "batch"),
    )
    student = build_student(manifest["student"]["name"], options)
    state = wire.load(bundle / manifest["state"]["file"]).arrays
    return EagerStep(student, manifest, state, channels_last)
