"""The wheel of this tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "edgestill": "edgestill",
    "export": "edgestill/export",
    "edge_runtime": "edgestill/runtime",
    "coordinator": "edgestill/coordinator",
    "benchmarks": "edgestill/benchmarks",
}
"""Each folder of this tree that is installed, and where a wheel has it."""

NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from a copy of the sources, so that nothing built before gets into it."""
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=NOT_SHIPPED)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "-w", str(folder), str(source)], check=True, capture_output=True
    )
    (wheel,) = folder.glob("edgestill-*.whl")
    return wheel
