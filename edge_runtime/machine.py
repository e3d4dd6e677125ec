"""What this machine is, and what this process takes of it."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from edgestill.runtime.limits import cpu_limits, memory_limits

PROCESS_BYTES = 100 * 10**6
"""What Python, NumPy, an engine and some data take beside a training's state and plan: measured were 60 to 110 MB."""


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use at the same time: as many as it is bound to, and as its quotas let run."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(int(limit.amount) for limit in cpu_limits(root))]))


def threads_or_cores(threads: int) -> int:
    """`threads`, where 0 stands for as many as there are cores to use."""
    return threads or cores()


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may have, with all that shares its limits; None where the system does not say."""
    known = [physical] if (physical := physical_memory_bytes()) is not None else []
    return min([*known, *(int(limit.amount) for limit in memory_limits(root))], default=None)


def training_memory_bytes() -> int | None:
    """What is left of it for a training's state and plan; 0 where nothing is."""
    limit = memory_bytes()
    return None if limit is None else max(0, limit - PROCESS_BYTES)


def physical_memory_bytes() -> int | None:
    """Of the whole machine; None where the system does not say."""
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
