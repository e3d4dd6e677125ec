"""libedgestill under libFuzzer: `python -m tests.support.native.fuzz --minutes 60` (docs/native.md).

The seeds are the plans of small graphs, made anew, so that they are never of an older layout.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph, Value
from edgestill.export.targets import native
from edgestill.runtime.native.compile import SOURCES
from tests.support.operator_cases import CASES, FLAT_CASES, with_gradients

HARNESS = Path(__file__).with_name("fuzz.c")
MOST_SEED_BYTES = 1 << 13
FLAGS = ("-g", "-O1", "-std=gnu2x", "-ffp-contract=off", "-fno-omit-frame-pointer", "-Wno-psabi")
SANITIZERS = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")


@cache
def find_clang() -> str | None:
    """A clang of 18 or newer with libFuzzer and the sanitizers. Debian: `apt install clang-19 libclang-rt-19-dev`."""
    probe = "typedef float v __attribute__((vector_size(64)));v f(v x){return __builtin_elementwise_sqrt(x);}"
    probe += "int LLVMFuzzerTestOneInput(const char*d,long n){return 0;}"
    for name in (os.environ.get("CLANG", "clang"), *(f"clang-{version}" for version in range(25, 17, -1))):
        if shutil.which(name):
            command = [name, "-x", "c", "-", *SANITIZERS, "-o", "/dev/null"]
            if subprocess.run(command, input=probe, text=True, capture_output=True).returncode == 0:
                return name
    return None


def compile_fuzzer(clang: str, folder: Path, more: Sequence[str] = (), sources: Path = SOURCES) -> Path:
    """The library with its harness, and `more` flags for the kernels. x86-64 with AVX2 only."""
    common = [clang, *FLAGS, *SANITIZERS, f"-I{sources}"]
    # Its own memcpy would take the place of AddressSanitizer's.
    own = ["-Dmemcpy=edgestill_memcpy", "-Dmemset=edgestill_memset"]
    kernels = ["-march=x86-64-v3", "-fsanitize-coverage=trace-pc", *more]
    jobs = {
        "kernels3": [*kernels, "-DRUN_PLAN=run_v3", str(sources / "kernels.c")],
        "kernels4": [*kernels, "-DRUN_PLAN=run_v4", str(sources / "kernels.c")],
        "check": [str(sources / "check.c")],
        "library": [*own, str(sources / "library.c")],
        "fuzz": [str(HARNESS)],
    }
    for name, arguments in jobs.items():
        subprocess.run([*common, *arguments, "-c", "-o", str(folder / f"{name}.o")], check=True)
    target = folder / "fuzz"
    objects = [str(folder / f"{name}.o") for name in jobs]
    subprocess.run([*common, "-Wl,--wrap=__sanitizer_cov_trace_pc", *objects, "-o", str(target)], check=True)
    return target


def seeds() -> Iterator[tuple[str, bytes]]:
    """Plans by name: of every operator with its gradients, and of layers that take the other kernels."""
    for operator, case in (CASES | FLAT_CASES).items():
        for seed in range(3):
            random = np.random.default_rng(seed)
            yield f"{operator}-{seed}", _plan(with_gradients(operator, *case(random), random)[0])
    for name, graph in _layers():
        yield name, _plan(graph)


def _plan(graph: Graph) -> bytes:
    return native.make_plan(native.lower(graph)).to_bytes()


def _layers() -> Iterator[tuple[str, Graph]]:
    def convolution(
        channels: int,
        outputs: int,
        groups: int = 1,
        kernel: int = 3,
        stride: int = 1,
        normalized: bool = False,
    ) -> Graph:
        graph, pad = Graph(), ((kernel // 2,) * 2,) * 2
        x = graph.input("x", (5, channels, 6, 6))
        w = graph.input("w", (outputs, channels // groups, kernel, kernel))
        b = graph.input("b", (outputs,))
        y = x.apply("conv2d", w, stride=(stride,) * 2, padding=pad, dilation=(1, 1), groups=groups)
        if normalized:
            y = _normalized(y)
        y = (y + b.reshape(1, outputs, 1, 1)).apply("relu")
        window = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
        y = y.apply("max_pool2d", **window) if y.shape[2] % 2 == 0 else y
        loss = (y * y).sum(0, 1, 2, 3).reshape(1)
        for name, value in gradients(graph, loss, [x, w, b]).items():
            graph.output(f"gradient.{name}", value)
        return graph

    yield "winograd", convolution(16, 20)
    yield "depthwise", convolution(20, 20, groups=20)
    yield "grouped", convolution(8, 12, groups=2, stride=2)
    yield "wide", convolution(36, 4, kernel=1)
    yield "normalized", convolution(4, 6, normalized=True)
    yield "normalized-sixteen", convolution(2, 16, kernel=1, normalized=True)
    yield "normalized-winograd", convolution(16, 16, normalized=True)
    yield "normalized-depthwise", convolution(4, 4, groups=4, normalized=True)
    graph = Graph()
    x, w = graph.input("x", (1, 2, 20, 21)), graph.input("w", (1, 2, 1, 1))
    window = {"kernel": (17, 16), "stride": (2, 3), "padding": ((2, 2), (1, 1)), "dilation": (1, 1)}
    y = (x * w).apply("max_pool2d", **window)  # more pixels than a byte counts, and a factor a channel
    graph.output("gradient.x", gradients(graph, (y * y).sum(0, 1, 2, 3).reshape(1), [x])["x"])
    yield "large-windows", graph
    graph = Graph()
    x, y = graph.input("x", (7, 90), "uint8"), graph.input("y", (90,))
    graph.output("z", x.apply("to_float") * y)
    yield "bytes", graph
    graph = Graph()
    x, y = graph.input("x", (5, 33)), graph.input("y", (33, 17))
    z = x.apply("matmul", y)
    graph.output("p", z.apply("softmax"))
    graph.output("s", z.sum(0))
    yield "product", graph


def _normalized(x: Value) -> Value:
    axes, count = (0, 2, 3), x.size // x.shape[1]
    left = x - x.sum(*axes) * (1 / count)
    return left * ((left * left).sum(*axes) * (1 / count) + 1e-3).apply("rsqrt")


def write_seeds(folder: Path) -> int:
    """How many were written."""
    folder.mkdir(parents=True, exist_ok=True)
    small = {name: plan for name, plan in seeds() if len(plan) <= MOST_SEED_BYTES}
    for name, plan in small.items():
        (folder / name).write_bytes(plan)
    return len(small)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--rows", type=int, help="another tile than AVX2's 6, as of AVX-512: 12")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="another copy of the library's")
    options = parser.parse_args()
    clang = find_clang()
    if clang is None:
        print(
            "error: no clang with libFuzzer. Debian: apt install clang-19 libclang-rt-19-dev", file=sys.stderr
        )
        return 1
    folder = options.folder.resolve()
    for name in ("corpus", "crashes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    more = [f"-DROWS={options.rows}"] if options.rows else []
    binary = compile_fuzzer(clang, folder, more, options.sources)
    print(f"{write_seeds(folder / 'seeds')} seeds", file=sys.stderr)
    words = [
        f"-max_total_time={int(options.minutes * 60)}",
        "-max_len=32768",
        "-timeout=30",
        "-rss_limit_mb=3000",
    ]
    words += [f"-artifact_prefix={folder / 'crashes'}/", "-print_final_stats=1"]
    return subprocess.run(
        [str(binary), *words, *(str(folder / name) for name in ("corpus", "seeds"))]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
