"""What this process may take of its machine: the limits of its control groups, of every group above them, and its own.

Sources: kernel.org, "Control Group v2" and "Memory Resource Controller" (v1); cgroups(7); proc(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_NO_LIMIT_BYTES = 2**60
"""Version 1 says so much where there is no limit."""


@dataclass(frozen=True)
class Limit:
    """Of bytes, or of cores' time; `by` says who sets it."""

    amount: float
    by: str
    used: float = 0.0
    """Of bytes: what cannot be had again without a loss; the kernel drops files that it has cached."""


def memory_limits(root: Path = _ROOT) -> list[Limit]:
    """Every limit of memory in bytes, from the process up. `root`: another file system, for tests."""
    found = [*_process_limits(root)]
    for group in groups("memory", root):
        name = _name(group, root)
        inactive = _stat(group / "memory.stat")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        for file in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _number(group / file)
            if limit is not None and limit < _NO_LIMIT_BYTES:
                found.append(Limit(limit, f"{file} of {name}", max(0, used - inactive)))
    return found


def cpu_limits(root: Path = _ROOT) -> list[Limit]:
    """Every quota of processor time, in cores."""
    found = []
    for group in groups("cpu", root):
        file = "cpu.max" if (group / "cpu.max").exists() else "cpu.cfs_quota_us"
        fields = (_read(group / file) or "").split() + ["", ""]
        quota, period = fields[0], fields[1] or _read(group / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            found.append(Limit(int(quota) / int(period), f"{file} of {_name(group, root)}"))
    return found


def groups(controller: str, root: Path = _ROOT) -> Iterator[Path]:
    """The folders of this process' groups of a controller, of either version, each from its own up to the mount."""
    own = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        for name in names.split(","):  # one empty name: version 2
            own[name.removeprefix("name=")] = path
    for mount_root, mount, names in _mounts(root):
        name = "" if names is None else controller
        if name not in own or (names is not None and controller not in names):
            continue
        # a container may see its group from within, as /, or from without, below what is mounted
        inside = mount_root.rstrip("/")
        path = own[name]
        below = path[len(inside) :].strip("/") if path == inside or path.startswith(f"{inside}/") else ""
        parts = [part for part in below.split("/") if part]
        if ".." in parts:
            parts = []
        top = root / mount.lstrip("/")
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder


def _mounts(root: Path) -> Iterator[tuple[str, str, list[str] | None]]:
    """Of every mounted hierarchy: which group is mounted, where, and its controllers; None for version 2."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if len(fields) < 5 or len(more) < 3 or more[0] not in ("cgroup", "cgroup2"):
            continue
        where, mounted = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text) for text in fields[3:5])
        yield where, mounted, more[2].split(",") if more[0] == "cgroup" else None


def _process_limits(root: Path) -> Iterator[Limit]:
    """Of address space and data, less what is mapped and never touched: as if they counted what lies in memory."""
    status = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/self/status") or "", re.MULTILINE))
    text = _read(root / "proc/self/limits") or ""
    for title, field, name in (
        ("Max address space", "VmSize", "RLIMIT_AS, ulimit -v"),
        ("Max data size", "VmData", "RLIMIT_DATA, ulimit -d"),
    ):
        found = re.search(rf"^{title}\s+(\d+)\s", text, re.MULTILINE)
        if found is not None and int(found[1]) < _NO_LIMIT_BYTES:
            mapped, resident = (1024 * int(status.get(name, 0)) for name in (field, "VmRSS"))
            unused = max(0, mapped - resident)
            yield Limit(max(0, int(found[1]) - unused), name, min(mapped, resident))


def _stat(path: Path) -> int:
    """Bytes of files that the kernel would drop; with the groups below in version 1, too."""
    text = _read(path) or ""
    found = re.search(r"^total_inactive_file (\d+)", text, re.MULTILINE) or re.search(
        r"^inactive_file (\d+)", text, re.MULTILINE
    )
    return 0 if found is None else int(found[1])


def _name(group: Path, root: Path) -> str:
    return "/" + str(group.relative_to(root))


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdecimal() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
