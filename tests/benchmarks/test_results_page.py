"""docs/results.md: every figure is what the committed records say, every experiment on it names its command."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgestill.benchmarks.experiments import EXPERIMENTS
from edgestill.benchmarks.experiments.grid import Options, read_records
from edgestill.benchmarks.reproduce import COMMITTED, load_experiment
from edgestill.benchmarks.results_page import BLOCK, PAGE, fill

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
SHOWN = [found["name"] for found in BLOCK.finditer(PAGE_TEXT)]

pytestmark = pytest.mark.unit


def test_the_page_is_what_the_records_say() -> None:
    assert fill(PAGE_TEXT) == PAGE_TEXT, "run `make results` and commit the page"
    assert SHOWN and set(SHOWN) <= EXPERIMENTS.keys()


def test_no_figure_stands_outside_of_what_the_records_fill() -> None:
    by_hand = BLOCK.sub("", PAGE_TEXT)
    assert not re.findall(r"\.\d{3}\b|\d points|p = 0", by_hand)


def test_every_experiment_is_on_the_page_or_named_as_not_measured() -> None:
    waiting = PAGE_TEXT.partition("\n## Not measured in full yet\n")[2]
    for name in EXPERIMENTS:
        assert (name in SHOWN) != (f"`{name}`" in waiting), name


@pytest.mark.parametrize("name", SHOWN)
def test_every_run_of_an_experiment_on_the_page_is_recorded(name: str) -> None:
    experiment = load_experiment(name)
    records = {record["key"]: record for record in read_records(COMMITTED / f"{name}.jsonl", name)}
    named = {
        what: {r["settings"][what] for r in records.values() if what in r["settings"]}
        for what in ("data", "transfer")
    }
    assert all(len(names) <= 1 for names in named.values())
    found: list[dict[str, Any]] = []
    for stage in experiment.stages(
        Options(data=named["data"].pop(), transfer="".join(named["transfer"]) or "-")
    ):
        keys = [cell.key for cell in stage(found)]
        assert records.keys() >= set(keys), (
            f"{len(set(keys) - records.keys())} of {len(keys)} runs are missing"
        )
        found += [records[key] for key in keys]
    # and no others, which an earlier protocol has left
    assert len(found) == len(records)


@pytest.mark.parametrize("name", SHOWN)
def test_a_command_and_plots_that_exist_stand_beside_each_experiment(name: str) -> None:
    section = PAGE_TEXT[: PAGE_TEXT.index(f"<!-- {name}:begin -->")].rpartition("\n## ")[2]
    assert f"edgestill reproduce {name} --data DIR" in section
    plots = re.findall(rf"\(\.\./(benchmarks/results/reproduce/{name}-[\w-]+\.png)\)", section)
    assert plots and all((PAGE.parent.parent / plot).is_file() for plot in plots)


def test_a_figure_that_was_changed_by_hand_is_replaced(tmp_path: Path) -> None:
    name = SHOWN[0]
    shutil.copy(COMMITTED / f"{name}.jsonl", tmp_path)
    page = f"before 0.123\n<!-- {name}:begin -->\n0.999\n<!-- {name}:end -->\nafter\n"
    filled = fill(page, tmp_path)
    assert "0.999" not in filled and "| --- |" in filled
    assert filled.startswith("before 0.123\n<!--") and filled.endswith("-->\nafter\n")
    assert fill(filled, tmp_path) == filled


def test_an_experiment_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no experiment is called alchemy"):
        fill("<!-- alchemy:begin -->\n<!-- alchemy:end -->", tmp_path)
