"""The storm of `simulation_protocol`, for a few seeds always and for a thousand in the long tier."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.simulation_protocol import Storm

pytestmark = pytest.mark.simulation


def brave(seed: int, devices: int, folder: Path, rounds: int = 3) -> Storm:
    """Runs a storm; a failure says which one it was."""
    storm = Storm(seed, devices, folder, rounds)
    try:
        storm.run()
    except BaseException as error:
        error.add_note(f"storm of seed {seed}, {devices} devices, {rounds} rounds")
        raise
    return storm


@pytest.mark.parametrize("seed", range(8))
def test_rounds_end_and_count_what_was_acknowledged(seed: int, tmp_path: Path) -> None:
    brave(seed, 10, tmp_path)


def test_the_storm_is_one(tmp_path: Path) -> None:
    """Every kind of bad luck really happens, and good luck too; else the invariants would say little."""
    storms = [brave(seed, 12, tmp_path) for seed in range(100, 106)]
    refused = sum((storm.refused for storm in storms), Counter())
    assert {"late", "not_selected", "other_digest", "digest_mismatch", "malformed", "wrong_outputs",
            "foreign_device"} <= set(refused)  # fmt: skip
    phases = Counter(one.phase for storm in storms for one in storm.service.rounds("storm"))
    assert phases["completed"] > 5 and phases["abandoned"] > 0
    assert sum(len(kept) for storm in storms for kept in storm.acknowledged.values()) > 50


def test_the_same_seed_is_the_same_storm(tmp_path: Path) -> None:
    first, second = (brave(7, 10, tmp_path / str(n)) for n in range(2) if not (tmp_path / str(n)).mkdir())
    assert first.acknowledged == second.acknowledged and first.refused == second.refused


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_a_thousand_seeds(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 50):
        brave(seed, 10 + seed % 31, tmp_path)


@pytest.mark.long
def test_ten_thousand_devices(tmp_path: Path) -> None:
    brave(1, 10_000, tmp_path, rounds=2)
