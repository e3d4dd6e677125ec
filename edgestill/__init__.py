"""Training at the edge by distilling latents: one training step that every inference engine can run.

`export` writes the bundle of a student (it needs PyTorch), `open` trains, evaluates and predicts with one (it does
not). How to: docs/python.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from edgestill.runtime.opened_bundle import OpenedBundle

__all__ = ["export", "open"]


def open(
    bundle: str | Path,
    engine: str | None = None,
    threads: int = 0,
    resize: bool = False,
    skip_broken: bool = False,
) -> OpenedBundle:
    """Opens a bundle, a folder or a .zip, on an engine: None is the first that works here, 0 threads its own choice.

    Of images in files, `resize` scales those of another size, and `skip_broken` leaves out, counts and names those
    that cannot be read.

    Errors: BundleError, UsageError, EngineError, which say what to do in their `hint`.
    """
    from edgestill.runtime.opened_bundle import OpenedBundle

    return OpenedBundle(bundle, engine, threads, resize, skip_broken)


def __getattr__(name: str) -> object:
    """`export` and `__version__`, found when they are asked for. Errors: AttributeError for any other name."""
    if name == "export":
        return import_module("edgestill.export")
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("edgestill")
