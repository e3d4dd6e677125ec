"""The demo's commands and table; the whole of it, small, in the long tier."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import demo, processes
from benchmarks.demo import Commands, DemoFailed, TrainedStudent, summary_table

# Stands for `edgestill`: says its words on stderr, more than a pipe holds, and answers as the real one does.
FAKE = """
import json, sys
words = sys.argv[1:]
print("said on stderr " * 10000, file=sys.stderr)
if words[0] == "train":
    for step in (1, 2):
        print(json.dumps({"step": step, "epoch": 1, "loss": 2.0 / step}), flush=True)
    print(json.dumps({"summary": {"accuracy": 0.5, "words": words}}))
elif words[0] == "verify":
    entry = {"ok": False, "steps": 3, "loss_max_abs": 1e-7, "state_max_rel": 0.5}
    print(json.dumps({"engines": {"onnxruntime": {**entry, "ok": True}, "executorch": entry}}))
    sys.exit(1)
else:
    print("edgestill: error: no such student", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def commands(screen: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    script = tmp_path / "fake edgestill.py"
    script.write_text(FAKE)
    monkeypatch.setattr(demo, "edgestill_program", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(demo, "PLAIN_PROGRESS_EVERY_S", 0.0)
    return Commands(screen)


def test_training_shows_the_command_and_progress_and_gives_the_summary(
    commands: Commands, screen: io.StringIO
) -> None:
    summary = commands.train(Path("demo/student"), 4, "--limit", 400)
    assert summary["accuracy"] == 0.5
    assert summary["words"][:6] == ["train", "demo/student", "--data", "cifar10-mini", "--epochs", "4"]
    shown = screen.getvalue()
    assert "train demo/student --data cifar10-mini --epochs 4 --limit 400" in shown
    assert "fake edgestill.py' train" in shown, "a path with a space must be quoted as a shell needs it"
    assert "epoch 1 of 4, step 2, loss 1.000" in shown


def test_a_failing_command_ends_the_demo_with_what_it_said(commands: Commands, screen: io.StringIO) -> None:
    with pytest.raises(DemoFailed, match="exit code 2"):
        commands.run("export", "--student", "cnn99")
    assert "no such student" in screen.getvalue()


def test_engines_that_differ_are_told_apart_from_those_that_agree(
    commands: Commands, screen: io.StringIO
) -> None:
    assert commands.verify(Path("demo/student"), 3) is False
    assert "onnxruntime agrees" in screen.getvalue() and "executorch DIFFERS" in screen.getvalue()


def test_table_has_the_gain_of_each_engine() -> None:
    students = [
        TrainedStudent("onnxruntime", "ce", 0.437, 45.9, 141_000_000),
        TrainedStudent("onnxruntime", "lkd", 0.497, 44.7, 151_000_000),
        TrainedStudent("executorch", "ce", 0.428, 81.6, 165_000_000),
        TrainedStudent("executorch", "lkd", 0.418, 82.6, 216_000_000),
    ]
    table = summary_table(students)
    rows = [line.split() for line in table.splitlines()]
    assert ["onnxruntime", "lkd", "49.7%", "44.7", "151"] in rows
    assert "onnxruntime: lkd − ce = +6.0 points" in table
    assert "executorch: lkd − ce = -1.0 points" in table


@pytest.mark.long
def test_the_whole_demo_on_one_engine(tmp_path: Path) -> None:
    words = ["--engines", "onnxruntime", "--output", str(tmp_path / "demo"), "--teacher-epochs", "1"]
    words += ["--student-epochs", "1", "--samples", "64", "--verify-steps", "2"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", *words],
        env=processes.worker_environment(2),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("onnxruntime") == 3 and "lkd − ce" in ran.stdout
    manifest = json.loads((tmp_path / "demo" / "student-lkd" / "manifest.json").read_text())
    assert manifest["parity"]["onnxruntime"]["ok"] is True
