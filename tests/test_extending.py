"""docs/extending.md does what it says: its blocks, put into a copy of the tree, run and agree with PyTorch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FOLDERS = {"export": "export", "edge_runtime": "runtime", "benchmarks": "benchmarks", "coordinator": "coordinator"}
BLOCK = re.compile(
    r"^`(?P<file>[^`]+)`, (?:new|(?P<where>below|above|instead of) `(?P<line>[^`]+)`"
    r"(?:, after `(?P<after>[^`]+)`)?):\n\n"
    r"```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)

ROW = """
import sys
from curved import Curved
import torch
from edgestill.export.exporter import ExportOptions
from edgestill.export.lowering import aten
from edgestill.runtime.bundle.manifest import InputSpec, Objective
from tests.support.export_oracle import assert_step_equals_eager, make_inputs, prepare

assert aten.__file__.startswith(sys.argv[1]), aten.__file__
torch.manual_seed(0)
options = ExportOptions(
    "curved.py:Curved", 5, 3, 4, input=InputSpec((1, 8, 8), "float32"), objective=Objective("ce")
)
spec, student = prepare(options, Curved())
assert ("asinh" in spec.training.graph.operators()) == (sys.argv[2] == "operator")
assert_step_equals_eager(spec, options, student, make_inputs(spec, 0))
"""

ALL = """
import json, shlex, sys
from pathlib import Path
from edgestill.export.lowering.operators import OPERATORS
from edgestill.runtime.cli import main

def run(*words):
    assert main(list(words)) == 0, words

for call in sys.argv[1:]:
    run(*shlex.split(call))
from edgestill.export.targets.toy import KERNELS, REWRITES
assert OPERATORS.keys() <= KERNELS.keys() | REWRITES.keys()
manifest = json.loads(Path("curved/manifest.json").read_text())
assert set(manifest["parity"]) == {"toy", "onnxruntime"} and all(r["ok"] for r in manifest["parity"].values())
assert manifest["objective"]["name"] == "cosine" and manifest["optimizer"]["name"] == "adagrad"
assert manifest["graphs"]["onnxruntime"]["train_step"]["operators"]["Asinh"] == 1
assert manifest["graphs"]["toy"]["train_step"]["operators"]["asinh"] == 1
"""


def _blocks(of: str = PAGE) -> list[re.Match[str]]:
    return list(BLOCK.finditer(of))


def _section(heading: str) -> str:
    level = re.search(rf"^(#+) {re.escape(heading)}$", PAGE, re.MULTILINE)[1]
    section = rf"^{level} {re.escape(heading)}\n.*?(?=^#{{1,{len(level)}}} |\Z)"
    return re.search(section, PAGE, re.DOTALL | re.MULTILINE)[0]


def _apply(block: re.Match[str], tree: Path) -> None:
    path, code = tree / block["file"], block["code"]
    if block["where"] is None:
        assert not path.exists(), f"{block['file']} is there already"
        path.write_text(code)
        return
    lines = path.read_text().splitlines(keepends=True)
    start = 0
    if block["after"]:
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(block["after"]))
    found = [i for i, line in enumerate(lines) if i >= start and line.strip().startswith(block["line"])]
    assert found and (block["after"] or len(found) == 1), f"{block['file']} has {len(found)} lines {block['line']!r}"
    at = found[0] + (block["where"] == "below")
    lines[at : at + (block["where"] == "instead of")] = [code]
    path.write_text("".join(lines))


def _tree(folder: Path) -> Path:
    """A copy of the packages, importable as `edgestill`."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.so")
    shutil.copytree(ROOT / "edgestill", folder / "edgestill", ignore=ignored)
    for name, installed in FOLDERS.items():
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        (folder / "edgestill" / installed).symlink_to(folder / name)
    return folder


def _run(tree: Path, program: str, arguments: Sequence[str]) -> str:
    paths = os.pathsep.join(map(str, (tree, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tree, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_block_of_python_says_where_it_goes() -> None:
    assert len(_blocks()) == PAGE.count("```python\n") >= 15


def test_the_first_table_names_every_file_that_is_touched() -> None:
    for heading in ("An objective", "An optimizer", "An engine"):
        cells = re.search(rf"^\| {heading.lower()} \|.*$", PAGE, re.MULTILINE)[0]
        for block in _blocks(_section(heading)):
            assert block["file"] in cells or str(Path(block["file"]).parent) in cells, block["file"]


def test_what_the_page_calls_missing_is_missing() -> None:
    """And nothing but that: Softmin needs no row."""
    from edgestill.export.exporter import ExportOptions, prepare_step
    from edgestill.export.lowering.graph import LoweringError
    from edgestill.runtime.bundle.manifest import InputSpec, Objective

    found: dict[str, type] = {}
    exec(_blocks()[0]["code"], found)
    options = ExportOptions("", 5, 3, 4, input=InputSpec((1, 8, 8)), objective=Objective("ce"))
    with pytest.raises(LoweringError) as caught:
        prepare_step(options, found["Curved"]())
    message = re.search(r"^edgestill: error: (.*)$", PAGE, re.MULTILINE)[1]
    assert caught.value.message == message


def test_an_operator_by_a_row_and_as_one_of_the_graph(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    for heading in ("First see whether anything is missing", "A row"):
        for block in _blocks(_section(heading)):
            _apply(block, tree)
    _run(tree, ROW, [str(tree), "row"])
    for block in _blocks(_section("An operator of the Graph")):
        _apply(block, tree)
    _run(tree, ROW, [str(tree), "operator"])


def test_all_four_at_once(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    for block in _blocks():
        _apply(block, tree)
    shell = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[-1].replace("\\\n", " ")
    calls = [line.removeprefix("edgestill ") for line in shell.splitlines()]
    assert [call.split()[0] for call in calls] == ["export", "verify", "inspect"]
    calls[1] += " --steps 5 --threads 1"
    out = _run(tree, ALL, calls)
    assert "engine toy: agrees with eager PyTorch over 5 steps" in out
