"""What is installed: one import package, with every file of the folders it is made of."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.support.wheel import FOLDERS, ROOT, build_wheel

pytestmark = pytest.mark.contract


def test_the_wheel_has_every_file_of_the_folders_below_one_package(tmp_path: Path) -> None:
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert len(expected) > 100
    assert names == expected
