"""Compiles libedgestill with the PyPI package `ziglang`, for this machine and for others.

`python -m edgestill.runtime.native.compile x86_64 aarch64` writes `libedgestill-ARCHITECTURE.so` beside the sources.
The library needs no other one, not even libc, so one file serves every Linux of an architecture. A wheel has both.
Nothing is imported here that a build of the wheel lacks.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgestill.runtime.errors import EdgestillError, EngineError
from edgestill.runtime.machine import cores
from edgestill.runtime.native.architecture import HINT, LEVELS, library_path, machine

SOURCES = Path(__file__).resolve().parent / "library"
FLAGS = (
    # Nothing is contracted or reordered: the same bits everywhere.
    *("-O3", "-ffp-contract=off", "-std=gnu2x", "-fPIC", "-ffreestanding", "-fno-builtin", "-fno-stack-protector"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-Werror"),
)
BASELINE = {"x86_64": "x86_64", "aarch64": "generic"}


def compile_library(
    architecture: str | None = None, output: Path | None = None, more: Sequence[str] = ()
) -> Path:
    """Compiles, with `more` flags, and puts the library in place atomically.

    Errors: EngineError without a compiler, or where it fails.
    """
    architecture = architecture or machine()
    if architecture not in LEVELS:
        raise EngineError(f"libedgestill is not made for {architecture}", f"it is for {', '.join(LEVELS)}")
    target = output or library_path(architecture)
    compiler = [*_compiler(), "-target", f"{architecture}-linux-musl"]
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as work:
        jobs = [("kernels", cpu, level) for level, cpu in LEVELS[architecture].items()]
        jobs += [(name, BASELINE[architecture], "") for name in ("check", "library")]
        objects = [Path(work, f"{name}{level}.o") for name, _, level in jobs]

        def one(job: tuple[tuple[str, str, str], Path]) -> None:
            (name, cpu, level), to = job
            define = [f"-DRUN_PLAN=run_{level}"] if level else []
            _run([*compiler, f"-mcpu={cpu}", *FLAGS, *more, *define, "-c", str(SOURCES / f"{name}.c"), "-o", str(to)])

        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(one, zip(jobs, objects, strict=True)))
        built = Path(work, target.name)
        link = ("-shared", "-nostdlib", "-Wl,-z,max-page-size=16384", "-s")
        _run([*compiler, *link, *map(str, objects), "-o", str(built)])
        os.replace(built, target)
    return target


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("EDGESTILL_CC", ""))
    if named:
        return named
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    if found := shutil.which("zig"):
        return [found, "cc"]
    raise EngineError("libedgestill is not compiled, and there is no compiler for it", HINT)


def _run(command: list[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{command[0]} did not run: {error}", HINT) from error
    if ran.returncode:
        complaints = "\n".join(ran.stderr.strip().splitlines()[:12])
        raise EngineError(f"libedgestill does not compile:\n{complaints}", HINT)


def main() -> int:
    try:
        for architecture in sys.argv[1:] or [machine()]:
            print(compile_library(architecture))
    except EdgestillError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
