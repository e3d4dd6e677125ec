"""How the demo runs `edgestill` commands: printed as one would type them, one after another or side by side."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from edgestill.runtime.errors import EdgestillError
from edgestill.runtime.machine import cores

END_TIMEOUT_S = 15.0
DOCTOR = "`edgestill doctor` says what works on this machine"


class DemoFailed(EdgestillError):
    """A command failed; it has already said why."""


class Commands:
    """Runs `edgestill` commands, each printed before it runs; `screen` gets what is for people."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._live = screen.isatty()
        self._program = edgestill_program()

    def say(self, text: str) -> None:
        print(text, file=self._screen, flush=True)

    def say_once(self, text: str) -> None:
        """A line of its own, also where a progress line stands."""
        self._clear()
        self.say(text)

    def heading(self, text: str) -> None:
        self.say(f"\n{text}")

    def typed(self, *words: object) -> str:
        """The command as one would type it here."""
        return shlex.join([*self._program, *map(str, words)])

    def run(
        self, *words: object, on_line: Callable[[str], None] | None = None, may_fail: bool = False
    ) -> str:
        """Standard output of one command; its standard error is shown if it fails. Errors: DemoFailed."""
        texts = [str(word) for word in words]
        self.say("$ " + self.typed(*words))
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
            raise DemoFailed(f"`edgestill {texts[0]}` ended with exit code {code}", DOCTOR)
        self.say(f"  {time.monotonic() - started_s:.1f} s")
        return "".join(lines)

    def run_beside(self, commands: Sequence[Sequence[object]]) -> None:
        """Runs commands at the same time, one a core at most. Errors: DemoFailed when one fails."""
        waiting, running = [[str(word) for word in words] for words in commands], []
        started_s = time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < cores():
                    running.append(self.start(*waiting.pop(0)))
                for process in [one for one in running if one.poll() is not None]:
                    running.remove(process)
                    process.check()
                time.sleep(0.05)
        finally:
            for process in running:
                process.stop()
        self.say(f"  {time.monotonic() - started_s:.1f} s")

    def start(self, *words: object, on_line: Callable[[str], None] | None = None) -> Background:
        """Starts a command that runs beside the others; `on_line` gets its lines of stdout, in a thread."""
        texts = [str(word) for word in words]
        self.say("$ " + self.typed(*words) + " &")
        return Background([*self._program, *texts], texts[0], self, on_line)

    def progress(self, text: str) -> None:
        """One line that the next one takes the place of, on a terminal; nothing elsewhere."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=self._screen, flush=True)

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=self._screen, flush=True)


class Background:
    """A command that runs beside the demo; what it says on stderr is kept for when it fails."""

    def __init__(
        self, command: Sequence[str], name: str, show: Commands, on_line: Callable[[str], None] | None
    ) -> None:
        self._name, self._show = name, show
        self._complaints: list[str] = []
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        out, err = self._process.stdout, self._process.stderr
        assert out is not None and err is not None

        def pass_on() -> None:
            for line in out:
                if on_line is not None:
                    on_line(line)

        # both are read, or a command that says much would wait for us
        self._readers = [
            threading.Thread(target=pass_on, daemon=True),
            threading.Thread(target=lambda: self._complaints.extend(err), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """Waits for an ended command's last lines. Errors: DemoFailed when it has failed."""
        for reader in self._readers:
            reader.join(END_TIMEOUT_S)
        if self._process.returncode:
            self._show.say("".join(self._complaints[-12:]).rstrip())
            raise DemoFailed(
                f"`edgestill {self._name}` ended with exit code {self._process.returncode}", DOCTOR
            )

    def stop(self) -> None:
        """Asks it to end, and ends it when it does not."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for reader in self._readers:
            reader.join(END_TIMEOUT_S)


def edgestill_program() -> list[str]:
    """The installed command as one would type it here, or the module where it is not installed."""
    script = Path(sys.executable).parent / "edgestill"
    if not script.exists():
        return [sys.executable, "-m", "edgestill.runtime.cli"]
    return [os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]
