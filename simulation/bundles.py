"""Bundles for a simulation or a benchmark, by `edgestill export` in its own process when needed, kept by digest."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from edgestill.runtime.errors import EdgestillError, UsageError

EXPORT_TIMEOUT_S = 900
PACKAGES = ("edgestill", "torch", "onnxruntime", "executorch", "onnx", "numpy")
_RUN_CLI = "import sys; from edgestill.runtime.cli import main; sys.exit(main(sys.argv[1:]))"


class ExportFailed(EdgestillError):
    """The exporter refused or broke; the message carries what it said."""


@dataclass(frozen=True)
class BundleRequest:
    """What to export; `options` are further words for `edgestill export`."""

    student: str
    batch: int
    latent_size: int = 128
    objective: str = "lkd"
    optimizer: str = "sgd"
    options: tuple[str, ...] = ()

    def words(self, engines: Sequence[str], output: Path) -> list[str]:
        """The command line that makes the bundle."""
        return [
            "export",
            "--student",
            self.student,
            "--batch",
            str(self.batch),
            "--latent-size",
            str(self.latent_size),
            "--objective",
            self.objective,
            "--optimizer",
            self.optimizer,
            *self.options,
            "--engines",
            ",".join(engines),
            "--output",
            str(output),
        ]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter here, by name, without importing any."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return versions


def code_digest(folders: Sequence[Path] | None = None) -> str:
    """SHA-256 of what decides an export besides its request: the code of both packages and the versions."""
    if folders is None:
        folders = [Path(files(package)) for package in ("edgestill.export", "edgestill.runtime")]
    digest = hashlib.sha256(json.dumps(installed_versions(), sort_keys=True).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _factory_digest(student: str) -> str | None:
    """SHA-256 of the file in which a student of one's own is written; None for a built-in one, or a file not found."""
    module, _, _ = student.rpartition(":")
    if not module:
        return None
    try:
        path = module if module.endswith(".py") else importlib.util.find_spec(module).origin  # type: ignore[union-attr]
        return hashlib.sha256(Path(str(path)).read_bytes()).hexdigest()
    except (ImportError, AttributeError, OSError):
        return None  # the exporter says what is wrong


def prepare_bundle(
    request: BundleRequest, engines: Sequence[str], cache: Path, progress: Callable[[str], None]
) -> tuple[Path, dict[str, ExportFailed]]:
    """A bundle with graphs for as many of the engines as can be exported, and the reasons for the others.

    Errors: UsageError when the exporter refuses the request, ExportFailed when it can serve no engine.
    """
    try:
        return _cached_export(request, engines, cache, progress), {}
    except ExportFailed as error:
        if len(engines) == 1:
            raise
        progress(f"{error.message}; trying one engine at a time")
    failed: dict[str, ExportFailed] = {}
    for engine in engines:
        try:
            _cached_export(request, [engine], cache, progress)
        except ExportFailed as error:
            failed[engine] = error
    working = [engine for engine in engines if engine not in failed]
    if not working:
        raise next(iter(failed.values()))
    return _cached_export(request, working, cache, progress), failed


def _cached_export(
    request: BundleRequest, engines: Sequence[str], cache: Path, progress: Callable[[str], None]
) -> Path:
    decides = [asdict(request), sorted(engines), code_digest(), _factory_digest(request.student)]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    named = re.sub(r"[^\w.-]+", "-", request.student)  # a student may be a file in another folder
    folder = cache / f"{named}-batch{request.batch}-{key}"
    if (folder / "manifest.json").is_file():
        return folder
    progress(f"exporting {request.student}, batch {request.batch}, for {', '.join(engines)}")
    part = cache / f"{folder.name}.{os.getpid()}.part"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        run_export(request.words(engines, part))
        part.rename(folder)  # a cache never holds half a bundle
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def run_export(words: Sequence[str]) -> None:
    """Runs `edgestill` with these words. Errors: UsageError on exit code 2, ExportFailed on others but 0."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _RUN_CLI, *words],
            capture_output=True,
            text=True,
            timeout=EXPORT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportFailed(f"edgestill export: not finished after {EXPORT_TIMEOUT_S} s") from error
    if ran.returncode:
        message, hint = read_complaint(ran.stderr)
        kind = UsageError if ran.returncode == 2 else ExportFailed
        raise kind(f"export: {message or f'exit code {ran.returncode}'}", hint)


def read_complaint(stderr: str) -> tuple[str, str | None]:
    """Message and hint out of what a command of ours printed; its last lines if it broke in another way."""
    message, hint = "\n".join(stderr.strip().splitlines()[-6:]), None
    for line in stderr.splitlines():
        if ": error: " in line:
            message = line.split(": error: ", 1)[1]
        elif line.startswith("hint: "):
            hint = line.removeprefix("hint: ")
    return message, hint
