"""What is installed: one import package, with every file of the folders it is made of, and libedgestill."""

from __future__ import annotations

import email
import tarfile
import zipfile
from pathlib import Path

import pytest

from edgestill.runtime.cli import COMMANDS
from tests.support.wheel import BUNDLES, FOLDERS, LIBRARIES, ROOT, build_source_distribution, build_wheel

pytestmark = [pytest.mark.contract, pytest.mark.timeout(900)]
ELF_MACHINE = {"x86_64": 62, "aarch64": 183}
MOST_BYTES, MOST_OF_BUNDLES = 18_000_000, 5_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    return build_wheel(folder)


def shipped() -> set[str]:
    """The files below the import package, as they lie in this tree."""
    return {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".so" and not {"__pycache__", "carried"} & set(path.parts)
    }


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_folders_below_one_package_and_the_libraries(wheel: Path) -> None:
    assert len(shipped()) > 100
    assert names_in(wheel) == shipped() | LIBRARIES | BUNDLES
    assert wheel.stat().st_size < MOST_BYTES


def test_the_wheel_has_what_is_used_where_it_is_installed_and_no_benchmarks(wheel: Path) -> None:
    names = names_in(wheel)
    assert not [name for name in names if "benchmark" in name or "results/" in name or "tests/" in name]
    tops = {name.split("/")[1] for name in names if name.count("/") > 1}
    assert tops == {"export", "runtime", "coordinator", "simulation"}
    with zipfile.ZipFile(wheel) as opened:
        assert sum(opened.getinfo(name).file_size for name in BUNDLES) < MOST_OF_BUNDLES
    modules = {module for module, _, _ in COMMANDS.values()}
    files = {f"{module.replace('.', '/')}.py" for module in modules}
    assert files - names == {
        "edgestill/benchmarks/cli.py",
        "edgestill/benchmarks/reproduce.py",
    }


def test_the_metadata_are_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        info = opened.namelist()[-1].partition("/")[0]
        about = email.message_from_bytes(opened.read(f"{info}/METADATA"))
        assert opened.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert about["License-Expression"] == "Apache-2.0" and about["License-File"] == "LICENSE"
    assert about["Requires-Python"] == "<3.14,>=3.11" and about["Summary"] and about["Keywords"]
    pythons = {one.rpartition(" ")[2] for one in about.get_all("Classifier") if "Python :: 3." in one}
    assert pythons == {"3.11", "3.12", "3.13"}
    assert about.get_payload().startswith("# edgestill")


def test_each_library_is_one_for_its_architecture_and_needs_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        for name in LIBRARIES:
            data = opened.read(name)
            assert data[:6] == b"\x7fELF\x02\x01" and 100_000 < len(data) < 300_000
            assert ELF_MACHINE[name.rpartition("-")[2].removesuffix(".so")] == int.from_bytes(
                data[18:20], "little"
            )
            assert b"libc.so" not in data


@pytest.mark.parametrize("platform", ["manylinux_2_17_x86_64", "musllinux_1_1_aarch64"])
def test_a_wheel_for_a_platform_has_its_tag_and_the_same_files(
    platform: str, folder: Path, wheel: Path
) -> None:
    own = build_wheel(folder, platform)
    assert own.name == f"edgestill-0.1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(own) as opened:
        about = opened.read("edgestill-0.1.0.dist-info/WHEEL").decode()
    assert f"Tag: py3-none-{platform}\n" in about
    assert names_in(own) == names_in(wheel)


def test_the_source_distribution_has_what_a_wheel_is_made_of(folder: Path) -> None:
    with tarfile.open(build_source_distribution(folder)) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"simulation/carried/{name.rpartition('/')[2]}" for name in BUNDLES} <= names
    back = {place: folder for folder, place in sorted(FOLDERS.items(), key=lambda item: item[1])}
    for name in shipped():
        place = max((p for p in back if name.startswith(f"{p}/")), key=len)
        assert f"{back[place]}{name.removeprefix(place)}" in names, name
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith("tests") or name.endswith(".so") or ".venv" in name for name in names)


@pytest.mark.long
def test_a_wheel_of_the_source_distribution_is_the_same(folder: Path, wheel: Path, tmp_path: Path) -> None:
    other = build_wheel(tmp_path, of=build_source_distribution(folder))
    assert names_in(other) == names_in(wheel)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(other) as two:
        assert all(one.read(name) == two.read(name) for name in names_in(wheel))
