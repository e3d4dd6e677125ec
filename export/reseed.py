"""A bundle again with the initial weights of another seed: its graphs do not depend on the seed."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from edgestill.export.exporter import publish, write_manifest
from edgestill.export.objectives import objective_parameters
from edgestill.export.reference import build_anew
from edgestill.export.step import student_state
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.wire import save
from edgestill.runtime.errors import UsageError


def reseed_bundle(source: Path, output: Path, seed: int) -> Path:
    """Writes to the folder `output` what exporting the bundle in the folder `source` with `seed` would have written.

    Takes milliseconds where an export takes seconds. The parity record is left out: it is of other weights.
    Errors: UsageError where `output` exists, or for a factory that is not found; BundleError.
    """
    if output.exists():
        raise UsageError(f"{output} exists already", "give another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with Bundle.open(source) as bundle, tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        folder = Path(scratch) / "bundle"
        shutil.copytree(source, folder)
        of_student, _ = student_state(build_anew(bundle, seed))
        of_objective = objective_parameters(bundle.objective, bundle.latent_size, seed)
        state = {**bundle.initial_state(), **of_student, **of_objective}
        save(folder / bundle.manifest.state_file, bundle.check_state(state, source=f"{source}, seed {seed}"))
        manifest = json.loads((source / "manifest.json").read_bytes()) | {"parity": {}}
        manifest["student"]["options"]["seed"] = seed
        write_manifest(folder, manifest)
        publish(folder, output)
    return output
