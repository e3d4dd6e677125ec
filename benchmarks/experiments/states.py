"""Final states of runs in a folder of a user's, with the bundles that `edgestill evaluate` needs to score them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from edgestill.benchmarks.experiments.locks import locked
from edgestill.runtime.bundle import wire
from edgestill.runtime.errors import WireError
from edgestill.runtime.training.checkpoint import Checkpoint, save_checkpoint


@dataclass(frozen=True)
class KeptAs:
    """The names of a run's state file, without its suffix, and of its bundle; the key of the run's settings."""

    name: str
    bundle: str
    key: str


CELL = "experiment"
"""Of what a state file says about its run: the key of the run's settings."""


def is_kept(folder: Path, kept: KeptAs) -> bool:
    """Whether the state of this very run is there; one of other settings is not."""
    try:
        run = json.loads(wire.load(folder / f"{kept.name}.safetensors").metadata["run"])
    except (WireError, KeyError, ValueError):
        return False
    return run.get(CELL) == kept.key


def keep_state(folder: Path, kept: KeptAs, bundle: Path, checkpoint: Checkpoint) -> None:
    """Writes the state, and the bundle unless its graphs are there already; graphs of other settings are
    replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / kept.bundle
    with locked(folder / ".lock"):
        if not target.exists() or _graphs(target) != _graphs(bundle):
            part = folder / f".{kept.bundle}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(bundle, part)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
    save_checkpoint(
        folder / f"{kept.name}.safetensors", replace(checkpoint, run={**checkpoint.run, CELL: kept.key})
    )


def _graphs(bundle: Path) -> dict[str, str]:
    """Digests of the files but the initial state, which differs from seed to seed."""
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    state = manifest["state"]["file"]
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name != state}
