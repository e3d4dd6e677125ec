"""`edgestill simulate` from outside, on small handmade bundles: no exporter, no PyTorch."""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.runtime.cli import main
from edgestill.runtime.device.outputs import unpack
from edgestill.simulation.federation import Federation
from edgestill.simulation.pool import LocalFile, _Here
from edgestill.simulation.settings import SimulationSettings
from edgestill.simulation.simulate import seconds_left
from tests.support.handmade_bundle import CHANNELS, CLASSES, LATENT, SIZE, draw_images, write_handmade_bundle

pytestmark = pytest.mark.simulation
SUMMARY = (
    "t_priv", "t_uni", "local_only_t_priv", "local_only_t_uni", "bytes_up_per_device_round",
    "bytes_down_per_device_round", "trainings_per_s", "digest",
)  # fmt: skip
TRANSFER_COUNT = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that a simulation of seconds needs: two bundles, private data, a transfer set."""
    folder = tmp_path_factory.mktemp("simulation")
    random = np.random.default_rng(0)
    centres = random.integers(60, 200, (CLASSES, SIZE, SIZE, CHANNELS))

    def images(labels: np.ndarray) -> np.ndarray:
        return draw_images(random, centres, labels)

    train, test = np.arange(160) % CLASSES, np.arange(80) % CLASSES
    np.savez(folder / "data.npz", x_train=images(train), y_train=train, x_test=images(test), y_test=test)
    np.savez(folder / "transfer.npz", x=images(np.arange(40) % CLASSES))
    bundles = [write_handmade_bundle(folder / f"student{seed}", seed=seed) for seed in range(2)]
    write_handmade_bundle(folder / "ce", seed=3, objective="ce")
    return [
        "simulate", "--data", str(folder / "data.npz"), "--transfer", str(folder / "transfer.npz"),
        "--transfer-count", str(TRANSFER_COUNT), "--bundle", str(bundles[0]), "--devices", "5", "--rounds", "2",
        "--learning-rate", "0.002", "--distil-learning-rate", "0.002", "--json", "--workers", "1",
    ]  # fmt: skip


def simulate(words: list[str], capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> list[dict]:
    assert main([*words, *more]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    summary = {name: value for name, value in lines[-1]["summary"].items() if not name.endswith("_s")}
    return [*lines[:-1], summary]


def test_the_summary_has_the_names_that_others_script_against(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    *rounds, last = simulate(words, capsys, "--work-dir", str(tmp_path))
    assert [line["round"] for line in rounds] == [1, 2]
    summary = last["summary"]
    assert tuple(summary)[: len(SUMMARY)] == SUMMARY
    assert summary["trainings"] == 10 and summary["rounds_completed"] == 2 and summary["refusals"] == {}
    for name in ("t_priv", "t_uni", "local_only_t_priv", "local_only_t_uni"):
        assert 0 <= summary[name] <= 1
    # the first round has no global outputs to download, the second has one body of them a device
    body = FileBlobs(tmp_path / "blobs").path(summary["digest"]).read_bytes()
    assert hashlib.sha256(body).hexdigest() == summary["digest"]
    arrays, _ = unpack(body, "identity", {"latents": (TRANSFER_COUNT, LATENT)})
    assert arrays["latents"].std() > 0
    assert rounds[0]["bytes_down"] == 0 and rounds[1]["bytes_down"] == pytest.approx(5 * len(body), rel=0.05)


def test_what_one_round_needs_is_let_go_with_it(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared: dict[str, list[weakref.ref]] = {}

    class Counted(LocalFile):
        pass

    def share(pool: Any, path: Path) -> Counted:
        file = Counted(path)
        shared.setdefault(path.name, []).append(weakref.ref(file))
        return file

    monkeypatch.setattr(_Here, "share", share)
    kept: list[Federation] = []
    make = Federation.__init__
    monkeypatch.setattr(
        Federation, "__init__", lambda self, *given: (kept.append(self), make(self, *given))[1]
    )
    lines = simulate(words, capsys, "--rounds", "3", "--work-dir", str(tmp_path), "--no-local-only")
    for line in lines[:2]:
        (outputs,) = shared[line["published"]]  # once, however many devices
        assert outputs() is None
    assert kept and any(references[0]() for references in shared.values()), "bundle and data stay"


def test_the_number_of_workers_changes_nothing(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--availability", "0.8", "--dropout", "0.2", "--poison", "0.2:random", "--gamma", "0.3")
    alone = simulate(words, capsys, *options)
    pooled = simulate(words, capsys, *options, "--workers", "2")
    other = simulate(words, capsys, *options, "--seed", "1")
    assert without_times(alone) == without_times(pooled)
    assert alone[-1]["summary"]["digest"] != other[-1]["summary"]["digest"]


def test_ray_gives_what_a_pool_gives(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    assert without_times(simulate(words, capsys)) == without_times(
        simulate(words, capsys, "--ray", "--workers", "2")
    )


def test_a_folder_that_was_used_before_changes_nothing(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second = (simulate(words, capsys, "--work-dir", str(tmp_path)) for _ in range(2))
    assert without_times(first) == without_times(second)


def test_a_refused_report_takes_nothing_from_the_upload(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = simulate(words, capsys)

    def refuse(*_: Any) -> None:
        raise Problem("late")

    monkeypatch.setattr(Service, "report", refuse)
    assert without_times(simulate(words, capsys)) == without_times(whole)


@pytest.mark.parametrize("exchange", ["latents", "parameters"])
def test_a_late_device_keeps_its_training_where_its_model_is_its_own(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchange: str,
) -> None:
    if exchange == "parameters":
        words = [word.replace("student0", "ce") for word in words]

    def states(name: str, *more: str) -> dict[str, bytes]:
        lines = simulate(words, capsys, "--exchange", exchange, "--rounds", "1", "--no-local-only", "--work-dir",
                         str(tmp_path / name), *more)  # fmt: skip
        refused.append(lines[-1]["summary"]["refusals"])
        return {path.name: path.read_bytes() for path in (tmp_path / name / "devices").iterdir()}

    refused: list[dict[str, int]] = []
    all_in_time = states("all")
    monkeypatch.setattr(SimulationSettings, "over_selection", 2.5)
    two_in_time = states("two", "--goal", "2")
    assert refused == [{}, {"late": 3}]
    assert len(all_in_time) == 5 and len(two_in_time) == (2 if exchange == "parameters" else 5)
    # the first round's training does not depend on who was quicker
    assert two_in_time == {name: all_in_time[name] for name in two_in_time}


def test_more_devices_than_images_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--devices", "161"]) == 2
    assert "161 devices for 160 samples" in capsys.readouterr().err


def test_poison_reaches_the_aggregate_and_the_median_shrugs(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def latents(name: str, *more: str) -> np.ndarray:
        lines = simulate(words, capsys, "--mode", "consensus", "--rounds", "1", "--no-local-only", "--work-dir",
                         str(tmp_path / name), *more)  # fmt: skip
        body = FileBlobs(tmp_path / name / "blobs").path(lines[-1]["summary"]["digest"]).read_bytes()
        return unpack(body, "identity", {"latents": (TRANSFER_COUNT, LATENT)})[0]["latents"]

    clean = latents("clean")
    errors = {
        rule: np.abs(latents(rule, "--poison", "0.2:scale", "--aggregation", rule) - clean).mean()
        for rule in ("mean", "median", "trimmed_mean")
    }
    assert errors["mean"] > 3 * max(errors["median"], errors["trimmed_mean"])


def test_parameters_of_equal_students(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [word.replace("student0", "ce") for word in words]
    lines = simulate(options, capsys, "--exchange", "parameters", "--precision", "fp32")
    assert lines[-1]["summary"]["rounds_completed"] == 2
    # parameters go down as they go up: the same tensors, but not compressed
    assert lines[1]["bytes_down"] == pytest.approx(lines[1]["bytes_up"], rel=0.2)


def test_devices_get_the_students_in_turn(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    second = next(word for word in words if word.endswith("student0")).replace("student0", "student1")
    lines = simulate(
        words, capsys, "--bundle", second, "--align", "--output", str(Path(second).parent / "out")
    )
    assert lines[-1]["summary"]["rounds_completed"] == 2
    kept = (Path(second).parent / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines
    picture = (Path(second).parent / "out" / "simulation.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_rounds_that_too_few_reach_are_abandoned(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = simulate(words, capsys, "--dropout", "0.9", "--goal", "5", "--minimum", "5", code=1)
    assert [line["phase"] for line in lines[:-1]] == ["abandoned"] * 2
    assert all("uploads" in line["reason"] for line in lines[:-1])
    assert lines[-1]["summary"]["digest"] is None


def test_each_device_is_a_user_of_the_data(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert simulate(words, capsys, "--by-user", code=1) == []  # these data name none
    with np.load(words[words.index("--data") + 1]) as file:
        arrays = dict(file)
    arrays["users_train"] = np.array(["ann", "ben", "cleo"])[np.arange(160) % 3]
    np.savez(tmp_path / "named.npz", **arrays)
    more = ("--data", str(tmp_path / "named.npz"), "--by-user", "--devices")
    *_, last = simulate(words, capsys, *more, "3")
    assert last["summary"]["devices_took_part"] == 3
    simulate(words, capsys, *more, "4", code=2)  # more devices than users


def test_a_person_gets_a_table(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word for word in words if word != "--json"]) == 0
    captured = capsys.readouterr()
    assert "local only" in captured.out and "digest of the final global outputs" in captured.out
    assert "round 2: 5 of 5 uploads" in captured.err


@pytest.mark.parametrize(
    "wrong", [("--devices", "0"), ("--poison", "0.2"), ("--plot", "x.pdf"), ("--exchange", "parameters")]
)
def test_what_makes_no_sense_is_refused_at_once(
    wrong: tuple[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--bundle", "another", *wrong]) == 2
    assert "hint: " in capsys.readouterr().err


@pytest.mark.contract
def test_students_are_exported_for_what_is_exchanged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="exports")
    words = [
        "simulate", "--devices", "2", "--rounds", "1", "--students", "cnn3", "--exchange", "both", "--width-divisor",
        "16", "--latent-size", "12", "--batch", "16", "--transfer-count", "16", "--data", "cifar10-mini",
        "--distil-epochs", "1", "--cache", str(tmp_path), "--no-local-only", "--json",
    ]  # fmt: skip
    lines = simulate(words, capsys)
    (exported,) = tmp_path.iterdir()
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["objective"]["name"] == "both" and manifest["latent_size"] == 12
    assert manifest["common_head"] == "output.weight" and manifest["optimizer"]["name"] == "adamw"
    again = simulate(words, capsys)
    assert without_times(lines) == without_times(again) and len(list(tmp_path.iterdir())) == 1


def test_every_round_says_about_how_long_the_rest_takes(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word for word in words if word != "--json"]) == 0
    rounds = [line for line in capsys.readouterr().err.splitlines() if line.startswith("simulate: round ")]
    assert rounds and all(re.search("; about .* left$", line) for line in rounds)
    # the first round also exports, so it counts only while it is all there is
    assert seconds_left([30.0], 4, False) == 90.0
    assert seconds_left([30.0, 2.0, 4.0], 4, False) == 3.0
    assert seconds_left([30.0, 2.0, 4.0], 4, True) == 15.0
    assert seconds_left([30.0, 2.0, 4.0, 3.0], 4, False) == 0.0
