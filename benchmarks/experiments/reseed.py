"""A bundle again with the initial weights of another seed: its graphs do not depend on the seed."""

from __future__ import annotations

import json
from pathlib import Path

from edgestill.export.parity.reference import build_anew, called_parts
from edgestill.export.step.objectives import objective_parameters
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.wire import save
from edgestill.runtime.bundle.writer import replacing, write_manifest
from edgestill.runtime.errors import UsageError


def reseed_bundle(source: Path, output: Path, seed: int) -> Path:
    """Writes to the folder `output` what exporting the bundle `source` with `seed` would have written.

    Takes milliseconds where an export takes seconds. The parity record is left out: it is of other weights.
    Errors: UsageError where `output` exists, or for a factory that is not found; BundleError.
    """
    if output.exists():
        raise UsageError(f"{output} exists already", "give another folder")
    with Bundle.open(source) as bundle:
        _, parameters, buffers = called_parts(bundle, build_anew(bundle, seed))
        own = {name: tensor.detach().numpy() for name, tensor in (parameters | buffers).items()}
        if bundle.manifest.common_head is not None:  # the same whatever the seed
            layer = bundle.manifest.common_head.rpartition(".")[0] + "."
            own = {name: array for name, array in own.items() if not name.startswith(layer)}
        own |= objective_parameters(bundle.objective, bundle.latent_size, seed)
        state = {name: own.get(name, array) for name, array in bundle.initial_state().items()}
        manifest = json.loads(bundle.file("manifest.json").read_bytes()) | {"parity": {}}
        manifest["student"]["options"]["seed"] = seed
        with replacing(output, bundle.path) as folder:
            save(
                folder / bundle.manifest.state_file,
                bundle.check_state(state, source=f"{source}, seed {seed}"),
            )
            write_manifest(folder, manifest)
    return output
