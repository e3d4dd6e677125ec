"""What `edgestill join` says: the events of a device as JSON lines, or in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from edge_runtime.device import Device


class EventOutput:
    """Events as JSON lines on stdout, or for a person as lines on stderr and a summary on stdout."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._live = sys.stderr.isatty() and not as_json
        self._in_progress = False

    def __call__(self, event: str, /, **details: Any) -> None:
        if self._as_json:
            print(json.dumps({"event": event, **details}), flush=True)
            return
        if event == "step":
            if self._live:
                text = "\rstep {step}  epoch {epoch}  loss {loss:.4f}  {ms:.0f} ms\033[K".format(**details)
                print(text, end="", file=sys.stderr, flush=True)
                self._in_progress = True
            return
        text = _describe(event, details)
        if text is not None:
            self.end_progress()
            print(f"edgestill: {text}", file=sys.stderr, flush=True)

    def end_progress(self) -> None:
        """Leaves the progress line, so that what follows starts on a line of its own."""
        if self._in_progress:
            print(file=sys.stderr)
            self._in_progress = False

    def summary(self, device: Device, uploaded: int) -> None:
        report = dict(device.last_report or {})
        if self._as_json:
            last = {"rounds_uploaded": uploaded, "phase": device.participant.phase, "report": report}
            print(json.dumps({"summary": last}), flush=True)
            return
        print(f"rounds uploaded {uploaded}")
        for name, title in (("t_priv", "T_priv"), ("t_uni", "T_uni")):
            after = report.get("after", {}).get(name)
            if after is not None:
                print(f"accuracy {title:<6} {after:.4f}")
        if report.get("step_ms") is not None:
            print(f"median step     {report['step_ms']:.1f} ms on {report['engine']}")
        if report.get("epsilon") is not None:
            print(f"epsilon         {report['epsilon']:.2f}")


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
        case "uploaded":
            return f"uploaded {details['size_bytes'] / 1e3:.1f} kB"
        case "given up":
            return "round {round} given up: {reason}".format(**details)
        case "out of reach":
            return f"{details['reason']}; trying again"
        case "report not taken":
            return f"the report was not taken: {details['reason']}"
        case "finished":
            return "the task has no rounds left"
    return None


def _describe_standing(standing: Mapping[str, Any]) -> str | None:
    if standing["phase"] == "collecting":
        left_s = standing["seconds_left"]
        left = f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
        return f"waiting for others: {standing['uploads']} of {standing['goal']} uploads, {left} left"
    if standing["phase"] == "aggregating":
        return f"waiting for the outcome of round {standing['round']}"
    return None


def _accuracy(scores: Mapping[str, float | None]) -> str:
    known = [f"{name} {scores[key]:.3f}" for name, key in (("T_priv", "t_priv"), ("T_uni", "t_uni"))
             if scores.get(key) is not None]  # fmt: skip
    return ", ".join(known) or "no tests"
