"""The benchmark's method on engines whose times are known, each in a real worker process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.benchmarks import processes
from edgestill.benchmarks.processes import CpuUse, WorkerFailed, WorkerProcess
from edgestill.benchmarks.step import (
    Case,
    StepSettings,
    Timings,
    measure_fresh,
    measure_interleaved,
    paired_ratio,
    split_steps,
    summarize,
)
from edgestill.benchmarks.worker import WorkerSpec
from edgestill.benchmarks.workload import make_batches
from edgestill.simulation.bundles import BundleRequest, run_export
from tests.support import bench_fakes
from tests.support.bench_fakes import QUICK_S, SLOW_S

QUICK, SLOW, DYING, RESTLESS, LARGE_CHILD, ABSENT = (
    f"tests.support.bench_fakes:{name}" for name in ("quick", "slow", "dying", "restless", "large_child", "absent")
)
SETTINGS = StepSettings(steps=12, rounds=4, warmup=2, cold_starts=1)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case("fake", 8, 1, bench_fakes.write_bundle(tmp_path))


@pytest.fixture(scope="module")
def w1_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    run_export(BundleRequest("cnn3", 8, options=("--widths", "8,8,16")).words(["onnxruntime"], folder))
    return folder


def timings(*rounds: tuple[float, ...], losses: tuple[float, ...] = (1.0,)) -> Timings:
    return Timings(rounds[0][0], losses, rounds)


@given(st.integers(1, 500), st.integers(1, 50))
def test_steps_are_divided_evenly(steps: int, rounds: int) -> None:
    counts = split_steps(steps, rounds)
    assert sum(counts) == steps
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert len(counts) == min(rounds, steps)


def test_paired_ratio_is_not_moved_by_a_machine_that_slows_down_in_the_middle() -> None:
    eager = timings((10, 10, 10), (10, 10, 10), (30, 30, 30), (30, 30, 30), (30, 30, 30))
    engine = timings((8, 8, 8), (8, 8, 8), (8, 24, 24), (24, 24, 24), (24, 24, 24))
    assert paired_ratio(engine, eager) == pytest.approx(0.8)


@given(st.lists(st.floats(0.1, 1000), min_size=8, max_size=40))
def test_figures_agree_with_numpy(steps: list[float]) -> None:
    figures = summarize(timings(tuple(steps)), None)
    assert figures["p50_ms"] == pytest.approx(np.median(steps))
    assert figures["p90_ms"] == pytest.approx(np.quantile(steps, 0.9))
    assert figures["mean_ms"] == pytest.approx(np.mean(steps))
    assert figures["ratio_to_eager"] is None


def test_losses_that_differ_from_eagers_show() -> None:
    eager = timings((1.0,), losses=(2.3, 2.0))
    assert summarize(timings((1.0,), losses=(2.3, 2.5)), eager)["first_losses_max_abs"] == pytest.approx(0.5)


def test_engines_take_turns_and_keep_their_times(case: Case) -> None:
    run = measure_interleaved(case, [QUICK, SLOW], SETTINGS, lambda text: None)
    measured, failed, peak = run.timings, run.failed, run.peak_flops_per_s
    assert not failed
    assert [len(one) for one in measured[QUICK].round_ms] == [3, 3, 3, 3]
    assert measured[QUICK].first_losses == (1.0, 2.0)
    assert min(measured[QUICK].step_ms) >= QUICK_S * 1000
    assert min(measured[SLOW].step_ms) >= SLOW_S * 1000
    assert peak is not None and 1e8 < peak < 1e14


def test_an_engine_that_fails_leaves_the_others_alone(case: Case) -> None:
    run = measure_interleaved(case, [ABSENT, QUICK, DYING], SETTINGS, lambda text: None)
    measured, failed = run.timings, run.failed
    assert list(measured) == [QUICK] and len(measured[QUICK].step_ms) == 12
    assert "absent_engine" in str(failed[ABSENT])
    assert "status 9" in str(failed[DYING]) and "out of memory" in str(failed[DYING])


def test_a_worker_that_does_not_rest_is_reported(case: Case) -> None:
    said: list[str] = []
    measure_interleaved(case, [RESTLESS, SLOW], StepSettings(40, 4, 1, 0), said.append)
    assert [text for text in said if "warning" in text and "restless" in text]
    assert not [text for text in said if "warning" in text and "slow" in text]


def test_a_busy_machine_is_reported(case: Case) -> None:
    # the child of a child that has ended is nobody's of ours: it counts as somebody else
    code = "import time; end = time.time() + 20\nwhile time.time() < end: sum(range(10000))"
    starter = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {code!r}], stdout=-3).pid)"
    )
    started = subprocess.run([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, check=True)
    said: list[str] = []
    try:
        run = measure_interleaved(case, [SLOW], StepSettings(60, 4, 1, 0), said.append)
    finally:
        os.kill(int(started.stdout), signal.SIGKILL)
    assert run.busy_share is not None and run.busy_share > 0.5 / (os.cpu_count() or 1)
    assert [text for text in said if "other processes" in text]


def test_share_of_others_leaves_out_ones_own() -> None:
    before, after = CpuUse(100.0, 40.0, 10.0), CpuUse(120.0, 52.0, 18.0)
    assert before.share_of_others_until(after) == pytest.approx(0.2)
    assert before.share_of_others_until(before) == 0


def test_memory_of_a_child_process_counts(case: Case) -> None:
    small = measure_fresh(case, QUICK, SETTINGS, lambda text: None)
    large = measure_fresh(case, LARGE_CHILD, SETTINGS, lambda text: None)
    assert small is not None and large is not None
    assert large.peak_rss_bytes - small.peak_rss_bytes > 60_000_000


def test_peak_memory_is_not_that_of_the_process_that_started_it(case: Case) -> None:
    # fork and exec let ru_maxrss keep the parent's peak
    ballast = np.ones(40_000_000)  # 320 MB
    fresh = measure_fresh(case, QUICK, SETTINGS, lambda text: None)
    assert ballast.nbytes > 300e6 and fresh is not None and fresh.peak_rss_bytes < 150e6


def test_cold_start_begins_before_the_process(case: Case) -> None:
    fresh = measure_fresh(case, SLOW, SETTINGS, lambda text: None)
    interpreter_s = min(_time_s([sys.executable, "-S", "-c", ""]) for _ in range(3))
    assert fresh is not None and fresh.cold_start_s > interpreter_s + SLOW_S


def test_a_device_engines_worker_imports_no_torch(case: Case) -> None:
    with WorkerProcess(WorkerSpec(QUICK, str(case.bundle), 1, 0)) as worker:
        worker.wait_ready()
        worker.ask("steps", count=1)
        assert worker.ask("memory")["imported"] == []


def test_a_worker_that_hangs_is_ended(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerProcess(WorkerSpec(SLOW, str(case.bundle), 1, 0), timeout_s=1.5) as worker:
        worker.wait_ready()
        with pytest.raises(WorkerFailed, match="no answer within"):
            worker.ask("steps", count=100_000)


def test_a_worker_ends_with_its_parent(case: Case) -> None:
    code = (
        "import sys\nfrom edgestill.benchmarks.processes import WorkerProcess, WorkerSpec\n"
        f"worker = WorkerProcess(WorkerSpec({QUICK!r}, {str(case.bundle)!r}, 1, 0))\n"
        "worker.wait_ready()\nprint(worker._process.pid, flush=True)\nimport os; os._exit(1)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=processes.worker_environment(1),
        capture_output=True,
        text=True,
        timeout=60,
    )
    pid = int(ran.stdout)
    deadline_s = time.monotonic() + 10
    while _is_running(pid):
        assert time.monotonic() < deadline_s, "the worker outlived its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["torch-eager", "torch-eager-channels-last"])
def test_eager_starts_from_the_bundles_state_like_the_engine(engine: str, w1_bundle: Path) -> None:
    case = Case("cnn3", 8, 1, w1_bundle)
    run = measure_interleaved(case, [engine, "onnxruntime"], SETTINGS, lambda text: None)
    assert not run.failed
    figures = summarize(run.timings["onnxruntime"], run.timings[engine])
    # the first loss shows the state, the second that both made the same update
    assert figures["first_losses_max_abs"] < 1e-3


def test_batches_have_the_manifests_inputs_and_repeat_with_the_seed() -> None:
    manifest = json.loads(json.dumps(bench_fakes.manifest()))
    first, again, other = (make_batches(manifest, seed) for seed in (0, 0, 1))
    for spec in manifest["inputs"]["train_step"]:
        array = first[0][spec["name"]]
        assert list(array.shape) == spec["shape"] and array.dtype == spec["dtype"]
        np.testing.assert_array_equal(array, again[0][spec["name"]])
    assert first[0]["labels"].max() < 4 and first[0]["learning_rate"] == np.float32(0.01)
    assert not np.array_equal(first[0]["images"], other[0]["images"])
    assert not np.array_equal(first[0]["images"], first[1]["images"])


def _time_s(command: list[str]) -> float:
    started_s = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started_s


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    if state == "Z":
        return False
    os.kill(pid, 0)
    return True
