"""Bundles that are refused: changed, missing, added, leaving the folder; and the .zip of a good one."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.errors import BundleError, EdgestillError, StateError, UsageError
from tests.support.handmade_bundle import (
    BATCH,
    CLASSES,
    LATENT,
    file_records,
    write_handmade_bundle,
    write_manifest,
)

NOISE = {"name": "noise.0", "shape": [2], "dtype": "float32", "unit": "uniform"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_handmade_bundle(tmp_path / "bundle")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(BundleError) as error:
        Bundle.open(folder)
    assert message in error.value.message


def test_a_good_bundle_opens_with_its_specs(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert (bundle.batch, bundle.latent_size, bundle.classes) == (BATCH, LATENT, CLASSES)
    assert bundle.engines == ("onnxruntime",)
    graph = bundle.graph("onnxruntime", "train_step")
    assert graph.operators["Gemm"] == 4 and graph.inputs[-1] == "weight_decay"
    assert [spec.name for spec in bundle.state_specs] == list(bundle.initial_state())
    assert bundle.objective.needs_teacher


def test_all_formats_are_read_and_the_digest_of_the_older_one_stays(folder: Path, tmp_path: Path) -> None:
    older = Bundle.open(folder)
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 1
    for version in (2, 3):
        change_manifest(folder, lambda m, version=version: m.update(format_version=version, more_inputs=[]))
        assert Bundle.open(folder).model_digest == older.model_digest
    newer = Bundle.open(write_handmade_bundle(tmp_path / "newer", dropout=True))
    assert [spec.name for spec in newer.noise_specs] == ["noise.0"] and newer.sample_names == ("images",)
    assert newer.model_digest != older.model_digest


def test_changed_bytes_are_refused(folder: Path) -> None:
    for name in file_records(folder):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert_refused(folder, f"{name} has been changed")
        path.write_bytes(good + b"x")
        assert_refused(folder, f"{name} has {len(good) + 1} bytes")
        path.write_bytes(good)
    Bundle.open(folder)


def test_missing_and_unlisted_files_are_refused(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")
    assert_refused(folder, "extra.bin is not listed")
    (folder / "extra.bin").unlink()
    (folder / "onnxruntime/encode.onnx").unlink()
    assert_refused(folder, "onnxruntime/encode.onnx is missing")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "..\\secret",
        "C:secret",
        "./x",
        "a//b",
        "",
        "manifest.json",
    ],
)
def test_files_outside_the_bundle_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"x")

    def point_outside(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["onnxruntime/encode.onnx"]
        manifest["graphs"]["onnxruntime"]["encode"]["file"] = name

    change_manifest(folder, point_outside)
    assert_refused(folder, "is not a file inside the bundle")


def test_links_out_of_the_bundle_are_refused(folder: Path) -> None:
    outside = folder.parent / "state.safetensors"
    shutil.move(folder / "state.safetensors", outside)
    (folder / "state.safetensors").symlink_to(outside)
    assert_refused(folder, "state.safetensors is not a file inside")
    (folder / "state.safetensors").unlink()
    shutil.move(outside, folder / "state.safetensors")
    (folder / "linked").symlink_to(folder.parent)
    assert_refused(folder, "linked is not listed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="zip"), "format is 'zip'"),
        (lambda m: m.update(format_version=4), "format version 4"),
        (lambda m: m.update(format_version="2"), "format version '2'"),
        (lambda m: m["input"].update(shape=[3, 6, 7]), "the samples are uint8[3, 6, 7]"),
        (lambda m: m["input"].update(shape=[]), "is not the shape of a sample"),
        (lambda m: m["input"].update(name="sound"), "'sound' is missing"),
        (lambda m: m.update(more_inputs=[m["input"]]), "name a tensor twice"),
        (
            lambda m: m.update(more_inputs=[{"name": "labels", "shape": [], "dtype": "int64"}]),
            "shape of a sample",
        ),
        (lambda m: m["inputs"]["encode"].append(m["inputs"]["train_step"][1]), "inputs.encode is not images"),
        (lambda m: m["inputs"]["train_step"].append(NOISE | {"name": "noise.x"}), "'noise.x' is not noise.0"),
        (lambda m: m["inputs"]["train_step"].append(NOISE | {"dtype": "uint8"}), "'noise.0' is not noise.0"),
        (lambda m: m.pop("batch"), "'batch' is missing"),
        (lambda m: m.update(batch=0), "batch: 0 is not a size"),
        (lambda m: m.update(batch=True), "batch: True is not a int"),
        (lambda m: m.update(latent_size="5"), "latent_size: '5' is not a int"),
        (lambda m: m["input"].update(dtype="float64"), "input.dtype: 'float64' is none of"),
        (lambda m: m["input"].update(mean=[0.5]), "mean and std need 3 entries"),
        (lambda m: m["objective"].update(name="kd"), "kd_loss is missing"),
        (lambda m: m["state"]["tensors"][0].update(role="spy"), "state.tensors[0].role: 'spy'"),
        (lambda m: m["state"]["tensors"].append(m["state"]["tensors"][0]), "names a tensor twice"),
        (lambda m: m["graphs"]["onnxruntime"]["encode"]["inputs"].append("x"), "'x' is explained nowhere"),
        (lambda m: m["graphs"]["onnxruntime"]["encode"]["outputs"].pop(), "encode.outputs lacks 'logits'"),
        (lambda m: m["graphs"]["onnxruntime"].pop("encode"), "'encode' is missing"),
        (lambda m: m["files"]["state.safetensors"].update(sha256="0" * 63), "sha256"),
        (lambda m: m["files"].pop("onnxruntime/encode.onnx"), "is not listed in files"),
    ],
)
def test_manifest_fields_are_checked(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(folder, change)
    assert_refused(folder, message)


def test_unknown_fields_are_ignored(folder: Path) -> None:
    change_manifest(
        folder, lambda m: (m.update(future=1), m["graphs"]["onnxruntime"]["encode"].update(hint="x"))
    )
    assert Bundle.open(folder).graph("onnxruntime", "encode").details["hint"] == "x"


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_manifest_is_our_error(folder: Path, data: st.DataObject) -> None:
    path = folder / "manifest.json"
    good = path.read_bytes()
    try:
        at = data.draw(st.integers(0, len(good) - 1))
        length = data.draw(st.integers(0, 40))
        path.write_bytes(good[:at] + data.draw(st.binary(max_size=6)) + good[at + length :])
        try:
            Bundle.open(folder).initial_state()
        except EdgestillError:
            pass
    finally:
        path.write_bytes(good)


def pack(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


@pytest.mark.parametrize("prefix", ["", "bundle/"])
def test_a_zip_opens_like_its_folder(folder: Path, tmp_path: Path, prefix: str) -> None:
    with Bundle.open(pack(folder, tmp_path / "bundle.zip", prefix)) as bundle:
        extracted = bundle.path
        assert bundle.model_digest == Bundle.open(folder).model_digest
        assert bundle.file("onnxruntime/encode.onnx").is_file()
    assert not extracted.exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_zip_members_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    path = pack(folder, tmp_path / "bundle.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    assert_refused(path, "leaves the bundle")
    assert not (tmp_path / "evil").exists()


def test_zip_links_bombs_and_rubbish_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    path = pack(folder, tmp_path / "link.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert_refused(path, "is a link")
    (tmp_path / "rubbish.zip").write_bytes(b"PK\x03\x04 and nothing")
    assert_refused(tmp_path / "rubbish.zip", "not a readable .zip")
    with pytest.raises(UsageError, match="no such bundle"):
        Bundle.open(tmp_path / "absent.zip")
    monkeypatch.setattr("edgestill.runtime.bundle.bundle.MAX_BUNDLE_BYTES", 1000)
    assert_refused(pack(folder, tmp_path / "bomb.zip"), "unpacks to more than")


def test_states_that_do_not_fit_are_refused(folder: Path) -> None:
    bundle = Bundle.open(folder)
    state = bundle.initial_state()
    wrong = dict(state, extra=np.zeros(1, np.float32))
    wrong["output.bias"] = np.zeros(CLASSES + 1, np.float32)
    del wrong["representation.bias"]
    with pytest.raises(StateError) as error:
        bundle.check_state(wrong, source="s.safetensors")
    for part in (
        "s.safetensors",
        "'representation.bias' is missing",
        "'extra'",
        "float32[5], not float32[4]",
    ):
        assert part in error.value.message
    with pytest.raises(StateError, match="float64"):
        bundle.check_state({name: array.astype(np.float64) for name, array in state.items()})


def test_the_model_digest_depends_on_the_state_and_not_on_graphs_or_parity(
    folder: Path, tmp_path: Path
) -> None:
    digest = Bundle.open(folder).model_digest
    change_manifest(folder, lambda m: m.update(parity={"onnxruntime": {"ok": True}}))
    assert Bundle.open(folder).model_digest == digest
    assert Bundle.open(write_handmade_bundle(tmp_path / "other", seed=1)).model_digest != digest
