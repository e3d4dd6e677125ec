"""The demo's four devices, and what is shown of them while they train."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgestill.simulation.demo_commands import Background, Commands, DemoFailed


@dataclass(frozen=True)
class DemoDevice:
    """A device; `memory_mb` is what it offers for training, None all."""

    name: str
    memory_mb: float | None = None


# The coordinator gives each the largest student that fits its memory: cnn3, cnn4, cnn5 and cnn3, as a simulation deals.
DEVICES = (
    DemoDevice("camera", 6.0),
    DemoDevice("tablet", 7.0),
    DemoDevice("phone"),
    DemoDevice("watch", 6.0),
)


@dataclass
class Seen:
    """What one device has said so far."""

    device: str = ""
    student: str = ""
    samples: int = 0
    round: int = 0
    doing: str = "starting"
    settled: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Reports by the number of the round."""
    news: list[str] = field(default_factory=list)


class Board:
    """Turns the events of all devices into lines for people, and keeps their reports."""

    def __init__(self, show: Commands) -> None:
        self._show = show
        self._lock = threading.Lock()
        self.seen = [Seen() for _ in DEVICES]

    def listener(self, number: int) -> Any:
        """What takes the lines of device `number`, in a thread of its own."""

        def listen(line: str) -> None:
            event = json.loads(line)
            with self._lock:
                note(self.seen[number], event)

        return listen

    def follow(self, joined: Sequence[Background], server: Background) -> None:
        """Shows what happens until every device has left. Errors: DemoFailed when a process fails."""
        while any(process.poll() is None for process in joined):
            if server.poll() is not None:
                server.check()
                raise DemoFailed("the coordinator ended before the devices")
            for process in joined:
                if process.poll():
                    process.check()
            self._show_news()
            time.sleep(0.2)
        for process in joined:
            process.check()
        self._show_news()

    def _show_news(self) -> None:
        with self._lock:
            for device, seen in zip(DEVICES, self.seen, strict=True):
                for text in seen.news:
                    self._show.say_once(f"  {device.name:<7} {text}")
                seen.news.clear()
            pairs = zip(DEVICES, self.seen, strict=True)
            doing = [f"{device.name} {seen.doing}" for device, seen in pairs]
        self._show.progress("  " + " | ".join(doing))


def note(seen: Seen, event: dict[str, Any]) -> None:
    """Changes what is known of a device by one event of `edgestill join --json`."""
    match event.get("event"):
        case "assigned":
            seen.device, seen.student = event["device"], event["student"]
            seen.samples = event["samples"]
            seen.news.append(f"has {seen.student} on {event['engine']} and {seen.samples} private samples")
        case "round":
            seen.round = event["number"]
        case "step":
            seen.doing = f"round {seen.round} step {event['step']}"
        case "settled":
            report = event["report"]
            seen.settled[seen.round] = report
            seen.doing = f"round {seen.round} uploaded"
            before, after = report["before"], report["after"]
            seen.news.append(
                f"round {seen.round}: T_priv {before['t_priv']:.1%} to {after['t_priv']:.1%}, "
                f"T_uni {before['t_uni']:.1%} to {after['t_uni']:.1%}, "
                f"{report['bytes_up'] / 1e3:.0f} kB up"
            )
        case "given up":
            seen.news.append(f"gave up {event['round']}: {event['reason']}")
        case "finished":
            seen.doing = "finished"
