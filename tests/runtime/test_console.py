"""The progress of slow commands, where no terminal is and on one."""

from __future__ import annotations

import sys
import time

import pytest

from edgestill.runtime.console import Progress, about


@pytest.mark.tiny
def test_lines_come_at_once_and_again_where_work_is_slow(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = iter(range(0, 1000, 30))
    with Progress(every_s=0.02, clock=lambda: float(next(ticks))) as progress:
        progress("tracing a student")
        assert capsys.readouterr().err == "tracing a student\n"
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tracing a student (30 s so far)\n")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.tiny
def test_on_a_terminal_a_line_is_written_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ValueError, match="broken"), Progress(every_s=0.02, clock=lambda: 0.0) as progress:
        progress("tracing")
        time.sleep(0.2)
        progress("lowering")
        raise ValueError("broken")
    first, last, rest = capsys.readouterr().err.split("\n")
    assert rest == "" and first.startswith("tracing\rtracing (0 s so far)\033[K") and last == "lowering"


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
    assert about(seconds) == text
