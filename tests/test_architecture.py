"""The arrows between the packages, from every import statement wherever it stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.tiny
ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "edge_runtime": {
        "export",
        "benchmarks",
        "coordinator",
        "tests",
        "torch",
        "onnx",
        "onnxscript",
        "torchvision",
    },
    "export": {"benchmarks", "coordinator", "tests"},
    "coordinator": {"export", "benchmarks", "tests", "torch", "onnx"},
    "benchmarks": {"tests"},
}
PACKAGES = [package for package in FORBIDDEN if (ROOT / package).is_dir()]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, also inside functions and by importlib with a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module if node.level == 0 else "." * node.level
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_along_the_arrows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in imports(path.read_text())
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_absolute(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not [name for _, name in imports(path.read_text()) if name.startswith(".")], path


def test_every_kind_of_import_is_seen() -> None:
    source = (
        "import torch.nn as nn\n"
        "def late():\n"
        "    from onnx import helper\n"
        "    importlib.import_module('export.cli')\n"
        "from . import sibling\n"
        "text = 'import benchmarks'\n"
    )
    assert sorted(imports(source)) == [(1, "torch.nn"), (3, "onnx"), (4, "export.cli"), (5, ".")]
