"""One module an engine: `emit(spec, folder)` writes the engine's graphs and returns their manifest entries."""

from __future__ import annotations

import importlib
import logging

from edgestill.runtime.errors import EdgestillError, UsageError

ENGINES = ("onnxruntime", "executorch", "onnxruntime-training")
_MODULES = {
    "onnxruntime": "edgestill.export.targets.onnx",
    "executorch": "edgestill.export.targets.executorch",
    "onnxruntime-training": "edgestill.export.targets.onnxruntime_training",
}


class TargetError(EdgestillError):
    """An engine's graphs could not be made."""


def open_target(engine: str):
    """The module of an engine. Errors: UsageError for an unknown engine, TargetError for one not installed here."""
    if engine not in _MODULES:
        raise UsageError(f"no engine is called {engine!r}", hint=f"use some of {', '.join(ENGINES)}")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # packages that are imported on the way complain about one another
    try:
        return importlib.import_module(_MODULES[engine])
    except ImportError as error:
        raise TargetError(
            f"cannot export for {engine}: {error}", hint="pip install 'edgestill[export]'"
        ) from error
    finally:
        logging.disable(disabled)
