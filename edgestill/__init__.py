"""Training at the edge by distilling latents: one training step that every inference engine can run."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    """`__version__`, looked up when it is asked for. Errors: AttributeError for any other name."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("edgestill")
