"""Experiments `federation` and `poisoning`: what is run, what is chosen, what is reported; one real run of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from edgestill.benchmarks.experiments import federation, poisoning
from edgestill.benchmarks.experiments.federation import CANDIDATES, RATES
from edgestill.benchmarks.experiments.grid import Cell, Context, Options
from edgestill.benchmarks.experiments.simulated import take_apart
from edgestill.runtime.data.dataset import Dataset, Splits
from edgestill.runtime.errors import DataError, EdgestillError
from edgestill.simulation.settings import SimulationSettings

CHOSEN = {of: dict(zip(RATES, grid[0], strict=True)) for of, (_, grid) in CANDIDATES.items()}
SMALL = {"train_samples": 128, "transfer_samples": 32, "validation_samples": 64, "test_samples": 32, "rounds": 2,
         "local_epochs": 1, "distil_epochs": 1, "batch": 16, "latent_size": 16, "devices": 3}  # fmt: skip


def made_up(cells: Sequence[Cell], result: Any) -> list[dict[str, Any]]:
    """Records of the cells, JSON values as a file gives them back; `result` gives accuracy by settings."""
    rounds = [
        {"round": number, "t_priv": 0.3, "t_uni": 0.2, "global_t_uni": 0.2, "bytes_up": 100, "bytes_down": 50}
        for number in (1, 2)
    ]
    return [
        {"key": cell.key, "settings": json.loads(json.dumps(cell.settings)),
         "result": {"t_priv": 0.5, "t_uni": 0.3, "global_t_uni": None, "rounds_abandoned": 0, "rounds": rounds,
                    "bytes_up_per_device_round": 10, **result(cell.settings)}}
        for cell in cells
    ]  # fmt: skip


def test_private_transfer_and_validation_images_are_disjoint_and_follow_the_seed() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    splits = Splits(Dataset(images, np.arange(100) % 10, ()), None)
    sizes = {"train_samples": 50, "transfer_samples": 30, "validation_samples": 20}
    parts = [part.images.ravel() for part in take_apart(splits, {**sizes, "seed": 3})]
    assert [len(part) for part in parts] == [50, 30, 20]
    assert sorted(np.concatenate(parts)) == list(range(100))
    again = [part.images.ravel() for part in take_apart(splits, {**sizes, "seed": 3})]
    other = [part.images.ravel() for part in take_apart(splits, {**sizes, "seed": 4})]
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])
    with pytest.raises(DataError, match="50 \\+ 31 \\+ 20"):
        take_apart(splits, {**sizes, "transfer_samples": 31, "seed": 3})


@pytest.mark.parametrize("quick", [False, True])
def test_cells_are_distinct_and_their_settings_make_sense(quick: bool) -> None:
    options = Options(quick=quick)
    tuning, final = federation.tuning_cells(options), federation.final_cells(options, CHOSEN)
    hostile = poisoning.cells(options)
    for cells in (tuning, final, hostile):
        assert len({cell.key for cell in cells}) == len(cells)
        for cell in cells:
            json.dumps(cell.settings)
    assert len({len(grid) for _, grid in CANDIDATES.values()}) == 1  # the same budget for every method
    # no seed chooses and is reported, nor one that was seen before all was settled
    assert not {0, 1, *(cell.settings["seed"] for cell in tuning)} & {cell.settings["seed"] for cell in final}
    for cell in final:
        assert (
            cell.settings["objective"] == "ce"
            or cell.settings["objective"] == SimulationSettings(exchange=cell.settings["exchange"]).exported_objective
        )


def test_the_largest_mean_of_both_is_chosen_and_what_diverged_is_not() -> None:
    def result(settings: Any) -> dict[str, Any]:
        found = {
            "t_priv": 0.4 + settings["alpha"] / 5,
            "t_uni": 0.3 - settings["alpha"] / 10 - settings["learning_rate"],
        }
        return found | {"rounds_abandoned": int(settings["arm"] == "latents" and settings["alpha"] == 0.97)}

    chosen = federation.choose(made_up(federation.tuning_cells(Options()), result))
    assert set(chosen) == set(CANDIDATES)
    assert chosen["local only"]["learning_rate"] == 3e-4
    assert chosen["FedMD"] == {"learning_rate": 2e-3, "alpha": 0.7}
    assert chosen["latents, no labels"] == {"learning_rate": 2e-3, "alpha": 0.97}
    assert chosen["latents"] == {"learning_rate": 1e-3, "alpha": 0.95}


def test_runs_of_other_settings_are_not_mixed_into_a_report() -> None:
    cells = federation.final_cells(Options(), CHOSEN)
    older = federation.final_cells(
        Options(seeds=1), {**CHOSEN, "FedMD": {"learning_rate": 1e-3, "alpha": 0.1}}
    )
    records = made_up([*cells, *(cell for cell in older if cell not in cells)], lambda s: {})
    with pytest.raises(
        EdgestillError, match="two runs of part methods, arm FedMD, seed 2 with other settings"
    ):
        federation.report(records)


def test_differences_are_paired_by_seed() -> None:
    random = np.random.default_rng(0)
    seeds = range(2, 5)
    drawn = {(arm, seed): float(random.uniform(0.2, 0.6)) for arm in federation.METHODS for seed in seeds}
    records = made_up(
        federation.final_cells(Options(), CHOSEN),
        lambda s: {"t_uni": drawn.get((s["arm"], s["seed"]), 0.1)},
    )
    report = federation.report(records[::-1])  # in any order
    assert report.summary["FedMD"]["t_uni"]["mean"] == pytest.approx(
        np.mean([drawn["FedMD", seed] for seed in seeds])
    )
    assert report.summary["FedMD"]["bytes_per_device"] == 2 * 150 // 10
    table = next(table for table in report.tables if table.title.startswith("Differences"))
    row = next(row for row in table.rows if row[0] == "latents fp32 − FedMD")
    ours, theirs = ([drawn[arm, seed] for seed in seeds] for arm in ("latents fp32", "FedMD"))
    assert float(row[4]) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=0.06)
    assert row[3].startswith(f"{np.mean(ours) - np.mean(theirs):.3f}")
    goals = {
        row[0]: row[1:] for row in next(t for t in report.tables if t.title.startswith("What latents")).rows
    }
    lead = 100 * np.mean([drawn["latents fp32", seed] - drawn["local only", seed] for seed in seeds])
    found = goals["latents fp32 above local only by 5 points on T_uni"]
    assert found == [f"{lead:+.1f}", "yes" if lead >= 5 else "no"]
    assert report.summary["local only"]["bytes_per_device"] == 0


def lines_of(figure: Any) -> dict[tuple[str, str], Any]:
    """The lines of a drawn figure by the title of their axes and their label."""
    canvas = pytest.importorskip("matplotlib.figure").Figure()
    figure.draw(canvas)
    return {(axes.get_title(), line.get_label()): line[0] for axes in canvas.axes for line in axes.containers}


def test_plots_show_what_the_records_say() -> None:
    sent = {"FedMD": 100, "latents fp32": 900, "latents int8": 300}

    def result(settings: Any) -> dict[str, Any]:
        up = sent.get(settings["arm"], 10)
        rounds = [
            {"round": n, "t_priv": 0.1 * n + up / 1e4, "t_uni": 0.05 * n + up / 1e4, "global_t_uni": 0.2,
             "bytes_up": up, "bytes_down": 2 * up}
            for n in (1, 2, 3)
        ]  # fmt: skip
        noise = settings.get("noise_multiplier", 0.0)
        return {"rounds": rounds, "t_priv": 0.6 - noise / 10, "t_uni": 0.4 - noise / 10, "epsilon": 1.0}

    report = federation.report(made_up(federation.final_cells(Options(), CHOSEN), result))
    rounds, sizes, noise = map(lines_of, report.figures)
    for (test, arm), line in rounds.items():
        slope = {"T_priv": 0.1, "T_uni": 0.05}[test]
        assert line.get_xdata(orig=False).tolist() == [1, 2, 3]
        np.testing.assert_allclose(
            line.get_ydata(orig=False), slope * np.arange(1, 4) + sent.get(arm, 10) / 1e4
        )
    assert {arm for _, arm in rounds} - {arm for _, arm in sizes} == {"local only"}
    for (_, arm), line in sizes.items():
        np.testing.assert_allclose(line.get_xdata(orig=False), 3 * sent.get(arm, 10) * np.arange(1, 4) / 10)
        np.testing.assert_allclose(line.get_ydata(orig=False), rounds["T_uni", arm].get_ydata(orig=False))
        assert line.get_color() == rounds["T_uni", arm].get_color()
    multipliers = [z for z in federation.NOISES if z]
    for label, level in (("T_priv", 0.6), ("T_uni", 0.4)):
        assert noise["", label].get_xdata(orig=False).tolist() == multipliers
        np.testing.assert_allclose(noise["", label].get_ydata(orig=False), level - np.array(multipliers) / 10)


def test_a_rule_is_compared_with_its_own_clean_run() -> None:
    def result(settings: Any) -> dict[str, Any]:
        loss = {None: 0.0, "scale": 0.04, "shuffle": 0.01, "random": -0.01}[settings["attack"]]
        factor = 1.0 if settings["rule"] == "median" else 0.5
        return {"global_t_uni": 0.4 + 0.02 * settings["seed"] - factor * loss}

    report = poisoning.report(made_up(poisoning.cells(Options()), result))
    assert report.summary["median"]["scale"]["mean"] == pytest.approx(4.0)
    assert report.summary["mean"]["random"]["mean"] == pytest.approx(-0.5)
    assert not report.summary["median"]["within_3_points"] and report.summary["mean"]["within_3_points"]


@pytest.mark.simulation
def test_a_poisoned_run_of_two_rounds(tmp_path: Path) -> None:
    context = Context("cifar10-mini", "cifar100-transfer-mini", tmp_path)
    cells = [c for c in poisoning.cells(Options(quick=True)) if c.settings["rule"] == "mean, not clipped"]
    clean, scaled = (
        poisoning.run_cell({**cell.settings, **SMALL, "devices": 5}, context) for cell in cells[:2]
    )
    assert clean["poisoners"] == 0 and scaled["poisoners"] == 1
    assert len(clean["rounds"]) == 2 and 0 <= clean["global_t_uni"] <= 1
    assert clean["rounds"] != scaled["rounds"]


@pytest.mark.simulation
def test_noise_and_a_common_head_go_through_a_real_run(tmp_path: Path) -> None:
    context = Context("cifar10-mini", "cifar100-transfer-mini", tmp_path)
    cells = federation.final_cells(Options(quick=True, seeds=1), CHOSEN)
    cell = next(cell for cell in cells if cell.settings["arm"] == "noise 3")
    settings = {
        **cell.settings,
        **SMALL,
        "students": ["cnn3"],
        "learning_rate": 0.01,
        "distil_learning_rate": 0.001,
    }
    noisy = federation.run_cell(settings, context)
    again = federation.run_cell(settings, context)
    quiet = federation.run_cell({**settings, "noise_multiplier": None}, context)
    assert noisy == again and noisy["rounds"] != quiet["rounds"]
    # two releases of multiplier 3 are one of 3 / √2 (docs/privacy.md): Gaussian epsilon between loose brackets
    assert 1 < noisy["epsilon"] < 3 and "epsilon" not in quiet
