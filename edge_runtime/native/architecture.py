"""Where libedgestill lies, and what it is made for: all that the engine needs to know of its compiler."""

from __future__ import annotations

import platform
from pathlib import Path

HINT = "pip install ziglang && python -m edgestill.runtime.native.compile"
LEVELS = {
    "x86_64": {"v3": "x86_64_v3", "v4": "x86_64_v4"},
    "aarch64": {"neon": "cortex_a53"},
}
"""By architecture, the instruction sets that the kernels are compiled for, and what the compiler calls them."""


def library_path(architecture: str | None = None) -> Path:
    """Where the library of an architecture (this machine's) lies."""
    return Path(__file__).resolve().with_name(f"libedgestill-{architecture or machine()}.so")


def machine() -> str:
    """This machine's architecture by its usual name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
