"""docs/architecture.md: its picture is the script's, its links lead somewhere, and the crawl is two clicks long."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from edgestill.coordinator.dashboard.routes import make_dashboard_router
from edgestill.coordinator.http.routes import blobs, description, devices, operations, uploads
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.runtime.cli import COMMANDS
from tests.test_architecture import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")


def links(text: str) -> list[Path]:
    return [(PAGE.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)\)", text)]


def file_of(module: str) -> Path:
    """Where a module of the installed package lies in this tree."""
    _, name, *rest = module.split(".")
    folder = next(folder for folder, installed in FOLDERS.items() if installed == name)
    return ROOT.joinpath(folder, *rest).with_suffix(".py")


def test_every_link_leads_to_a_file_or_folder() -> None:
    found = links(TEXT)
    assert len(found) > 60
    assert [path for path in found if not path.exists()] == []


@pytest.mark.parametrize("name", ["architecture", "round"])
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"draw_{name}", ROOT / f"docs/draw_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / f"docs/{name}.svg").read_text(encoding="utf-8") == module.draw()


def test_pages_show_the_pictures() -> None:
    assert PAGE.parent / "architecture.svg" in links(TEXT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"]({picture})" in readme for picture in ("docs/round.svg", "docs/dashboard.png"))
    assert readme.index("docs/round.svg") < readme.index("edgestill demo") < 2000, "not in the first screen"


def test_the_crawl_from_the_readme() -> None:
    """README → architecture → the rule of an operator, the handler of a route, the code of an option."""
    assert "](docs/architecture.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    found = links(TEXT)
    assert ROOT / "export/lowering/gradient.py" in found
    assert {file_of(module) for module, _, _ in COMMANDS.values()} <= set(found)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_row_of_a_command(command: str) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith("|") and f"`{command}`" in line)
    assert file_of(COMMANDS[command][0]) in links(row)


def test_every_route_stands_beside_the_file_of_its_handler(tmp_path: Path) -> None:
    service = Service(Store("sqlite://"), FileBlobs(tmp_path))
    routers = [devices.router, uploads.router, blobs.router, operations.router, description.router]
    routers.append(make_dashboard_router(service, Settings()))
    found = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    assert len(found) >= 15
    for route in found:
        row = next(line for line in TEXT.splitlines() if line.startswith("|") and f"`{route.path}`" in line)
        assert file_of(route.endpoint.__module__) in links(row), route.path
