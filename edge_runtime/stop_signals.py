"""Signals that ask a command to end, taken so that what it has done is kept."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGPWR")
    if name in signal.Signals.__members__
)
"""What people, service managers, closing terminals, batch queues and limits of processor time end a process with."""


@contextmanager
def handling(note: Callable[[int, object], None]) -> Iterator[dict[int, object]]:
    """Calls `note` for these signals within the block, which is given what they did before.

    What is ignored stays so: with SIGHUP ignored, as `nohup` does it, a command outlives its terminal.
    """
    before: dict[int, object] = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, note)
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
