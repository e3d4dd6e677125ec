"""Bundles of the experiments: exported once, then given the initial weights of each seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from edgestill.benchmarks.experiments.locks import locked
from edgestill.simulation.bundles import BundleRequest, prepare_bundle

ENGINE = "native"


def export_cached(request: BundleRequest, folder: Path, seed: int = 0) -> Path:
    """The bundle of a request with the initial weights of `seed`, found in `folder` or made there.

    Several processes may ask at once. Errors: UsageError, ExportFailed.
    """
    words = hashlib.sha256(json.dumps(asdict(request)).encode()).hexdigest()[:16]
    with locked(folder / f"{words}.lock"):
        bundle = prepare_bundle(request, [ENGINE], folder, lambda line: None)[0]
        if seed == 0:  # what is exported without --seed
            return bundle
        seeded = bundle.with_name(f"{bundle.name}-seed{seed}")
        if not seeded.exists():
            from edgestill.benchmarks.experiments.reseed import reseed_bundle  # torch takes seconds to load

            reseed_bundle(bundle, seeded, seed)
        return seeded
