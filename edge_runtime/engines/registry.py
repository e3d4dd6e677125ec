"""The engines, in order of preference: which of them work here, and one opened on a bundle.

An engine is a module of this package with `check() -> str | None` (None when it works here, else why not),
`INSTALL_HINT`, `version() -> str` and `open(bundle, threads) -> Engine`; it is imported only when asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.protocol import Engine
from edgestill.runtime.errors import EngineError, UsageError

__all__ = ["ENGINES", "Engine", "EngineStatus", "available_engines", "open_engine"]

ENGINES = {
    "onnxruntime": "edgestill.runtime.engines.onnxruntime",
    "executorch": "edgestill.runtime.engines.executorch",
    "onnxruntime-training": "edgestill.runtime.engines.onnxruntime_training",
}


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine works on this machine; if not, why (`reason`) and what to install (`hint`)."""

    name: str
    usable: bool
    version: str | None
    reason: str | None
    hint: str | None


def available_engines() -> list[EngineStatus]:
    """The status of every engine, in order of preference."""
    return [engine_status(name) for name in ENGINES]


def engine_status(name: str) -> EngineStatus:
    """The status of one engine. Errors: EngineError for a name that no engine has."""
    try:
        module = _load(name)
        reason = module.check()
    except ImportError as error:
        return EngineStatus(name, False, None, str(error), None)
    if reason is not None:
        return EngineStatus(name, False, None, reason, module.INSTALL_HINT)
    version = module.version() if hasattr(module, "version") else None
    return EngineStatus(name, True, version, None, None)


def open_engine(bundle: Bundle, name: str | None = None, threads: int = 0) -> Engine:
    """Opens the bundle on the named engine, or on the first that works here and is in the bundle.

    The engine holds the bundle's initial state. `threads` 0 leaves the number to the engine.
    Errors: EngineError saying what to install; UsageError for an engine that the bundle has no graphs for.
    """
    if threads < 0:
        raise UsageError(f"--threads {threads}", "give 0 (the engine's choice) or more")
    if name is not None:
        _require_in_bundle(bundle, name)
        status = engine_status(name)
        if not status.usable:
            raise EngineError(f"engine {name} does not work here: {status.reason}", status.hint)
        return _open(bundle, name, threads)
    reasons = []
    for candidate in (engine for engine in ENGINES if engine in bundle.engines):
        status = engine_status(candidate)
        if status.usable:
            return _open(bundle, candidate, threads)
        reasons.append(f"{candidate}: {status.reason}")
    known = "; ".join(reasons) or f"the bundle has graphs for {', '.join(bundle.engines) or 'none'}"
    raise EngineError(
        f"{bundle.source}: no engine of this bundle works here ({known})",
        "run `edgestill doctor` to see what to install",
    )


def _open(bundle: Bundle, name: str, threads: int) -> Engine:
    engine: Engine = _load(name).open(bundle, threads)
    return engine


def _require_in_bundle(bundle: Bundle, name: str) -> None:
    if name not in ENGINES:
        raise UsageError(f"no engine is called {name!r}", f"engines: {', '.join(ENGINES)}")
    if name not in bundle.engines:
        raise UsageError(
            f"{bundle.source}: no graphs for engine {name}, only for {', '.join(bundle.engines) or 'none'}",
            f"export it with --engines {','.join((*bundle.engines, name))}",
        )


def _load(name: str) -> ModuleType:
    if name not in ENGINES:
        raise EngineError(f"no engine is called {name!r}", f"engines: {', '.join(ENGINES)}")
    return importlib.import_module(ENGINES[name])
