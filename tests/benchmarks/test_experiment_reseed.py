"""A bundle given another seed is, byte for byte, the one that an export with that seed writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.benchmarks.experiments.reseed import reseed_bundle
from edgestill.export.exporter import ExportOptions, export_bundle
from edgestill.runtime.bundle.manifest import Objective, Optimizer
from edgestill.runtime.errors import UsageError

SMALL = {"widths": (4, 4, 4), "latent_size": 8, "batch": 4, "engines": ("onnxruntime",)}

FACTORY = "tests.support.students:small"


@pytest.mark.contract
@pytest.mark.parametrize(
    "options",
    [
        {"objective": Objective("ce"), "optimizer": Optimizer("adamw")},
        {"objective": Objective("crd", negatives=6, features=5, teacher_latent_size=7)},
        {"objective": Objective("lkd"), "freeze": ("output",), "normalization": "group"},
        {"objective": Objective("lkd"), "freeze": ("output",), "student": FACTORY, "widths": None},
        {"objective": Objective("lkd"), "common_head": True, "classes": 8},
    ],
    ids=["adamw", "heads", "frozen", "factory", "common head"],
)
def test_another_seed_gives_what_exporting_with_it_gives(options: dict, tmp_path: Path) -> None:
    first, wanted = (
        export_bundle(ExportOptions(**{**SMALL, **options}, seed=seed), tmp_path / str(seed))
        for seed in (0, 7)
    )
    found = reseed_bundle(first, tmp_path / "found", 7)
    names = sorted(path.relative_to(wanted) for path in wanted.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(found) for path in found.rglob("*") if path.is_file())
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    state = Path("state.safetensors")
    assert (first / state).read_bytes() != (wanted / state).read_bytes()


@pytest.mark.contract
def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        reseed_bundle(tmp_path, tmp_path / "there", 1)


@pytest.mark.contract
def test_a_factory_that_is_not_here_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    bundle = export_bundle(ExportOptions(**SMALL), tmp_path / "bundle")
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "cnn3"', '"name": "nowhere.students:mine"'))
    with pytest.raises(UsageError, match="nowhere"):
        reseed_bundle(bundle, tmp_path / "again", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
