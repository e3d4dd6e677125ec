"""Limits of control groups and processes: on made-up systems of both versions, and on this one where it lets us."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgestill.runtime import machine
from edgestill.runtime.commands import doctor
from edgestill.runtime.device.conditions import Conditions, read_status, unmet
from edgestill.runtime.limits import cpu_limits, groups, memory_limits

MB = 10**6
V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def system(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n" if not str(content).endswith("\n") else str(content))
    return root


def v1(controller: str, mount_root: str = "/") -> str:
    return f"35 31 0:32 {mount_root} /sys/fs/cgroup/{controller} rw - cgroup cgroup rw,{controller}\n"


def amounts(root: Path) -> tuple[list[float], list[float]]:
    return [limit.amount for limit in memory_limits(root)], [limit.amount for limit in cpu_limits(root)]


def test_version_2_in_a_container_of_its_own(tmp_path: Path) -> None:
    """With a namespace the group is seen as the root of what is mounted."""
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, "sys/fs/cgroup/memory.max": 200 * MB,
        "sys/fs/cgroup/memory.high": "max", "sys/fs/cgroup/cpu.max": "150000 100000",
        "sys/fs/cgroup/memory.current": 150 * MB, "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {60 * MB}\n",
    })  # fmt: skip
    assert amounts(root) == ([200 * MB], [1.5])
    assert machine.memory_bytes(root) == 200 * MB and machine.cores(root) == 1
    assert memory_limits(root)[0].by == "memory.max of /sys/fs/cgroup"
    assert memory_limits(root)[0].used == 90 * MB


def test_version_2_counts_every_group_above(tmp_path: Path) -> None:
    cgroup = "sys/fs/cgroup/user.slice/work.service/inner"
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/user.slice/work.service/inner", "proc/self/mountinfo": V2,
        f"{cgroup}/memory.max": "max", f"{cgroup}/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/work.service/memory.max": 700 * MB,
        "sys/fs/cgroup/user.slice/work.service/memory.high": 600 * MB,
        "sys/fs/cgroup/user.slice/memory.max": 500 * MB, "sys/fs/cgroup/user.slice/cpu.max": "50000 100000",
        "sys/fs/cgroup/other/memory.max": 1,
    })  # fmt: skip
    assert amounts(root) == ([700 * MB, 600 * MB, 500 * MB], [0.5])
    assert machine.memory_bytes(root) == 500 * MB and machine.cores(root) == 1
    assert [folder.name for folder in groups("cpu", root)] == [
        "inner",
        "work.service",
        "user.slice",
        "cgroup",
    ]


@pytest.mark.parametrize("mount_root", ["/", "/docker/abc"])
def test_version_1_seen_from_within_and_from_without(tmp_path: Path, mount_root: str) -> None:
    """Docker without namespaces: the path is the host's, and only the container's part is mounted."""
    inner = "docker/abc/" if mount_root == "/" else ""
    memory, cpu = f"sys/fs/cgroup/memory/{inner}", f"sys/fs/cgroup/cpu/{inner}"
    root = system(tmp_path, {
        "proc/self/cgroup": "5:cpuacct,cpu:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n",
        "proc/self/mountinfo": v1("memory", mount_root) + v1("cpu", mount_root),
        f"{memory}memory.limit_in_bytes": 300 * MB, f"{memory}memory.usage_in_bytes": 120 * MB,
        f"{memory}memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MB}\n",
        f"{cpu}cpu.cfs_quota_us": 400000, f"{cpu}cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert amounts(root) == ([300 * MB], [4.0])
    assert memory_limits(root)[0].used == 100 * MB


def test_where_there_is_no_limit(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "4:memory:/a\n1:cpu:/a\n0::/", "proc/self/mountinfo": v1("memory") + v1("cpu") + V2,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        "proc/self/limits": "Max data size             unlimited            unlimited            bytes\n",
    })  # fmt: skip
    assert amounts(root) == ([], [])
    assert machine.memory_bytes(root) == machine.physical_memory_bytes()
    assert amounts(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("content", ["", "rubbish", "max", "0 0", "100000", "-5 100000", "1e9", "²"])
def test_files_that_say_something_else_limit_nothing(tmp_path: Path, content: str) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/../../up\nrubbish\n::", "proc/self/mountinfo": "rubbish\n" + V2,
        "sys/fs/cgroup/cpu.max": content,
    })  # fmt: skip
    (root / "sys/fs/cgroup/memory.max").write_text(content.replace("100000", "max"))
    assert amounts(root) == ([], [])


def test_names_with_spaces(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/a b", "sys/fs/my groups/a b/memory.max": 7 * MB,
        "proc/self/mountinfo": V2.replace("/sys/fs/cgroup", "/sys/fs/my\\040groups"),
    })  # fmt: skip
    assert amounts(root)[0] == [7 * MB]


def test_limits_of_the_process_count_what_lies_in_memory(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units\n"
        f"Max data size             {300 * MB}            unlimited            bytes\n"
        f"Max address space         {400 * MB}            unlimited            bytes\n",
        "proc/self/status": "VmSize:\t  200000 kB\nVmData:\t   90000 kB\nVmRSS:\t   50000 kB\n",
    })  # fmt: skip
    found = {limit.by.split(",")[0]: limit for limit in memory_limits(root)}
    assert found["RLIMIT_AS"].amount == 400 * MB - 150_000 * 1024 and found["RLIMIT_AS"].used == 50_000 * 1024
    assert found["RLIMIT_DATA"].amount == 300 * MB - 40_000 * 1024


def test_a_device_waits_for_memory_that_its_container_lacks(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/meminfo": "MemAvailable:   20000000 kB", "proc/self/cgroup": "0::/", "proc/self/mountinfo": V2,
        "sys/fs/cgroup/memory.max": 200 * 2**20, "sys/fs/cgroup/memory.current": 150 * 2**20,
    })  # fmt: skip
    status = read_status(root, lambda command: None)
    assert status["memory_free_bytes"] == 50 * 2**20
    assert unmet(Conditions(), status) == ["50 MiB of memory are free, below 256 MiB"]


def python(code: str, **how: object) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_real_limit_of_the_process() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    said = python("from edgestill.runtime.machine import *; print(memory_bytes(), training_memory_bytes())",
                  preexec_fn=limit)  # fmt: skip
    whole, for_training = map(int, said.split())
    assert 2**29 < whole < 2**30
    # the process may have grown between the two
    assert abs(whole - machine.PROCESS_BYTES - for_training) < MB


def test_a_real_affinity() -> None:
    first = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{first}}}); from edgestill.runtime.engines import native, onnxruntime"
    assert python(f"{code}; print(native.open_runner(0).threads, onnxruntime.own_choice())") in (
        "1 1\n",
        "1 0\n",
    )


@pytest.fixture
def group() -> Iterator[tuple[Path, Path]]:
    """New groups of memory and of processor time, within this process' own."""
    made = []
    for controller, file in (("memory", "memory.max"), ("cpu", "cpu.max")):
        own = next(groups(controller), None)
        if own is None:
            pytest.skip(f"no control group of {controller} here")
        folder = own / f"edgestill-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError as error:
            pytest.skip(f"{own}: {error.strerror}: making control groups needs root")
        made.append(folder)
        if not ((folder / file).exists() or (folder / "cgroup.clone_children").exists()):
            folder.rmdir()
            pytest.skip(f"{own} does not hand {controller} down")
    yield made[0], made[1]
    for folder in made:
        folder.rmdir()


def test_a_real_container_of_200_mb_and_one_core(group: tuple[Path, Path]) -> None:
    memory, cpu = group
    if (memory / "memory.max").exists():
        (memory / "memory.max").write_text(str(200 * 2**20))
        (cpu / "cpu.max").write_text("100000 100000")
    else:
        (memory / "memory.limit_in_bytes").write_text(str(200 * 2**20))
        (cpu / "cpu.cfs_period_us").write_text("100000")
        (cpu / "cpu.cfs_quota_us").write_text("100000")

    def enter() -> None:
        for folder in {memory, cpu}:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    code = """
import argparse, json
from edgestill.runtime.commands import doctor
from edgestill.runtime.device.enrolment import device_info
from edgestill.runtime.engines import native
print(json.dumps(doctor.examine()))
told = device_info(argparse.Namespace(memory=None, engine=None, name="x"))["memory_bytes"]
print(told, native.open_runner(0).threads)
"""
    report, told = python(code, preexec_fn=enter).splitlines()
    found = json.loads(report)
    assert (found["memory_bytes"], found["cores"]) == (200 * 2**20, 1)
    assert found["machine_memory_bytes"] > 200 * 2**20 and found["machine_cores"] == os.cpu_count()
    assert told == f"{200 * 2**20 - machine.PROCESS_BYTES} 1"
    text = doctor.describe(found)
    assert "0.2 of " in text and "210 MB of memory by" in text and "1 cores by" in text


def test_a_small_container_need_not_have_free_what_a_large_one_should(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgestill.runtime.commands import join

    def least(given: float | None, whole: int | None) -> int:
        monkeypatch.setattr(join, "memory_bytes", lambda: whole)
        names = argparse.Namespace(
            ignore_conditions=False, min_memory=given, min_battery=0.3, max_temperature=80.0, allow_metered=False
        )
        return join.conditions_from(names).minimum_memory_bytes

    assert least(None, 200 * MB) == 25 * MB
    assert least(None, 32 * 2**30) == least(None, None) == 256 * 2**20
    assert least(300, 200 * MB) == 300 * MB
