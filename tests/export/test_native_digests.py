"""The same bits on 64-bit ARM, under qemu. All students and 200 steps: `make digests`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from edgestill.benchmarks import results_page
from edgestill.export.students import ARCHITECTURES
from tests.support.native.digests import SMALL, Other, Run, compile_other, export_small, find_qemu, here

RESULTS = Path(results_page.__file__).with_name("results")
emulated = pytest.mark.skipif(find_qemu() is None, reason="no qemu-aarch64: apt install qemu-user")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Other:
    return compile_other("aarch64", tmp_path_factory.mktemp("arm"), [find_qemu()])


@emulated
@pytest.mark.contract
@pytest.mark.timeout(900)
@pytest.mark.parametrize("student", ["cnn3", "gru"])
def test_two_steps_on_arm(student: str, arm: Other, tmp_path: Path) -> None:
    run = Run(export_small(student, tmp_path), steps=2, seed=0)
    expected = here(run, 1)
    assert expected != here(Run(run.bundle, steps=1, seed=0), 1)
    assert [arm.digest(run, threads) for threads in (1, 3)] == [expected] * 2


def test_every_built_in_student_has_a_small_version() -> None:
    assert set(SMALL) == set(ARCHITECTURES)


def test_the_kept_digests_agree() -> None:
    for file in RESULTS.glob("digests-*.jsonl"):
        lines = [line for line in map(json.loads, file.read_text().splitlines()) if "student" in line]
        found = defaultdict(set)
        for line in lines:
            found[line["student"], line["steps"]].add(line["digest"])
        assert all(len(digests) == 1 for digests in found.values()), file
        on_arm = {
            line["student"] for line in lines if line["architecture"] == "aarch64" and line["steps"] == 200
        }
        assert on_arm == set(SMALL)
