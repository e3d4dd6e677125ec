"""The demo's bundles as a wheel carries them, exported once for the present code, whichever test process asks first.

Without PyTorch they are those that `make test-device` exported before.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
from pathlib import Path

from edgestill.simulation import demo_bundles
from edgestill.simulation.bundles import code_digest
from edgestill.simulation.demo import STUDENTS

BUILD = Path(__file__).resolve().parents[2] / "build" / "demo_bundles"


def exported() -> Path:
    """The folder of their `.zip` files."""
    if importlib.util.find_spec("torch") is None:
        return demo_bundles.FOLDER
    decides = [demo_bundles.FOLDER.parent, *(BUILD.parents[1] / name for name in ("export", "edge_runtime"))]
    folder = BUILD / code_digest(decides)[:16]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((folder / f"{student}.zip").is_file() for student in STUDENTS):
            for stale in BUILD.iterdir():
                shutil.rmtree(stale, ignore_errors=True)
            demo_bundles.write(folder)
    return folder
