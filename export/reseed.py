"""A bundle again with the initial weights of another seed: its graphs do not depend on the seed."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from edgestill.export.exporter import publish, write_manifest
from edgestill.export.parity.reference import build_anew, called_parts
from edgestill.export.step.objectives import objective_parameters
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
        _, parameters, buffers = called_parts(bundle, build_anew(bundle, seed))
        of_student = {name: tensor.detach().numpy() for name, tensor in (parameters | buffers).items()}
        of_objective = objective_parameters(bundle.objective, bundle.latent_size, seed)
        initial = bundle.initial_state()
        state = {name: ({**of_objective, **of_student}).get(name, array) for name, array in initial.items()}
        save(folder / bundle.manifest.state_file, bundle.check_state(state, source=f"{source}, seed {seed}"))
        manifest = json.loads((source / "manifest.json").read_bytes()) | {"parity": {}}
        manifest["student"]["options"]["seed"] = seed
        write_manifest(folder, manifest)
        publish(folder, output)
    return output
