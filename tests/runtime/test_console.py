"""The progress of slow commands, where no terminal is and on one."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from edgestill.runtime.console import Progress, cut, describe_time


class Clock:
    """Goes on by a step whenever it is asked, and lets a test wait until it has been."""

    def __init__(self, step_s: float = 30) -> None:
        self._step_s, self._asked = step_s, 0
        self._changed = threading.Condition()

    def __call__(self) -> float:
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            return self._step_s * (self._asked - 1)

    def wait(self, asked: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._asked >= asked, timeout=60)


@pytest.mark.tiny
def test_lines_come_at_once_and_again_where_work_is_slow(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(every_s=0.02, clock=clock) as progress:
        progress("tracing a student")
        clock.wait(3)  # asked at the line, for what comes next, and for what comes after that
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tracing a student\ntracing a student (30 s so far)\n")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.tiny
def test_on_a_terminal_a_line_is_written_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = Clock(step_s=0)
    with pytest.raises(ValueError, match="broken"), Progress(every_s=0.02, clock=clock) as progress:
        progress("tracing")
        clock.wait(3)
        progress("lowering")
        raise ValueError("broken")
    first, last, rest = capsys.readouterr().err.split("\n")
    assert rest == "" and first.startswith("\rtracing\033[K\rtracing (0 s so far)\033[K")
    assert last.startswith("\rlowering\033[K")


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("text", "columns", "seen"),
    [
        ("step 3", 6, "step 3"),
        ("step 34", 6, "step …"),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("e\u0301e\u0301e\u0301", 3, "e\u0301e\u0301e\u0301"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
        ("", 0, ""),
    ],
)
def test_a_line_is_cut_to_what_a_terminal_shows(text: str, columns: int, seen: str) -> None:
    assert cut(text, columns) == seen


def on_a_terminal(columns: int, code: str) -> str:
    """What a program writes to stderr where that is a terminal so wide."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    written = b""
    try:
        while part := os.read(master, 65536):
            written += part
    except OSError:  # how the end of a terminal reads
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0, written
    return written.decode()


@pytest.mark.parametrize("columns", [20, 200])
@pytest.mark.parametrize(
    "code",
    [
        "import threading\n"
        "from edgestill.runtime import console\n"
        "shown, show = threading.Semaphore(0), console.show_in_place\n"
        "console.show_in_place = lambda text: (show(text), shown.release())\n"
        "with console.Progress(every_s=0.01) as progress:\n"
        "    progress('lowering the training step for native')\n"
        "    for _ in range(2): assert shown.acquire(timeout=60)\n",
        "from edgestill.runtime.commands.events import EventOutput\n"
        "output = EventOutput(False)\n"
        "for n in range(3): output('step', step=n, steps=1000, epoch=1, loss=2.0, ms=33.0)\n"
        "output.end_progress()\n",
        "from edgestill.runtime.commands.train_output import Output\n"
        "from edgestill.runtime.training.trainer import StepRecord\n"
        "output = Output(False, 1000)\n"
        "for n in range(3): assert output.step(StepRecord(n, 1000, 1, 2.0, 2.0, None, 0.5, 0.1, 33.0))\n"
        "output.end_progress()\n",
    ],
    ids=["progress", "join", "train"],
)
def test_a_narrow_terminal_shows_one_line(columns: int, code: str) -> None:
    written = on_a_terminal(columns, code)
    assert written.endswith("\r\n") and written.count("\n") == 1
    shown = [line.removesuffix("\033[K") for line in written.removesuffix("\r\n").split("\r")]
    assert len(shown) >= 3 and max(map(len, shown)) < columns
    assert any(line.endswith("…") for line in shown) == (columns == 20)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 10 s"),
        (44, "about 40 s"),
        (84, "about 80 s"),
        (91, "about 2 min"),
        (3500, "about 58 min"),
        (3599, "about 1 h"),
        (7700, "about 2 h 10 min"),
        (100_000, "about 1.2 days"),
    ],
)
def test_a_time_to_come_is_no_more_exact_than_an_estimate(seconds: float, text: str) -> None:
    assert describe_time(seconds) == text
