"""Times one training step on several engines in one run, interleaved with eager PyTorch.

Method: every engine lives in a process of its own and only one of them works at a time. After its own warm-up
each makes a few steps in turn, round after round, in an order that rotates; eager PyTorch takes part like any
other. Memory and cold start come from fresh processes afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from edgestill.benchmarks.processes import WorkerFailed, WorkerProcess, read_cpu_use
from edgestill.benchmarks.worker import EAGER, EAGER_CHANNELS_LAST, MATRIX_PRODUCT, NUMPY, WorkerSpec
from edgestill.benchmarks.workload import read_manifest

EAGER_ENGINES = (EAGER, EAGER_CHANNELS_LAST)
MEMORY_STEPS = 30
# Where others use more than this share of the machine, ratios mislead: PyTorch's OpenMP threads spin while
# they wait for each other, and on cores that others use a step on two threads takes ten times as long.
BUSY_LIMIT = 0.05
# A share of idle time above which a worker that should rest disturbs the others.
IDLE_CPU_LIMIT = 0.05

Progress = Callable[[str], None]


@dataclass(frozen=True)
class StepSettings:
    """How much to measure. `steps` are divided among `rounds`; `warmup` steps come before, uncounted."""

    steps: int = 40
    rounds: int = 8
    warmup: int = 5
    cold_starts: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One student at one batch size and thread count; `bundle` is None when its export failed."""

    student: str
    batch: int
    threads: int
    bundle: Path | None


@dataclass(frozen=True)
class Timings:
    """One engine's steps: `round_ms[r]` are those of round r; `first_losses` begin with its first step."""

    first_step_ms: float
    first_losses: tuple[float, ...]
    round_ms: tuple[tuple[float, ...], ...]

    @property
    def step_ms(self) -> list[float]:
        return [step for one_round in self.round_ms for step in one_round]


@dataclass(frozen=True)
class FreshRun:
    """Fresh processes: peak memory after `MEMORY_STEPS` steps, process start to first finished step (of `NUMPY`: to the
    end of its import)."""

    peak_rss_bytes: int
    cold_start_s: float


def split_steps(steps: int, rounds: int) -> list[int]:
    """Steps of each round: as even as can be, their sum is `steps`, none is zero."""
    rounds = min(rounds, steps)
    return [steps // rounds + (index < steps % rounds) for index in range(rounds)]


def paired_ratio(engine: Timings, eager: Timings) -> float:
    """Median over the rounds of (median step of the engine ÷ median step of eager in the same round).

    A machine's speed drifts by more than engines differ; within one round both see the same machine.
    """
    return median(
        median(own) / median(reference)
        for own, reference in zip(engine.round_ms, eager.round_ms, strict=True)
    )


def summarize(timings: Timings, eager: Timings | None) -> dict[str, float | int | None]:
    """The figures of one engine's steps; ratios are None without eager PyTorch."""
    steps = timings.step_ms
    p50, p90, p99 = (float(value) for value in np.percentile(steps, (50, 90, 99)))
    figures: dict[str, float | int | None] = {
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "mean_ms": fmean(steps),
        "best_ms": min(steps),
        "first_step_ms": timings.first_step_ms,
        "steps": len(steps),
        "rounds": len(timings.round_ms),
        "ratio_to_eager": None,
        "ratio_of_medians": None,
        "first_losses_max_abs": None,
    }
    if eager is not None:
        figures["ratio_to_eager"] = paired_ratio(timings, eager)
        figures["ratio_of_medians"] = median(steps) / median(eager.step_ms)
        figures["first_losses_max_abs"] = max(
            abs(own - reference)
            for own, reference in zip(timings.first_losses[:2], eager.first_losses[:2], strict=True)
        )
    return figures


class _Turns:
    """Workers that are asked one at a time; one that fails leaves, and its reason stays in `failed`."""

    def __init__(self, case: Case, seed: int, progress: Progress) -> None:
        self.failed: dict[str, WorkerFailed] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.idle_cpu_s: dict[str, float] = {}
        self._case, self._seed, self._progress = case, seed, progress

    def open(self, engine: str) -> None:
        self._progress(f"opening {engine}")
        spec = WorkerSpec(engine, str(self._case.bundle), self._case.threads, self._seed)
        self.workers[engine] = WorkerProcess(spec)
        self.idle_cpu_s[engine] = 0.0
        try:
            self.workers[engine].wait_ready()
        except WorkerFailed as error:
            self._drop(engine, error)

    def ask(self, engine: str, do: str, **arguments: Any) -> dict[str, Any] | None:
        """The engine's reply; None when it failed, now or before."""
        if engine not in self.workers:
            return None
        try:
            self.idle_cpu_s[engine] += self.workers[engine].idle_cpu_s()
            return self.workers[engine].ask(do, **arguments)
        except WorkerFailed as error:
            self._drop(engine, error)
            return None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def _drop(self, engine: str, error: WorkerFailed) -> None:
        self.failed[engine] = error
        self.workers.pop(engine).close()
        self._progress(f"{engine}: {error}")


@dataclass(frozen=True)
class InterleavedRun:
    """Timings and failures by engine, the machine's best matrix-product rate in FLOP/s, and the share of the
    machine that other processes used meanwhile; None where unknown."""

    timings: dict[str, Timings]
    failed: dict[str, WorkerFailed]
    peak_flops_per_s: float | None
    busy_share: float | None


def measure_interleaved(
    case: Case, engines: Sequence[str], settings: StepSettings, progress: Progress
) -> InterleavedRun:
    """Steps all engines in turn."""
    warmups: dict[str, dict[str, list[float]]] = {}
    rounds: dict[str, list[tuple[float, ...]]] = {engine: [] for engine in engines}
    peaks: list[float] = []
    turns = _Turns(case, settings.seed, progress)
    try:
        for engine in (MATRIX_PRODUCT, *engines):
            turns.open(engine)
        for engine in engines:
            # one step at least comes before those that count: the first one also sets up
            if reply := turns.ask(engine, "steps", count=max(1, settings.warmup)):
                warmups[engine] = reply
        turns.idle_cpu_s = dict.fromkeys(turns.idle_cpu_s, 0.0)
        started_s, use_before = time.monotonic(), read_cpu_use()
        counts = split_steps(settings.steps, settings.rounds)
        for index, count in enumerate(counts):
            progress(f"round {index + 1} of {len(counts)}")
            if reply := turns.ask(MATRIX_PRODUCT, "peak"):
                peaks.append(reply["flops_per_s"])
            first = index % len(engines)
            for engine in (*engines[first:], *engines[:first]):
                if reply := turns.ask(engine, "steps", count=count):
                    rounds[engine].append(tuple(reply["step_ms"]))
        limit_s, use_after = IDLE_CPU_LIMIT * (time.monotonic() - started_s), read_cpu_use()
        for engine in turns.workers:
            if (used_s := turns.idle_cpu_s[engine]) > limit_s:
                progress(f"warning: {engine} used {used_s:.1f} s of processor time in the turns of others")
    finally:
        turns.close()
    busy_share = use_before.share_of_others_until(use_after) if use_before and use_after else None
    if busy_share is not None and busy_share > BUSY_LIMIT:
        progress(f"warning: other processes used {busy_share:.0%} of this machine: don't trust these figures")
    timings = {
        engine: Timings(
            warmups[engine]["step_ms"][0], tuple(warmups[engine]["losses"]), tuple(rounds[engine])
        )
        for engine in engines
        if engine not in turns.failed
    }
    return InterleavedRun(timings, turns.failed, max(peaks, default=None), busy_share)


def measure_fresh(case: Case, engine: str, settings: StepSettings, progress: Progress) -> FreshRun | None:
    """Starts the engine in fresh processes; None when `cold_starts` is 0. Raises WorkerFailed."""
    cold_starts_s: list[float] = []
    peaks_bytes: list[int] = []
    for attempt in range(settings.cold_starts):
        progress(f"fresh process {attempt + 1} of {settings.cold_starts}: {engine}")
        with WorkerProcess(WorkerSpec(engine, str(case.bundle), case.threads, settings.seed)) as worker:
            worker.wait_ready()
            if engine != NUMPY:
                worker.ask("steps", count=1)
            cold_starts_s.append(time.monotonic() - worker.started_s)
            if attempt == 0:
                if engine != NUMPY:
                    worker.ask("steps", count=MEMORY_STEPS - 1)
                peaks_bytes.append(worker.peak_rss_bytes())
    return FreshRun(max(peaks_bytes), median(cold_starts_s)) if cold_starts_s else None


def measure_case(
    case: Case, engines: Sequence[str], settings: StepSettings, progress: Progress
) -> list[dict[str, Any]]:
    """Result lines of one case: eager PyTorch first, then the engines; one that failed has an `error`."""
    order = list(dict.fromkeys((*EAGER_ENGINES, *engines)))
    run = measure_interleaved(case, order, settings, progress)
    timings, failed, peak = run.timings, dict(run.failed), run.peak_flops_per_s
    fresh: dict[str, FreshRun | None] = {}
    for engine in timings:
        try:
            fresh[engine] = measure_fresh(case, engine, settings, progress)
        except WorkerFailed as error:
            failed[engine] = error
    alone = measure_fresh(case, NUMPY, settings, progress)
    numpy = {
        "numpy_rss_bytes": alone.peak_rss_bytes if alone else None,
        "numpy_start_s": alone.cold_start_s if alone else None,
    }
    eager_run = fresh.get(EAGER)
    flops = read_manifest(case.bundle).get("flops_per_step")
    lines = []
    for engine in order:
        if engine in failed:
            lines.append(error_line(case, engine, str(failed[engine]), failed[engine].hint))
            continue
        figures = summarize(timings[engine], timings.get(EAGER))
        alone = fresh[engine]
        memory = alone.peak_rss_bytes if alone else None
        rate = flops * 1000 / figures["p50_ms"] if flops else None
        lines.append(
            {
                "engine": engine,
                "student": case.student,
                "batch": case.batch,
                "threads": case.threads,
                **figures,
                "peak_rss_bytes": memory,
                "rss_ratio_to_eager": memory / eager_run.peak_rss_bytes if memory and eager_run else None,
                "cold_start_s": alone.cold_start_s if alone else None,
                **numpy,
                "fraction_of_peak": rate / peak if rate and peak else None,
                "flops_per_step": flops,
                "peak_flops_per_s": peak,
                "busy_share": run.busy_share,
                "seed": settings.seed,
            }
        )
    return lines


def error_line(case: Case, engine: str, error: str, hint: str | None) -> dict[str, Any]:
    """The result line of an engine that could not be measured."""
    return {
        "engine": engine,
        "student": case.student,
        "batch": case.batch,
        "threads": case.threads,
        "error": error,
        "hint": hint,
    }
