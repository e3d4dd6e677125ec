"""What `edgestill inspect` says of a plan, against what a process takes and what the exporter counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.runtime.commands.inspect import describe, examine
from edgestill.runtime.errors import BundleError
from edgestill.runtime.native.plan_work import read_plan

TRAIN = """
import sys, numpy
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines import native
from edgestill.runtime.engines.registry import open_engine
bundle, threads = Bundle.open(sys.argv[1]), int(sys.argv[2])
runner = native.open_runner(threads)  # library, threads and what Python keeps of a file that it has read
runner.run(lambda thread: None)
runner.close()
bundle.initial_state()
batch = {spec.name: numpy.ones(spec.shape, spec.numpy_dtype) for spec in bundle.inputs("train_step")}
if sys.argv[3] == "train":
    engine = open_engine(bundle, "native", threads)
    for _ in range(4):
        engine.train_step(batch)
# the peak of who trains; of who does not, what is left when the file is read
wanted = "VmHWM:" if sys.argv[3] == "train" else "VmRSS:"
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(wanted)))
"""


def memory_bytes(*words: str) -> float:
    def once() -> int:
        ran = subprocess.run([sys.executable, "-c", TRAIN, *words], capture_output=True, text=True, check=True)
        return 1024 * int(ran.stdout)

    return median(once() for _ in range(3))


@pytest.fixture(scope="module", params=["cnn3", "mobilenet-tiny"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / request.param
    words = ["--student", request.param, "--objective", "lkd", "--engines", "native", "--output", str(folder)]
    assert main(["export", *words]) == 0
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_takes_what_inspect_says(bundle: Path, threads: int) -> None:
    plan = examine(Bundle.open(bundle))["engines"]["native"]["train_step"]["plan"]
    said = plan["process_bytes"] + (threads - 1) * plan["scratch_bytes_per_thread"]
    took = memory_bytes(str(bundle), str(threads), "train") - memory_bytes(str(bundle), str(threads), "import")
    assert took == pytest.approx(said, rel=0.05)


def test_the_kernels_are_those_of_the_plan(bundle: Path) -> None:
    report = examine(Bundle.open(bundle))
    for graph in report["engines"]["native"].values():
        kernels = graph["plan"]["kernels"]
        assert {name: work["calls"] for name, work in kernels.items()} == graph["operators"]
        assert all((work["flops"] > 0) != (work["moved_bytes"] > 0) for work in kernels.values())
        assert graph["plan"]["arena_bytes"] == graph["planned_memory_bytes"]
    step = report["engines"]["native"]["train_step"]["plan"]["kernels"]
    assert sum(work["flops"] for work in step.values()) == pytest.approx(report["flops_per_step"], rel=0.02)
    assert "of the products" in describe(report)


def test_what_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "train_step.plan"
    for data in (b"", b"\0" * 100, b"ESPLAN1\0" + b"\xff" * 200):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="not a plan"):
            read_plan(path)
