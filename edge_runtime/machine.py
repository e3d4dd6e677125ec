"""What this machine is, and what this process takes of it."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process and of those that it runs now; None where nobody counts it.

    From VmHWM: `getrusage` would carry over the peak of the process that started this one.
    """
    known = [peak for pid in process_tree(os.getpid()) if (peak := peak_rss_of(pid)) is not None]
    return sum(known) if known else None


def peak_rss_of(pid: int) -> int | None:
    """Peak resident memory of one process; None if it ended or where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def process_tree(pid: int) -> list[int]:
    """A process and its descendants, itself first; just itself where there is no /proc."""
    found = [pid]
    for parent in found:
        # a process or a thread of it may end meanwhile
        with suppress(OSError):
            for task in list(Path(f"/proc/{parent}/task").iterdir()):
                with suppress(OSError):
                    found += [int(child) for child in (task / "children").read_text().split()]
    return found


def processor() -> str:
    """The processor's name as the kernel gives it, or its architecture where it gives none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for key in ("model name", "Model", "Hardware"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return found.group(1).strip()
    return platform.processor() or platform.machine()
