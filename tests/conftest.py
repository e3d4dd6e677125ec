"""What every test shares: one thread a library, and the tiers in the order in which they are cheap."""

from __future__ import annotations

import ast
import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# How long a drawn example takes says how busy the machine is, and nothing else.
settings.register_profile("edgestill", deadline=None)
settings.load_profile("edgestill")

# Two workers on two cores: a library that starts a thread a core would only fight its neighbour.
# Set before any test module imports numpy or torch.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

TIERS = ("tiny", "unit", "contract", "simulation", "device", "long")


def tier(item: pytest.Item) -> int:
    """Index in TIERS of the dearest tier that the test is marked with; `unit` where it has none."""
    marked = [index for index, name in enumerate(TIERS) if item.get_closest_marker(name)]
    return max(marked, default=TIERS.index("unit"))


# First of all plugins, so that `-m unit` already sees the tier given here.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives unmarked tests the tier `unit`; runs cheap tiers first, so that a plain mistake shows early."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in TIERS):
            item.add_marker(pytest.mark.unit)
    items.sort(key=tier)


ROOT = Path(__file__).resolve().parent.parent
EXPORTER = ("torch", "executorch", "onnxscript", "edgestill.export", "edgestill.benchmarks")
WITHOUT_PYTORCH = importlib.util.find_spec("torch") is None
left_out: list[str] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out modules that import the exporter where PyTorch is not installed, as for `make test-device`."""
    if not WITHOUT_PYTORCH or collection_path.suffix != ".py" or not needs_exporter(collection_path):
        return None
    left_out.append(collection_path.relative_to(ROOT).as_posix())
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in left_out:
        terminalreporter.write_line(f"left out, for it needs PyTorch: {name}")


@cache
def needs_exporter(path: Path) -> bool:
    """Whether a module imports the exporter when it is imported, itself or by a module of the tests."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        parent = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in (parent + alias.name for alias in node.names):
            if f"{name}.".startswith(tuple(f"{one}." for one in EXPORTER)):
                return True
            files = [
                ROOT.joinpath(*name.split(".")).with_suffix(".py"),
                ROOT.joinpath(*parent.split(".")[:-1]).with_suffix(".py"),
            ]
            if name.startswith("tests.") and any(file.is_file() and needs_exporter(file) for file in files):
                return True
    return False
