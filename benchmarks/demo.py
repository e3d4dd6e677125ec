"""`make demo`: a teacher, a student, a proof, and the student trained with and without the teacher.

Every step is an `edgestill` command, printed as one would type it; figures are read from what commands print.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.report import align

DATA = "cifar10-mini"
PLAIN_PROGRESS_EVERY_S = 10.0
LIVE_PROGRESS_EVERY_S = 0.2


@dataclass(frozen=True)
class DemoSettings:
    """Sizes that show the idea in under three minutes on two cores.

    The student sees few samples, as a device does; the teacher saw the whole training split. Both students
    make the same number of steps from the same weights on the same samples.
    """

    output: Path = Path("demo")
    engines: tuple[str, ...] = ("onnxruntime", "executorch")
    teacher_epochs: int = 8
    student_epochs: int = 15
    samples: int = 400
    verify_steps: int = 20
    seed: int = 0


@dataclass(frozen=True)
class TrainedStudent:
    """One student's summary as `edgestill train` printed it."""

    engine: str
    objective: str
    accuracy: float
    step_ms: float
    peak_rss_bytes: int


class DemoFailed(Exception):
    """A command failed; it has already said why."""


def run_demo(settings: DemoSettings, screen: TextIO) -> bool:
    """Runs all commands and prints the table; False when an engine differs from eager PyTorch.

    Errors: DemoFailed.
    """
    started_s = time.monotonic()
    show = Commands(screen)
    folder, engines = settings.output, ",".join(settings.engines)
    folder.mkdir(parents=True, exist_ok=True)
    teacher, teacher_state = folder / "teacher", folder / "teacher.safetensors"

    show.heading("1. A teacher: export its training step for one engine, then train it, without PyTorch")
    words: list[object] = ["--student", "cnn4", "--objective", "ce", "--optimizer", "adamw"]
    show.run("export", *words, "--engines", settings.engines[0], "--output", teacher, "--overwrite")
    words = ["--augment", "flip,crop", "--schedule", "cosine", "--lr", 0.002, "--seed", settings.seed]
    words += ["--engine", settings.engines[0], "--state", teacher_state]
    summary = show.train(teacher, settings.teacher_epochs, *words)
    show.say(f"the teacher's accuracy on the test split: {summary['accuracy']:.1%}")

    show.heading("2. A student, once without and once with latent distillation")
    for objective in ("ce", "lkd"):
        words = ["--student", "cnn3", "--objective", objective, "--engines", engines]
        show.run("export", *words, "--output", folder / f"student-{objective}", "--overwrite")

    show.heading("3. Do the engines compute what PyTorch computes?")
    verified = show.verify(folder / "student-lkd", settings.verify_steps)

    show.heading(f"4. The student on {settings.samples} samples, alone and with the teacher's latents")
    trained = []
    for engine in settings.engines:
        for objective in ("ce", "lkd"):
            words = ["--limit", settings.samples, "--schedule", "cosine", "--engine", engine]
            if objective == "lkd":
                words += ["--teacher", f"{teacher}:{teacher_state}", "--alpha", 0.9]
            state = folder / f"student-{objective}-{engine}.safetensors"
            words += ["--seed", settings.seed, "--state", state]
            summary = show.train(folder / f"student-{objective}", settings.student_epochs, *words)
            figures = (summary[key] for key in ("accuracy", "ms_per_step_median", "peak_rss_bytes"))
            trained.append(TrainedStudent(engine, objective, *figures))
    show.heading(f"Done in {time.monotonic() - started_s:.0f} s; everything is in {folder}/")
    print(summary_table(trained))
    return verified


def summary_table(trained: Sequence[TrainedStudent]) -> str:
    """Accuracy on the test split, time and memory of every student, and the gain on each engine."""
    rows = [("engine", "objective", "accuracy", "ms a step", "peak MB")]
    rows += [
        (s.engine, s.objective, f"{s.accuracy:.1%}", f"{s.step_ms:.1f}", f"{s.peak_rss_bytes / 1e6:.0f}")
        for s in trained
    ]
    gains = []
    for engine in dict.fromkeys(student.engine for student in trained):
        accuracy = {s.objective: s.accuracy for s in trained if s.engine == engine}
        gains.append(f"{engine}: lkd − ce = {100 * (accuracy['lkd'] - accuracy['ce']):+.1f} points")
    return "\n".join([align(rows, texts=2), "", *gains])


class Commands:
    """Runs `edgestill` commands, each printed before it runs; `screen` gets what is for people."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._live = screen.isatty()
        self._program = edgestill_program()

    def say(self, text: str) -> None:
        print(text, file=self._screen, flush=True)

    def heading(self, text: str) -> None:
        self.say(f"\n{text}")

    def run(
        self, *words: object, on_line: Callable[[str], None] | None = None, may_fail: bool = False
    ) -> str:
        """Standard output of one command; its standard error is shown if it fails. Errors: DemoFailed."""
        texts = [str(word) for word in words]
        self.say("$ " + shlex.join([*self._program, *texts]))
        started_s = time.monotonic()
        process = subprocess.Popen([*self._program, *texts], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   stdin=subprocess.DEVNULL, text=True)  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        complaints: list[str] = []
        # read beside stdout, or a command that says much on stderr would wait forever
        reader = threading.Thread(target=lambda: complaints.extend(process.stderr or ()))
        reader.start()
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if on_line is not None:
                    on_line(line)
            code = process.wait()
        except BaseException:
            process.terminate()  # a training run keeps its checkpoint
            process.wait()
            raise
        finally:
            reader.join()
            process.stdout.close()
            process.stderr.close()
        self._clear()
        if code and not may_fail:
            self.say("".join(complaints[-12:]).rstrip())
            raise DemoFailed(f"`edgestill {texts[0]}` ended with exit code {code}")
        self.say(f"  {time.monotonic() - started_s:.1f} s")
        return "".join(lines)

    def train(self, bundle: Path, epochs: int, *words: object) -> dict[str, Any]:
        """Trains with live progress; gives the run's summary."""
        last_shown_s = time.monotonic()

        def show_progress(line: str) -> None:
            nonlocal last_shown_s
            record = json.loads(line)
            every_s = LIVE_PROGRESS_EVERY_S if self._live else PLAIN_PROGRESS_EVERY_S
            if "step" in record and time.monotonic() - last_shown_s >= every_s:
                last_shown_s = time.monotonic()
                self._progress(f"  epoch {record['epoch']} of {epochs}, step {record['step']}, "
                               f"loss {record['loss']:.3f}")  # fmt: skip

        printed = self.run("train", bundle, "--data", DATA, "--epochs", epochs, *words, "--restart", "--json",
                           on_line=show_progress)  # fmt: skip
        summary: dict[str, Any] = json.loads(printed.splitlines()[-1])["summary"]
        return summary

    def verify(self, bundle: Path, steps: int) -> bool:
        """Whether every engine agrees with eager PyTorch; says by how much they differ."""
        printed = self.run("verify", bundle, "--steps", steps, "--json", may_fail=True)
        try:
            report = json.loads(printed)["engines"]
        except ValueError as error:
            raise DemoFailed("`edgestill verify` could not compare the engines") from error
        for engine, entry in report.items():
            verdict = "agrees" if entry["ok"] else "DIFFERS"
            self.say(
                f"  {engine} {verdict} in {entry['steps']} steps: loss within {entry['loss_max_abs']:.1e}, "
                f"every tensor within {entry['state_max_rel']:.1e} of its largest entry"
            )
        return all(entry["ok"] for entry in report.values())

    def _progress(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=self._screen, flush=True)
        else:
            self.say(text)

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=self._screen, flush=True)


def edgestill_program() -> list[str]:
    """The installed command as one would type it here, or the module where it is not installed."""
    script = Path(sys.executable).parent / "edgestill"
    if not script.exists():
        return [sys.executable, "-m", "edge_runtime.cli"]
    return [os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the demo: 0 when every command worked and the engines agree with PyTorch."""
    default = DemoSettings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=default.output, help="default: %(default)s")
    parser.add_argument("--engines", default=",".join(default.engines), help="default: %(default)s")
    for name in ("teacher_epochs", "student_epochs", "samples", "verify_steps", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name),
                            help="default: %(default)s")  # fmt: skip
    given = vars(parser.parse_args(arguments))
    settings = DemoSettings(**{**given, "engines": tuple(given["engines"].split(","))})
    try:
        return 0 if run_demo(settings, sys.stderr) else 1
    except DemoFailed as error:
        print(f"demo: error: {error}", file=sys.stderr)
        print("hint: `edgestill doctor` says what works on this machine", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
