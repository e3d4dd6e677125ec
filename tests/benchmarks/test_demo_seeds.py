"""`make demo-seeds`: goes on where it stopped, and says what the recorded seeds do not reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgestill.benchmarks import demo_seeds
from edgestill.simulation.seeds import (
    EPOCHS,
    RECORDS,
    SEEDS,
    STEPS,
    TOGETHER,
    UNLABELLED,
    missing,
    read_records,
    rows_of_seeds,
    settings_digest,
    shortfalls,
)

pytestmark = pytest.mark.unit


def record(seed: int, run: str, t_priv: float, t_uni: float) -> dict[str, Any]:
    """Of two devices, around the given means."""
    devices = [{"t_priv": t_priv + d, "t_uni": t_uni - d} for d in (-0.1, 0.1)]
    return {"seed": seed, "run": run, "devices": devices}


def test_what_is_recorded_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, str, bool]] = []

    def run_seed(seed: int, run: str, cache: Path, alone: bool, tell: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        ran.append((seed, run, alone))
        yield run, {"devices": [{"t_priv": 0.5, "t_uni": 0.5}]}
        if seed == 1 and run == TOGETHER and len(ran) == 2:
            raise KeyboardInterrupt
        for name in (EPOCHS, STEPS) if alone else ():
            yield name, {"devices": [{"t_priv": 0.4, "t_uni": 0.3}]}

    monkeypatch.setattr(demo_seeds, "run_seed", run_seed)
    path = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        demo_seeds.run_missing(range(2), path, tmp_path, lambda _: None)
    with path.open("a") as file:
        file.write('{"seed": 1, "run": "alo')  # cut short by a kill
    demo_seeds.run_missing(range(2), path, tmp_path, lambda _: None)
    assert ran == [(0, TOGETHER, True), (1, TOGETHER, True), (1, TOGETHER, True), (0, UNLABELLED, False),
                   (1, UNLABELLED, False)]  # fmt: skip
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((line["seed"], line["run"]) for line in lines) == sorted(
        (seed, run) for seed in range(2) for run in (TOGETHER, UNLABELLED, EPOCHS, STEPS)
    )
    assert all(line["machine"]["cpu"] and line["commit"] for line in lines)
    ran.clear()
    demo_seeds.run_missing(range(2), path, tmp_path, lambda _: None)
    assert ran == []
    # of other settings nothing counts
    other = [line | {"settings": "0" * 12} if line["run"] == UNLABELLED else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in other))
    assert missing(read_records(path), range(2)) == [(0, UNLABELLED), (1, UNLABELLED)]
    demo_seeds.run_missing(range(2), path, tmp_path, lambda _: None)
    assert ran == [(0, UNLABELLED, False), (1, UNLABELLED, False)]
    assert len(path.read_text().splitlines()) == len(lines)


def test_what_is_not_recorded_is_a_shortfall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record(0, TOGETHER, 0.5, 0.5) | {"settings": settings_digest()}) + "\n")
    assert demo_seeds.main(["--summary", "--records", str(path)]) == 1
    assert "39 runs of 10 seeds are not recorded" in capsys.readouterr().err


def test_a_table_of_seeds_and_what_is_missed() -> None:
    records = [record(0, TOGETHER, 0.55, 0.45), record(0, EPOCHS, 0.5, 0.35), record(0, STEPS, 0.52, 0.36)]
    records += [record(1, TOGETHER, 0.5, 0.44), record(1, EPOCHS, 0.49, 0.36)]
    assert rows_of_seeds(records)[1:] == [
        ("0", "+5.0 / +10.0", "+3.0 / +9.0", "–", "–"),
        ("1", "+1.0 / +8.0", "–", "–", "–"),
        ("mean", "+3.0 / +9.0", "+3.0 / +9.0", "–", "–"),
    ]
    assert shortfalls(records) == [] and rows_of_seeds([]) == []
    records += [record(2, TOGETHER, 0.4, 0.39), record(2, EPOCHS, 0.45, 0.36)]
    found = shortfalls(records)
    assert found == [
        "t_priv gains +0.3 points in the mean, +2 are wanted",
        "t_priv gains -5.0 points with seed 2, -1 are wanted in each",
        "t_uni gains +7.0 points in the mean, +8 are wanted",
        "t_uni gains +3.0 points with seed 2, +4 are wanted in each",
    ]


def test_the_committed_records_reach_what_is_wanted() -> None:
    records = read_records(RECORDS)
    page = demo_seeds.PAGE.read_text(encoding="utf-8")
    assert demo_seeds.fill(page, records) == page, "run: python -m edgestill.benchmarks.demo_seeds --summary"
    assert missing(records, range(SEEDS)) == [] and shortfalls(records) == []
