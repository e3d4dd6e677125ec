"""An export repeated: the same options give the same files, whatever Python's hashes are this time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

# Branches, joined and shuffled channels, attention, recurrence: what planners look up in sets and dictionaries.
EXPORT = """
import sys
from pathlib import Path
from edgestill.export.exporter import ExportOptions, export_bundle

for student in ("cnn3", "shufflenetv2", "gru", "text-attention"):
    options = ExportOptions(student=student, batch=4, engines=("native", "onnxruntime"))
    export_bundle(options, Path(sys.argv[1]) / student)
"""


def files_of(folder: Path, seed: str) -> dict[str, bytes]:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", EXPORT, str(folder)], env=environment, check=True, timeout=300)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (files_of(tmp_path / seed, seed) for seed in ("1", "2"))
    assert first.keys() == second.keys() and len(first) > 12
    assert [name for name in first if first[name] != second[name]] == []
