"""`make setup` takes PyTorch's CPU build where an index has it, and says before what it downloads; a fake index."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.wheel import ROOT

pytestmark = pytest.mark.contract


def write_index(folder: Path, *versions: str) -> str:
    """An index of tiny wheels called torch; its address."""
    project = folder / "torch"
    project.mkdir(parents=True)
    names = []
    for version in versions:
        names.append(f"torch-{version}-py3-none-any.whl")
        info = f"torch-{version}.dist-info"
        with zipfile.ZipFile(project / names[-1], "w") as wheel:
            wheel.writestr("torch.py", f"version = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            wheel.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(
                f"{info}/RECORD", f"torch.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
            )
    (project / "index.html").write_text("".join(f'<a href="{name}">{name}</a>' for name in names))
    return folder.as_uri()


def make_torch(folder: Path, index: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`make` of the step that installs PyTorch, into an environment of its own; `index` is pip's own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull}
    venv = folder / "venv"
    return subprocess.run(
        ["make", f"VENV={venv}", f"PYTHON={sys.executable}", *words, f"{venv}/.stamps/torch"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def installed(folder: Path) -> str:
    code = "import torch; print(torch.version)"
    return subprocess.run(
        [folder / "venv/bin/python", "-c", code], capture_output=True, text=True
    ).stdout.strip()


def test_the_cpu_build_of_an_index_that_is_named(tmp_path: Path) -> None:
    plain = write_index(tmp_path / "plain", "2.13.0")
    both = write_index(tmp_path / "both", "2.13.0", "2.13.0+cpu")
    done = make_torch(tmp_path, plain, f"TORCH_INDEX={plain}")
    assert done.returncode and "has no CPU build of PyTorch 2.13.0. Name another index" in done.stderr
    assert installed(tmp_path) == ""
    done = make_torch(tmp_path, plain)
    said, _, _ = done.stdout.partition("Successfully installed")
    assert done.returncode == 0 and "2.9 GB" in said and "TORCH_INDEX=" in said, done.stderr
    assert installed(tmp_path) == "2.13.0"
    (tmp_path / "venv/.stamps/torch").unlink()
    subprocess.run([tmp_path / "venv/bin/python", "-m", "pip", "uninstall", "-q", "-y", "torch"], check=True)
    done = make_torch(tmp_path, plain, f"TORCH_INDEX={both}")
    assert done.returncode == 0 and "CPU build is there" in done.stdout and "0.8 GB" in done.stdout, (
        done.stderr
    )
    assert installed(tmp_path) == "2.13.0+cpu"
