"""A device that has Python and NumPy, and no PyTorch, trains an exported bundle: on `native`, or with ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import Objective
from tests.support.wheel import ROOT, build_wheel

pytestmark = [pytest.mark.contract, pytest.mark.timeout(600)]
MOST_BYTES = 170_000_000
"""Of an environment that coordinates, NumPy's 73 MB and pip among them."""
OPTIONS = ExportOptions(
    widths=(4, 8, 8), latent_size=8, batch=16, objective=Objective("ce"), engines=("onnxruntime", "native")
)
# Runs the command line and then says what was imported.
RUN = """
import json, sys
from edgestill.runtime.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "onnx", "onnxscript", "executorch", "edgestill.export") if name in sys.modules]
print(json.dumps({"code": code, "heavy": heavy}), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def new_environment(folder: Path, wheel: Path, *packages: str) -> Path:
    """The Python of a new environment with our wheel, some packages as they are pinned, and only those."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    python = folder / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "-c",
        ROOT / "constraints.txt",
    ]
    done = subprocess.run([*install, *packages], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install the device's packages here: {done.stderr.strip()[-300:]}")
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, capture_output=True)
    return python


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return new_environment(tmp_path_factory.mktemp("device") / "venv", wheel, "numpy", "onnxruntime")


@pytest.fixture(scope="module")
def bare_device(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return new_environment(tmp_path_factory.mktemp("bare") / "venv", wheel, "numpy")


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(python.parent), "OMP_NUM_THREADS": "1"}  # no compiler
    return subprocess.run(
        [python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_environment_has_no_pytorch(device: Path, tmp_path: Path) -> None:
    for package in ("torch", "onnx", "executorch", "safetensors"):
        found = run(device, "-c", f"import {package}", cwd=tmp_path)
        assert found.returncode == 1 and f"No module named '{package}'" in found.stderr


def test_a_bundle_trains_there(device: Path, tmp_path: Path) -> None:
    folder, state = export_bundle(OPTIONS, tmp_path / "bundle"), tmp_path / "state.safetensors"
    train = [
        "train",
        folder,
        "--data",
        "cifar10-mini",
        "--limit",
        160,
        "--epochs",
        2,
        "--threads",
        1,
        "--lr",
        0.05,
    ]
    done = run(device, "-c", RUN, *train, "--state", state, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == {"code": 0, "heavy": []}
    losses = [line["loss"] for line in map(json.loads, done.stdout.splitlines()) if "loss" in line]
    assert len(losses) >= 20 and np.isfinite(losses).all()
    with Bundle.open(folder) as bundle:
        before, after = bundle.initial_state(), bundle.check_state(wire.load(state).arrays)
    assert all((before[name] != after[name]).any() for name in before if name.endswith("weight"))

    done = run(device, "-m", "edgestill.runtime.cli", "evaluate", folder, "--state", state, "--data", "cifar10-mini",
               "--json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0.1 < result["accuracy"] <= 1 and len(result["per_class"]) == 10


def test_a_bundle_trains_with_numpy_alone_on_the_library_in_the_wheel(
    bare_device: Path, tmp_path: Path
) -> None:
    found = run(bare_device, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    assert {line.partition("==")[0] for line in found.split()} == {"edgestill", "numpy", "pip", "setuptools"}
    folder, state = export_bundle(OPTIONS, tmp_path / "bundle"), tmp_path / "state.safetensors"
    train = ["train", folder, "--engine", "native", "--data", "cifar10-mini", "--limit", 160, "--threads", 1]
    done = run(bare_device, "-c", RUN, *train, "--state", state, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == {"code": 0, "heavy": []}
    losses = [line["loss"] for line in map(json.loads, done.stdout.splitlines()) if "loss" in line]
    assert len(losses) >= 10 and np.isfinite(losses).all()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return new_environment(tmp_path_factory.mktemp("coordinator") / "venv", wheel, f"{wheel}[coordinator]")


def test_who_coordinates_joins_or_simulates_needs_no_pytorch_and_little_disk(
    coordinator: Path, tmp_path: Path
) -> None:
    """The demo creates a task, enrols, serves and joins, each as a command of its own."""
    environment = coordinator.parent.parent
    files = [path for path in environment.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    found = run(coordinator, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    names = {line.partition("==")[0] for line in found.split()}
    assert not names & {"torch", "onnx", "onnxruntime", "executorch", "ziglang", "safetensors"}
    short = ["--rounds", 1, "--local-epochs", 1, "--distil-epochs", 1, "--transfer-count", 64]
    done = run(coordinator, "-m", "edgestill.runtime.cli", "demo", *short, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["devices"]) == 4
    bundles = ["--bundle", "demo/cnn3", "--global-bundle", "demo/cnn5", "--devices", 2, "--workers", 1]
    done = run(coordinator, "-c", RUN, "simulate", *bundles, *short, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == {"code": 0, "heavy": []}
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["rounds_completed"] == 1


def test_benchmarks_say_that_they_are_in_a_checkout(coordinator: Path, tmp_path: Path) -> None:
    done = run(coordinator, "-m", "edgestill.runtime.cli", "bench", "step", cwd=tmp_path)
    assert done.returncode == 1 and "it runs in a checkout" in done.stderr and "make setup" in done.stderr


def test_what_needs_pytorch_says_what_to_install(device: Path, tmp_path: Path) -> None:
    arguments = ["export", "--student", "cnn3", "--output", tmp_path / "bundle"]
    done = run(device, "-m", "edgestill.runtime.cli", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "'torch', which is not installed" in done.stderr and "pip install 'edgestill[export]'" in done.stderr
    )
