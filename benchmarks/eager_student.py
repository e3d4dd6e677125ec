"""Opens a bundle's student as an ordinary PyTorch training step."""

from __future__ import annotations

from pathlib import Path

import torch

from edgestill.benchmarks.eager import EagerStep
from edgestill.benchmarks.workload import read_manifest
from edgestill.export.parity.reference import called_parts, rebuild_student
from edgestill.runtime.bundle.bundle import Bundle


def open_eager(bundle: Path, threads: int, channels_last: bool) -> EagerStep:
    """The student of a bundle's folder with its initial state, on `threads` threads.

    Errors: BundleError; UsageError when the student can't be built here or is another.
    """
    torch.set_num_threads(threads)
    opened = Bundle.open(bundle)
    parts, _, _ = called_parts(opened, rebuild_student(opened))
    return EagerStep(parts, read_manifest(bundle), channels_last)
