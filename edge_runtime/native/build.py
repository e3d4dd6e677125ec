"""Builds the native ExecuTorch runner with this machine's C++ compiler for the installed `executorch` wheel.

The wheel carries headers and shared libraries, so neither CMake nor torch is needed, and `executorch` is only
looked up, never imported: importing it would import torch. `python -m edgestill.runtime.native.build` builds the
library unless it is there, and prints its path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgestill.runtime.engines.registry import ENGINES
from edgestill.runtime.errors import EdgestillError, EngineError

EXECUTORCH_VERSION = "1.5.1"
INSTALL_HINT = ENGINES["executorch"].hint
COMPILER_HINT = "install a C++ compiler (Debian: apt install g++) or name one in the environment variable CXX"
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)
# The definitions are those of the wheel's CMake package: without them its headers do not match its libraries.
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED", "-DET_USE_THREADPOOL"),
)
COMPILE_TIMEOUT_S = 600
_SOURCE_FOLDER = Path(__file__).resolve().parent
_SOURCES = ("runner.cpp", "runner.h")
_NAME = "libedgestill_runner-{}.so"


@dataclass(frozen=True)
class Wheel:
    """An installed `executorch` package that carries a C++ runtime."""

    folder: Path
    version: str

    @property
    def lib_folder(self) -> Path:
        return self.folder / "lib"


def find_wheel() -> Wheel:
    """The installed `executorch` wheel. Errors: EngineError when there is none with headers and libraries."""
    spec = importlib.util.find_spec("executorch")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise EngineError("executorch is not installed", INSTALL_HINT)
    try:
        version = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    for place in places:
        folder = Path(place).resolve()
        if all((folder / "lib" / f"lib{name}.so").is_file() for name in LIBRARIES):
            return Wheel(folder, version)
    raise EngineError(f"executorch {version} in {places[0]} carries no C++ runtime libraries", INSTALL_HINT)


def name_of_library(wheel: Wheel) -> str:
    """The library's file name, which changes with everything that the build depends on."""
    digest = hashlib.sha256()
    parts = [(_SOURCE_FOLDER / name).read_bytes() for name in _SOURCES]
    parts += [text.encode() for text in (*FLAGS, wheel.version, str(wheel.folder), platform.machine())]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return _NAME.format(digest.hexdigest()[:16])


def folders() -> Iterator[Path]:
    """Where a built library may lie: beside its source, or the person's cache where that is read-only."""
    yield _SOURCE_FOLDER
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    yield Path(cache) / "edgestill"


def find_library(wheel: Wheel) -> Path | None:
    """The library built for this wheel and these sources, if there is one."""
    name = name_of_library(wheel)
    return next((folder / name for folder in folders() if (folder / name).is_file()), None)


def ensure_library() -> Path:
    """The library's path; builds it (seconds) if there is none yet.

    Errors: EngineError when executorch or a compiler is missing, or the compiler fails.
    """
    wheel = find_wheel()
    return find_library(wheel) or build_library(wheel)


def find_compiler() -> list[str]:
    """The compiler's command: $CXX, or the first of the usual names. Errors: EngineError if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX names {named[0]!r}, which is not there" if named else "no C++ compiler found"
    raise EngineError(f"{missing}, so the ExecuTorch runner cannot be built", COMPILER_HINT)


def build_library(wheel: Wheel) -> Path:
    """Compiles and puts the library in place atomically, so that processes may build at the same time; beside
    the sources it takes the place of libraries of older sources.

    Errors: EngineError with the compiler's first complaints.
    """
    compiler = find_compiler()
    folder = next((folder for folder in folders() if _writable(folder)), None)
    if folder is None:
        raise EngineError(
            f"none of {', '.join(map(str, folders()))} is writable, so the ExecuTorch runner cannot be built",
            "set XDG_CACHE_HOME to a folder that is",
        )
    target = folder / name_of_library(wheel)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as work:
        built = Path(work) / target.name
        command = [*compiler, *_arguments(wheel), "-o", str(built)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"the compiler {compiler[0]} did not run: {error}", COMPILER_HINT) from error
        if ran.returncode != 0:
            complaints = "\n".join(ran.stderr.strip().splitlines()[:12])
            command_name = shlex.join(compiler)
            raise EngineError(
                f"{command_name} cannot build the runner for executorch {wheel.version}:\n{complaints}",
                f"the runner is written for executorch {EXECUTORCH_VERSION} and C++17: {INSTALL_HINT}",
            )
        os.replace(built, target)
    if folder == _SOURCE_FOLDER:  # the cache may serve several environments, each with a library of its own
        for older in set(folder.glob(_NAME.format("*"))) - {target}:
            older.unlink(missing_ok=True)
    return target


def _arguments(wheel: Wheel) -> list[str]:
    include = wheel.folder / "include"
    headers = [include, include / "executorch/runtime/core/portable_type/c10"]
    return [
        *FLAGS,
        *(f"-isystem{folder}" for folder in headers),
        str(_SOURCE_FOLDER / "runner.cpp"),
        f"-L{wheel.lib_folder}",
        # Kernels and delegates register themselves when their library is loaded; the runner names no symbol
        # of theirs, so the linker would leave them out.
        "-Wl,--no-as-needed",
        *(f"-l{name}" for name in LIBRARIES),
        "-Wl,-z,defs",
        # Beside the runner first, so that runner and libraries can be copied to a device as one folder.
        f"-Wl,--enable-new-dtags,-rpath,$ORIGIN,-rpath,{wheel.lib_folder}",
    ]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def main() -> int:
    try:
        print(ensure_library())
    except EdgestillError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
