"""A wheel carries libedgestill for both architectures (docs/native.md); everything else stands in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ONLY_IN_A_CHECKOUT = "edgestill.benchmarks"


class BuildWithLibraries(build_py):
    """The files of the packages but the benchmarks, and beside the library's sources what ziglang makes of them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [name for name in self.packages if not f"{name}.".startswith(f"{ONLY_IN_A_CHECKOUT}.")]

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # `make setup` compiles what a checkout needs
            return
        if not any(Path("simulation/carried").glob("*.zip")):
            self.warn("without the demo's bundles, so `edgestill demo` needs PyTorch; `make wheels` puts them in")
        # Where the build put the packages, for only there they lie as they are imported. -B: all of that is shipped.
        compile_both = [sys.executable, "-B", "-m", "edgestill.runtime.native.compile", "x86_64", "aarch64"]
        subprocess.run(compile_both, cwd=self.build_lib, check=True)


setup(cmdclass={"build_py": BuildWithLibraries})
