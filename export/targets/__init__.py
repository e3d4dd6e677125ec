"""One module an engine: `emit(spec, folder)` writes the engine's graphs and returns their manifest entries."""

from __future__ import annotations

import importlib
import logging

from edgestill.runtime.engines.registry import ENGINES as RECORDS
from edgestill.runtime.errors import EdgestillError, UsageError

ENGINES = tuple(RECORDS)


class TargetError(EdgestillError):
    """An engine's graphs could not be made."""


def open_target(engine: str):
    """The module of an engine. Errors: UsageError for an unknown engine, TargetError for one not installed here."""
    if engine not in RECORDS:
        raise UsageError(f"no engine is called {engine!r}", hint=f"use some of {', '.join(ENGINES)}")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # packages that are imported on the way complain about one another
    try:
        return importlib.import_module(RECORDS[engine].exporter)
    except ImportError as error:
        raise TargetError(
            f"cannot export for {engine}: {error}", hint="pip install 'edgestill[export]'"
        ) from error
    finally:
        logging.disable(disabled)
