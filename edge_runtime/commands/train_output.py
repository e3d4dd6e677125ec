"""What `edgestill train` says: progress, and a summary, for people and for programs."""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgestill.runtime.console import show_in_place
from edgestill.runtime.engines.registry import Engine
from edgestill.runtime.training.evaluation import Evaluation
from edgestill.runtime.training.plan import Run
from edgestill.runtime.training.trainer import StepRecord


def summarise(
    planned: Run, engine: Engine, state_path: Path, first_step: int, times_ms: list[float],
    last_epoch: list[StepRecord], peak_bytes: int | None, result: Evaluation | None,
) -> dict[str, Any]:  # fmt: skip
    labelled = [record.accuracy for record in last_epoch if record.accuracy is not None]
    return {
        "accuracy": None if result is None else result.accuracy,
        "loss": None if result is None else result.loss,
        "per_class": None if result is None else result.per_class,
        "samples": None if result is None else result.samples,
        "train_loss": statistics.fmean(record.loss for record in last_epoch) if last_epoch else None,
        "train_accuracy": statistics.fmean(labelled) if labelled else None,
        "ms_per_step_median": round(statistics.median(times_ms), 3) if times_ms else None,
        "peak_rss_bytes": peak_bytes,
        "engine": engine.name,
        "state": str(state_path),
        "steps": planned.total_steps,
        "epochs": planned.settings.epochs,
        "resumed_from_step": first_step,
    }


class Output:
    """JSON lines on stdout, or for a person a progress line on stderr and a summary on stdout."""

    def __init__(self, as_json: bool, total_steps: int) -> None:
        self._as_json = as_json
        self._total_steps = total_steps
        self._live = sys.stderr.isatty() and not as_json

    def start(self, first_step: int, planned: Run, engine: Engine, state_path: Path) -> None:
        if first_step >= self._total_steps:
            print(f"edgestill: {state_path} holds this run, finished; nothing left to train", file=sys.stderr)
        elif first_step:
            print(f"edgestill: going on from step {first_step} of {self._total_steps}", file=sys.stderr)
        elif not self._as_json:
            samples = len(planned.plan.dataset)
            print(
                f"edgestill: {planned.bundle.student.name} on {engine.name}, {samples} samples, "
                f"{self._total_steps} steps",
                file=sys.stderr,
            )

    def step(self, record: StepRecord) -> bool:
        """False where nobody can be told any more."""
        try:
            if self._as_json:
                print(json.dumps(record.as_json()), flush=True)
            elif self._live:
                show_in_place(
                    f"step {record.step}/{self._total_steps}  epoch {record.epoch}  loss {record.loss:.4f}  "
                    f"accuracy {record.accuracy:.2f}  {record.ms:.0f} ms"
                )
        except OSError:
            return False
        return True

    def end_progress(self) -> None:
        """Leaves the progress line, so that an error or the summary starts on a line of its own."""
        if self._live:
            with suppress(OSError):
                print(file=sys.stderr)

    def summary(self, summary: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps({"summary": summary}), flush=True)
            return
        if summary["accuracy"] is not None:
            kind = "held-out" if summary["tested_on"] == "held out" else "test"
            print(f"accuracy        {summary['accuracy']:.4f} on {summary['samples']} {kind} samples")
            print(f"loss            {summary['loss']:.4f}")
        if summary["train_loss"] is not None:
            seen = summary["train_accuracy"]
            beside = "" if seen is None else f", accuracy {seen:.4f}"
            print(f"training loss   {summary['train_loss']:.4f}{beside}, of the last epoch")
        if summary["ms_per_step_median"] is not None:
            print(f"median step     {summary['ms_per_step_median']:.1f} ms on {summary['engine']}")
        if summary["peak_rss_bytes"] is not None:
            print(f"peak memory     {summary['peak_rss_bytes'] / 1e6:.0f} MB")
        print(f"state           {summary['state']}")
