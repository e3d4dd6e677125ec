"""Grids of runs: what is recorded, what is made again, what a failure or a torn line does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgestill.benchmarks.experiments.grid import Cell, Context, RunsFailed, read_records, run_cells
from edgestill.runtime.errors import EdgestillError


def square(settings, context):
    """What workers run; it keeps count of its calls in files."""
    (context.cache / f"{settings['x']}-{len(os.listdir(context.cache))}").touch()
    if settings["x"] == 13:
        raise ValueError("unlucky")
    return {"y": settings["x"] ** 2, "threads": os.environ.get("OMP_NUM_THREADS")}


@pytest.fixture
def context(tmp_path):
    (tmp_path / "calls").mkdir()
    return Context("data", "transfer", tmp_path / "calls")


def cells_of(*numbers):
    return [Cell("squares", {"x": number}) for number in numbers]


def calls(context):
    return sorted(int(name.split("-")[0]) for name in os.listdir(context.cache))


def test_key_is_of_the_settings_alone():
    assert Cell("a", {"x": 1, "y": [2]}).key == Cell("a", {"y": [2], "x": 1}).key
    keys = {Cell("a", {"x": 1}).key, Cell("b", {"x": 1}).key, Cell("a", {"x": 2}).key}
    assert len(keys) == 3 and all(len(key) == 16 for key in keys)


def test_what_is_recorded_is_not_run_again(tmp_path, context):
    path = tmp_path / "out" / "squares.jsonl"
    first = run_cells(cells_of(1, 2), square, context, path, workers=1, origin={"commit": "c"})
    assert [record["result"]["y"] for record in first] == [1, 4]
    assert all(record["commit"] == "c" and record["elapsed_s"] >= 0 for record in first)
    second = run_cells(cells_of(3, 2, 1, 3), square, context, path, workers=1)
    assert [record["result"]["y"] for record in second] == [9, 4, 1]
    assert calls(context) == [1, 2, 3]
    assert second[1:] == first[::-1]


def test_a_run_can_be_asked_for_again_and_its_newest_record_counts(tmp_path, context):
    path = tmp_path / "squares.jsonl"
    run_cells(cells_of(1, 2), square, context, path, workers=1)
    run_cells(cells_of(1, 2), square, context, path, workers=1, again=lambda cell: cell.settings["x"] == 2)
    assert calls(context) == [1, 2, 2]
    assert len(read_records(path)) == 2 and len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("torn", ['{"experiment": "squa', "{", ""])
def test_a_torn_last_line_is_made_again(tmp_path, context, torn):
    path = tmp_path / "squares.jsonl"
    run_cells(cells_of(1), square, context, path, workers=1)
    with path.open("a") as file:
        file.write(torn)
    assert len(read_records(path)) == 1
    run_cells(cells_of(1, 2), square, context, path, workers=1)
    assert [json.loads(line)["settings"]["x"] for line in path.read_text().splitlines()] == [1, 2]


def test_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "squares.jsonl"
    path.write_text(
        '{"experiment": "squares", "key": "a"}\nnonsense\n{"experiment": "squares", "key": "b"}\n'
    )
    with pytest.raises(EdgestillError, match="line 2"):
        read_records(path)


def test_records_of_another_experiment_are_told_apart(tmp_path, context):
    path = tmp_path / "both.jsonl"
    run_cells([*cells_of(1), Cell("other", {"x": 1})], square, context, path, workers=1)
    assert len(read_records(path)) == 2
    assert [record["experiment"] for record in read_records(path, "other")] == ["other"]
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_stops_no_other_run(tmp_path, context, workers):
    path, heard = tmp_path / "squares.jsonl", []
    with pytest.raises(RunsFailed, match="1 of 3"):
        run_cells(cells_of(1, 13, 3), square, context, path, workers=workers, on_done=heard.append)
    assert sorted(record["settings"]["x"] for record in read_records(path)) == [1, 3]
    assert [done.error for done in heard if done.error] == ["ValueError: unlucky"]
    assert heard[-1].finished == heard[-1].total == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_results_on_one_thread_each(tmp_path, context, workers):
    records = run_cells(cells_of(1, 2, 3), square, context, tmp_path / "squares.jsonl", workers=workers)
    assert [record["result"] for record in records] == [{"y": x * x, "threads": "1"} for x in (1, 2, 3)]


def test_an_interrupt_keeps_what_is_finished(tmp_path, context):
    path = tmp_path / "squares.jsonl"

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(cells_of(1, 2), square, context, path, workers=1, on_done=interrupt)
    assert [record["settings"]["x"] for record in read_records(path)] == [1]


def end_at_13(settings, context):
    try:
        if settings["x"] == 13:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
    finally:
        time.sleep(0.2)
        (context.cache / f"closed-{settings['x']}").touch()
    return {}


def test_a_worker_that_is_told_to_end_closes_what_it_has_open_and_its_run_fails(tmp_path, context):
    heard = []
    with pytest.raises(RunsFailed):
        run_cells(
            cells_of(1, 13, 2, 3), end_at_13, context, tmp_path / "x.jsonl", workers=1, on_done=heard.append
        )
    assert sorted(os.listdir(context.cache)) == ["closed-1", "closed-13"]  # and takes no more
    assert sorted(bool(done.error) for done in heard) == [False, True, True, True]
    assert any("told to end" in done.error for done in heard if done.error)
    assert len(read_records(tmp_path / "x.jsonl")) == 1


def linger(settings, context):
    (context.cache / f"pid-{os.getpid()}").touch()
    try:
        time.sleep(600)
    finally:
        time.sleep(0.2)
        (context.cache / f"closed-{os.getpid()}").touch()


def test_ctrl_c_ends_workers_at_once_and_without_a_word(tmp_path, context):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib import Path; "
        "from tests.benchmarks import test_experiment_grid as t; "
        f"t.run_cells(t.cells_of(1, 2, 3), t.linger, t.Context('', '', Path({str(context.cache)!r})), "
        f"Path({str(tmp_path / 'x.jsonl')!r}), workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(os.listdir(context.cache)) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1]  # ten minutes if the runs were waited for
    finally:
        process.kill()
    assert told.rstrip().endswith("KeyboardInterrupt") and "SpawnProcess" not in told
    started, closed = (
        {name.partition("-")[2] for name in os.listdir(context.cache) if name.startswith(what)}
        for what in ("pid", "closed")
    )
    assert len(started) == 2 and closed == started
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
