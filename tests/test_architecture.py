"""The arrows between the packages, from every import statement wherever it stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.tiny
ROOT = Path(__file__).parent.parent
FOLDERS = {"export": "export", "edge_runtime": "runtime", "coordinator": "coordinator", "simulation": "simulation",
           "benchmarks": "benchmarks"}  # fmt: skip
"""Each folder of this tree, and what it is called below `edgestill` where it is installed."""

EXPORT, COORDINATOR, SIMULATION, BENCHMARKS = (
    f"edgestill.{name}" for name in ("export", "coordinator", "simulation", "benchmarks")
)
FORBIDDEN = {
    "edge_runtime": {
        *(EXPORT, COORDINATOR, SIMULATION, BENCHMARKS, "tests"),
        *("torch", "onnx", "onnxscript", "torchvision"),
    },
    "export": {BENCHMARKS, SIMULATION, COORDINATOR, "tests"},
    "coordinator": {EXPORT, SIMULATION, BENCHMARKS, "tests", "torch", "onnx"},
    "simulation": {EXPORT, BENCHMARKS, "tests", "torch", "onnx"},
    "benchmarks": {"tests"},
    "edgestill": {"tests", "torch", "numpy"},
    "tests": set(),
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, also inside functions and by importlib with a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 else "." * node.level
            if module == "edgestill":
                yield from ((node.lineno, f"edgestill.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """Place and full name of every import below a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, name in imports(path.read_text()):
            yield f"{path.relative_to(ROOT)}:{line}", name


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_package_imports_only_along_the_arrows(folder: str) -> None:
    found = list(imported(folder))
    assert found
    wrong = [
        f"{place}: {name}"
        for place, name in found
        if any(f"{name}.".startswith(f"{other}.") for other in FORBIDDEN[folder])
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_are_absolute_and_by_installed_names(folder: str) -> None:
    """A folder's own name would import every module a second time, and only where the working folder is this tree."""
    wrong = [
        f"{place}: {name}"
        for place, name in imported(folder)
        if name.startswith(".") or name.split(".")[0] in FOLDERS
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_module_shares_its_name_with_a_folder_beside_it(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not path.with_suffix("").is_dir(), path


def test_every_kind_of_import_is_seen() -> None:
    source = (
        "import torch.nn as nn\n"
        "def late():\n"
        "    from onnx import helper\n"
        "    importlib.import_module('edgestill.export.cli')\n"
        "from . import sibling\n"
        "from edgestill import runtime\n"
        "text = 'import benchmarks'\n"
    )
    assert sorted(imports(source)) == [
        (1, "torch.nn"), (3, "onnx"), (4, "edgestill.export.cli"), (5, "."), (6, "edgestill.runtime")
    ]  # fmt: skip
