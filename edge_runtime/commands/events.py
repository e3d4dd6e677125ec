"""What `edgestill join` says: the events of a device as JSON lines, or in words."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgestill.runtime.console import printable, show_in_place
from edgestill.runtime.device.device import Device

_STEP_LINE_S = 30.0
"""Between two lines about training where no terminal shows every step."""


class EventOutput:
    """Events as JSON lines on stdout, or for a person as lines on stderr and a summary on stdout.

    `clock`: seconds, for how often a log hears of training.
    """

    def __init__(self, as_json: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._as_json, self._clock = as_json, clock
        self._told_s = clock()
        self._live = sys.stderr.isatty() and not as_json
        self._in_progress = False
        self.lost = False
        """Whether whoever looked on has left, as a closed terminal or the end of a pipe does."""

    def __call__(self, event: str, /, **details: Any) -> None:
        try:
            self._tell(event, details)
        except OSError:
            self.lost = True

    def _tell(self, event: str, details: Mapping[str, Any]) -> None:
        if self._as_json:
            print(json.dumps({"event": event, **details}), flush=True)
            return
        if event == "step":
            text = "step {step} of {steps}  epoch {epoch}  loss {loss:.4f}  {ms:.0f} ms".format(**details)
            if self._live:
                show_in_place(text)
                self._in_progress = True
            elif self._clock() - self._told_s >= _STEP_LINE_S:
                self._told_s = self._clock()
                print(f"edgestill: {text}", file=sys.stderr, flush=True)
            return
        self._told_s = self._clock()
        text = _describe(event, details)
        if text is not None:
            self.end_progress()
            print(f"edgestill: {printable(text)}", file=sys.stderr, flush=True)

    def end_progress(self) -> None:
        """Leaves the progress line, so that what follows starts on a line of its own."""
        if self._in_progress:
            self._in_progress = False
            with suppress(OSError):
                print(file=sys.stderr)

    def summary(self, device: Device, uploaded: int, bundle: Path, student: Path) -> None:
        """What this start has done, what the device has spent of its privacy ever since it is enrolled, and where its
        student lies, once it has learned."""
        self.end_progress()
        report = dict(device.last_report or {})
        if self._as_json:
            last = {"rounds_uploaded": uploaded, "phase": device.participant.phase, "report": report}
            last |= {"epsilon": device.epsilon, "bundle": str(bundle)}
            last |= {"state": str(student) if student.exists() else None}
            print(json.dumps({"summary": last}), flush=True)
            return
        print(f"rounds uploaded {uploaded}")
        for name, title in (("t_priv", "T_priv"), ("t_uni", "T_uni")):
            after = report.get("after", {}).get(name)
            if after is not None:
                alone = (report.get("alone") or {}).get(name)
                print(f"accuracy {title:<6} {after:.4f}" + (f"  alone {alone:.4f}" if alone is not None else ""))
        if report.get("step_ms") is not None:
            print(f"median step     {report['step_ms']:.1f} ms on {report['engine']}")
        privacy = device.equipment.options.privacy
        if privacy is not None:
            print(f"epsilon         {_epsilon(device.epsilon, privacy.delta)}")
        if student.exists():
            print(f"student         {student}, of the bundle {bundle}")


def _describe(event: str, details: Mapping[str, Any]) -> str | None:
    match event:
        case "found":
            return f"found {details['name']} at {details['url']}"
        case "enrolled":
            return f"enrolled as {details['device']} ({details['name']}) for task {details['task']}"
        case "assigned":
            return "{student} on {engine}, {samples} private samples; waiting for rounds".format(**details)
        case "waiting":
            return f"waiting: {'; '.join(details['reasons'])}"
        case "round":
            return "round {round}, {seconds_left:.0f} s left".format(**details)
        case "continuing":
            step = f" from step {details['step']}" if "step" in details else f" with {details['phase']}"
            return f"continuing round {details['round']}{step}"
        case "standing":
            return _describe_standing(details)
        case "trained":
            return f"trained: {_accuracy(details['before'])} → {_accuracy(details['after'])}"
        case "training alone":
            behind = f" ({details['behind']} rounds to catch up first)" if details["behind"] else ""
            return f"training a copy alone, to compare{behind}"
        case "uploaded":
            spent = f"; ε {_epsilon(details['epsilon'], details['delta'])}" if "delta" in details else ""
            return f"uploaded {details['size_bytes'] / 1e3:.1f} kB{spent}"
        case "given up":
            return "round {round} given up: {reason}".format(**details)
        case "out of reach":
            return f"{details['reason']}; trying again"
        case "in reach again":
            return "the coordinator answers again"
        case "notice":
            return str(details["text"])
        case "warning":
            return f"warning: {details['message']}"
        case "report not taken":
            return f"the report was not taken: {details['reason']}"
        case "finished":
            return "the task has no rounds left"
    return None


def _describe_standing(standing: Mapping[str, Any]) -> str | None:
    if standing.get("given_up") and standing["phase"] in ("collecting", "aggregating"):
        return f"round {standing['round']} given up here; waiting for its end"
    if standing["phase"] == "collecting":
        left_s = standing["seconds_left"]
        left = f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
        return f"waiting for others: {standing['uploads']} of {standing['goal']} uploads, {left} left"
    if standing["phase"] == "aggregating":
        return f"waiting for the outcome of round {standing['round']}"
    return None


def _epsilon(epsilon: float | None, delta: float) -> str:
    if epsilon is None:
        return "unlimited: something left this device without noise"
    return f"{epsilon:.2f} at δ {delta:g}, for all uploads of this device so far"


def _accuracy(scores: Mapping[str, float | None]) -> str:
    known = [f"{name} {scores[key]:.3f}" for name, key in (("T_priv", "t_priv"), ("T_uni", "t_uni"))
             if scores.get(key) is not None]  # fmt: skip
    return ", ".join(known) or "no tests"
