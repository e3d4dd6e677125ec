"""Inversion attacks: similarity against plain loops, attacks that find what is there and nothing in noise, cells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.benchmarks.experiments import privacy
from edgestill.benchmarks.experiments.grid import Context, Options
from edgestill.benchmarks.experiments.inversion import (
    invert_by_gradient,
    psnr_db,
    ssim,
    total_variation,
    train_decoder,
)
from edgestill.benchmarks.experiments.privacy_report import decode_strip, encode_strip
from edgestill.runtime.device import privacy as noise

TINY = {
    "widths": "4,4,8", "latent_size": 16, "private_samples": 64, "epochs": 1, "transfer_samples": 96,
    "attacked_samples": 16, "decoder_epochs": 1, "gradient_samples": 2, "gradient_steps": 3, "smoothness": [0.1, 10.0],
    "exchange": "latents", "protection": "none", "pictures": 2, "seed": 3,
}  # fmt: skip


def drawn(count: int, shape: tuple[int, ...] = (3, 16, 16), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *shape)).astype(np.float32)


def test_psnr_of_a_known_error() -> None:
    images = np.zeros((2, 3, 16, 16), np.float32)
    rebuilt = np.stack([np.full((3, 16, 16), 0.1), np.full((3, 16, 16), 1.0)])
    assert psnr_db(images, rebuilt) == pytest.approx([20.0, 0.0])
    assert psnr_db(images, images) == pytest.approx([100.0, 100.0])


def test_ssim_is_that_of_plain_loops() -> None:
    x, y = drawn(2, (2, 14, 13), 1).astype(np.float64), drawn(2, (2, 14, 13), 2).astype(np.float64)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    expected = []
    for a, b in zip(x, y, strict=True):
        values = []
        for channel in range(2):
            for top in range(4):
                for left in range(3):
                    p, q = (v[channel, top : top + 11, left : left + 11] for v in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    both = (window * (p - mp) * (q - mq)).sum()
                    values.append(
                        (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                        / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                    )  # fmt: skip
        expected.append(np.mean(values))
    assert ssim(x, y) == pytest.approx(expected, rel=1e-9)
    assert ssim(x, x) == pytest.approx([1.0, 1.0])


def test_total_variation_is_numpys() -> None:
    images = drawn(3)
    expected = [np.abs(np.diff(i, axis=1)).mean() + np.abs(np.diff(i, axis=2)).mean() for i in images]
    assert total_variation(torch.from_numpy(images)).numpy() == pytest.approx(expected, rel=1e-5)


def test_a_decoder_finds_what_rows_tell_and_the_mean_where_they_tell_nothing() -> None:
    colours = drawn(256, (3, 1, 1), 4)
    images = np.broadcast_to(colours, (256, 3, 8, 8)).copy()
    rows = colours.reshape(256, 3) * np.float32([1000, 1, 0.001]) + 5
    empty = np.random.default_rng(5).standard_normal((256, 3)).astype(np.float32)
    mean = psnr_db(images[192:], np.broadcast_to(images[:128].mean(axis=0), (64, 3, 8, 8))).mean()
    gains = []
    for given in (rows, empty):
        decode = train_decoder(
            given[:128], images[:128], (given[128:192], images[128:192]), epochs=12, seed=0, batch=16
        )
        gains.append(psnr_db(images[192:], decode(given[192:])).mean() - mean)
    assert gains[0] > 5
    assert -2 < gains[1] < 0.5


def test_a_decoder_is_the_same_again_and_leaves_torchs_generator_alone() -> None:
    rows, images = drawn(40, (5,)), drawn(40, (1, 16, 8))
    before = torch.get_rng_state()
    first, again, other = (
        train_decoder(rows, images, (rows[:8], images[:8]), epochs=1, seed=seed)(rows) for seed in (1, 1, 2)
    )
    assert first.shape == images.shape and first.dtype == np.float32
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_attack_undoes_an_invertible_map_whatever_its_neighbours_are() -> None:
    images = drawn(3, (1, 4, 4), 6) * 0.8 + 0.1
    matrix = torch.from_numpy(np.random.default_rng(7).standard_normal((16, 16)).astype(np.float32))

    def represent(given: torch.Tensor) -> torch.Tensor:
        return given.flatten(1) @ (matrix + 8 * torch.eye(16))

    rows = represent(torch.from_numpy(images)).numpy()
    start = np.full_like(images, 0.5)
    found = invert_by_gradient(represent, rows, start, smoothness=0.0, steps=300)
    assert psnr_db(images, found).min() > 30
    alone = invert_by_gradient(represent, rows[:1], start[:1], smoothness=0.0, steps=300)
    assert alone == pytest.approx(found[:1], abs=1e-4)
    assert start == pytest.approx(0.5)
    flat = invert_by_gradient(represent, rows, start, smoothness=1000.0, steps=300)
    assert total_variation(torch.from_numpy(flat)).max() < total_variation(torch.from_numpy(found)).min() / 5


def test_a_strip_travels_as_text() -> None:
    images = np.random.default_rng(8).integers(0, 256, (3, 3, 8, 8)).astype(np.float32) / 255
    strip = decode_strip(encode_strip(images))
    assert strip.shape == (8, 24, 3)
    assert np.array_equal(strip[:, 8:16].transpose(2, 0, 1), np.rint(images[1] * 255))


def test_the_grid_has_a_cell_a_protection_exchange_and_seed() -> None:
    full = privacy.cells(Options(data="sha256:x", transfer="sha256:y"))
    assert len(full) == len({cell.key for cell in full}) == 30
    assert {cell.settings["seed"] for cell in full[:3]} == {0, 1, 2}
    assert {cell.settings["noise_multiplier"] for cell in full if cell.settings["clip"] is None} == {0.0}
    assert all(cell.settings["pictures"] == 0 for cell in full if cell.settings["seed"])
    quick = privacy.cells(Options(quick=True, seeds=2))
    assert {cell.settings["seed"] for cell in quick} == {0, 1}
    assert privacy.estimate_minutes(Options(quick=True), 2) < 5 < privacy.estimate_minutes(Options(), 2) < 60


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context("cifar10-mini", "cifar100-transfer-mini", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def records(context: Context) -> dict[str, dict[str, Any]]:
    made = {}
    for name in ("none", "int8", "clip", "noise 1"):
        settings = {**privacy.COMMON, **TINY, **privacy.PROTECTIONS[name], "protection": name}
        if settings["clip"] is not None:
            settings["clip"] = 0.05  # shorter than any row of a student trained as little as this
        made[name] = {"settings": settings, "result": privacy.run_cell(settings, context)}
    return made


@pytest.mark.contract
def test_cells_release_what_their_protection_says(
    records: dict[str, dict[str, Any]], context: Context
) -> None:
    plain, rounded, noised = (records[name]["result"] for name in ("none", "int8", "noise 1"))
    assert 0 < rounded["relative_error"] < 0.05
    # 96 rows that are no longer than 0.05, with noise of 2 · clip · sqrt(96) on each of their 16 values
    assert noised["relative_error"] == pytest.approx(2 * math.sqrt(96 * 16), rel=0.1)
    assert noised["epsilon"] == pytest.approx(noise.epsilon(1.0, 1, 1e-5)) and plain["epsilon"] is None
    assert plain["attacks"]["mean_image"] == noised["attacks"]["mean_image"]
    assert plain["attacks"]["mean_image"]["private"]["gain_db"] == 0.0
    assert plain["attacks"]["decoder"] != noised["attacks"]["decoder"]
    assert len(list(context.cache.glob("privacy-*.safetensors"))) == 1  # one student for all


@pytest.mark.contract
def test_a_clipped_cell_releases_the_rows_shortened(
    records: dict[str, dict[str, Any]], context: Context
) -> None:
    plain, clipped = records["none"]["settings"], records["clip"]["settings"]
    with privacy.open_victim(clipped, context) as victim:
        images = victim.private.images
        rows, long_rows = (privacy.release(s, victim, images, len(images), 0)[0] for s in (clipped, plain))
    lengths = np.linalg.norm(long_rows, axis=1, keepdims=True)
    assert lengths.min() > 0.05
    assert np.linalg.norm(rows, axis=1).max() <= 0.05 * (1 + 1e-6)
    assert not np.isclose(rows, long_rows).all(axis=1).any()
    assert rows == pytest.approx(long_rows * (0.05 / lengths), rel=1e-5, abs=1e-8)
    decoded = [records[name]["result"]["attacks"]["decoder"] for name in ("none", "clip")]
    assert decoded[0] != decoded[1]  # the attacks get the shortened rows, too


@pytest.mark.contract
def test_a_cell_gives_the_same_again(records: dict[str, dict[str, Any]], context: Context) -> None:
    assert privacy.run_cell(records["noise 1"]["settings"], context) == records["noise 1"]["result"]


@pytest.mark.contract
def test_leaked_private_rows_have_the_noise_of_the_whole_release(context: Context) -> None:
    settings = {**privacy.COMMON, **TINY, **privacy.PROTECTIONS["noise 1"], "clip": 0.05}
    with privacy.open_victim(settings, context) as victim:
        images = victim.private.images
        few = privacy.release(settings, victim, images, 4 * len(images), 1)[0]
        all_of_them = privacy.release(settings, victim, np.tile(images, (4, 1, 1, 1)), 4 * len(images), 2)[0]
        exact = privacy.release({**settings, "noise_multiplier": 0.0}, victim, images, len(images), 0)[0]
    assert np.linalg.norm(exact, axis=1).max() == pytest.approx(0.05, rel=1e-5)
    assert (few - exact).std() == pytest.approx((all_of_them - np.tile(exact, (4, 1))).std(), rel=0.1)
    assert (few - exact).std() == pytest.approx(noise.sensitivity(4 * len(images), 0.05), rel=0.1)


@pytest.mark.contract
def test_the_attackers_student_is_the_devices(context: Context) -> None:
    """PyTorch's rows, clipped as the attack clips them, against the exported graph and the device's clipping."""
    for exchange, clip in (("latents", None), ("latents", 0.05), ("logits", 0.05)):
        settings = {**privacy.COMMON, **TINY, "exchange": exchange, "clip": clip}
        with privacy.open_victim(settings, context) as victim:
            images = victim.private.images[:8]
            rows = privacy.release(settings, victim, images, len(images), 0)[0]
            represent = privacy.open_student(victim, exchange, clip)
            mine = represent(torch.from_numpy(privacy.as_floats(images))).numpy()
        assert mine == pytest.approx(rows, rel=1e-3, abs=1e-4)


@pytest.mark.contract
def test_the_report_shows_what_was_recorded(records: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from edgestill.benchmarks.experiments.figures import save_figure

    stored = json.loads(json.dumps(list(reversed(records.values()))))
    report = privacy.report(stored)
    gains = report.tables[1]
    assert [row[1] for row in gains.rows] == ["none", "int8", "clip", "noise 1"]
    shown = records["none"]["result"]["attacks"]["decoder"]["private"]["gain_db"]
    assert gains.rows[0][list(gains.columns).index("decoder, private")] == f"{shown:.2f}"
    found = report.summary["latents"]["noise 1"]
    assert (
        found["decoder_private"]["gain_db"]["mean"]
        == records["noise 1"]["result"]["attacks"]["decoder"]["private"]["gain_db"]
    )
    assert found["epsilon"] == pytest.approx(noise.epsilon(1.0, 1, 1e-5))
    json.dumps(report.summary, allow_nan=False)
    for figure in report.figures:
        for path in save_figure(figure, tmp_path / "privacy"):
            assert path.stat().st_size > 1000


def test_a_transfer_set_too_small_is_refused(context: Context) -> None:
    settings = {**privacy.COMMON, **TINY, "transfer_samples": 40}
    with pytest.raises(privacy.DataError, match="40 images, 16 of them"):
        privacy.run_cell(settings, context)
