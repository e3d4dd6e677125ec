"""The wheel and the source distribution of this tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from edgestill.simulation.demo import STUDENTS
from tests.support.demo_bundles import exported

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "edgestill": "edgestill",
    "export": "edgestill/export",
    "edge_runtime": "edgestill/runtime",
    "coordinator": "edgestill/coordinator",
    "simulation": "edgestill/simulation",
}
"""Each folder of this tree that is installed, and where a wheel has it."""
LIBRARIES = {f"edgestill/runtime/native/libedgestill-{name}.so" for name in ("x86_64", "aarch64")}
"""What building a wheel adds."""
BUNDLES = {f"edgestill/simulation/carried/{name}" for name in (*(f"{s}.zip" for s in STUDENTS), "demo-seeds.jsonl")}
"""What `make wheels` exports before, and copies beside it."""

NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "carried")


def copy_sources(folder: Path) -> Path:
    """A copy of what is shipped, once, so that nothing built before gets into it."""
    source = folder / "source"
    if not source.exists():
        for name in FOLDERS:
            shutil.copytree(ROOT / name, source / name, ignore=NOT_SHIPPED)
        shutil.copytree(exported(), source / "simulation" / "carried", dirs_exist_ok=True)
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
    return source


def build_wheel(folder: Path, platform: str = "any", of: Path | None = None) -> Path:
    """A wheel of the sources, or `of` a source distribution, as `make wheels` makes it for a platform."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    if platform != "any":
        command.append(f"--config-settings=--build-option=--plat-name={platform}")
    source = of or copy_sources(folder)
    subprocess.run(
        [*command, "--no-build-isolation", "-w", str(folder), str(source)], check=True, capture_output=True
    )
    (wheel,) = folder.glob(f"edgestill-*-{platform}.whl")
    return wheel


def build_source_distribution(folder: Path) -> Path:
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy_sources(folder), check=True, capture_output=True)
    (distribution,) = folder.glob("edgestill-*.tar.gz")
    return distribution
