"""What a result was measured on: machine, versions and commit, for every line that is kept."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from edgestill.runtime.machine import cores, memory_bytes, processor


def machine_record() -> dict[str, str | int | None]:
    """Processor, cores that this process may use, memory and operating system."""
    return {
        "cpu": processor(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "os": operating_system(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def operating_system() -> str:
    """The distribution's name and version."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def commit_record(folder: Path | None = None) -> dict[str, str | bool | None]:
    """Hash of the checked-out commit and whether tracked files differ from it; `None` outside a checkout."""
    folder = folder or Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"hash": commit or None, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        ran = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def now() -> str:
    """The time as kept in results: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def results_file_name(machine: dict[str, str | int | None], date: str) -> str:
    """`step-<machine>-<date>.jsonl` for a machine's record and an ISO date."""
    model = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", " ", str(machine["cpu"]))
    words = f"{model} {machine['architecture']} {machine['cores']}-core"
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"step-{slug}-{date[:10]}.jsonl"
