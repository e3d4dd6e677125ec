"""libedgestill under AddressSanitizer and UBSan: real plans, and those that once broke it; `make fuzz` finds more."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from tests.support.native.fuzz import compile_fuzzer, find_clang, write_seeds
from tests.support.native.hostile import hostile_plans

pytestmark = [
    pytest.mark.contract,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_clang() is None, reason="no clang with libFuzzer: apt install clang-19 libclang-rt-19-dev"
    ),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the harness is built for x86-64"),
]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fuzzer(find_clang(), tmp_path_factory.mktemp("fuzz"))


def test_a_real_plan_stays_in_its_memory(fuzzer: Path, tmp_path: Path) -> None:
    assert write_seeds(tmp_path) > 150
    done = subprocess.run([fuzzer, "-runs=0", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    ended = done.stderr.rpartition("plans that ran to their end: ")[2]
    assert int(ended.partition(",")[0]) > 150, done.stderr[-1000:]


def test_a_plan_that_broke_it_once(fuzzer: Path, tmp_path: Path) -> None:
    for name, plan, _ in hostile_plans():
        file = tmp_path / name
        file.write_bytes(plan)
        done = subprocess.run([fuzzer, file], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-4000:]}"
