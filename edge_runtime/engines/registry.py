"""The engines, one record each, in order of preference: which of them work here, and one opened on a bundle."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.engines.engine import Engine
from edgestill.runtime.errors import EngineError, UsageError
from edgestill.runtime.native.architecture import HINT as NATIVE_HINT

__all__ = ["ENGINES", "Engine", "EngineRecord", "EngineStatus", "available_engines", "open_engine"]


@dataclass(frozen=True)
class EngineRecord:
    """All that the product knows of an engine without importing it.

    `runner` is a module with `check() -> str | None` (None when the engine works here, else why not),
    `version() -> str` and `open_runner(threads) -> Runner` (program.py), `exporter` one with
    `emit(spec, folder) -> records`. Each is imported when first needed; only the exporter may need torch.
    """

    name: str
    exporter: str
    runner: str
    tolerance: float
    """How many times eager float32's error its own may be for `edgestill verify`, a tensor and the median over steps;
    measured were up to 3."""
    extra: str | None
    """The extra of the package `edgestill` that brings it, if one does."""
    hint: str
    """What to type to have it."""


ENGINES = {
    record.name: record
    for record in (
        EngineRecord(
            name="native",
            exporter="edgestill.export.targets.native",
            runner="edgestill.runtime.engines.native",
            tolerance=6.0,
            extra=None,
            hint=NATIVE_HINT,
        ),
        EngineRecord(
            name="onnxruntime",
            exporter="edgestill.export.targets.onnxruntime",
            runner="edgestill.runtime.engines.onnxruntime",
            tolerance=6.0,
            extra="onnxruntime",
            hint="pip install 'edgestill[onnxruntime]'",
        ),
        EngineRecord(
            name="executorch",
            exporter="edgestill.export.targets.executorch",
            runner="edgestill.runtime.engines.executorch",
            tolerance=6.0,
            extra="executorch",
            hint="pip install --no-deps executorch==1.5.1",
        ),
        EngineRecord(
            name="onnxruntime-training",
            exporter="edgestill.export.targets.onnxruntime_training",
            runner="edgestill.runtime.engines.onnxruntime_training",
            tolerance=12.0,
            extra=None,
            hint="python3.11 -m venv .venv-ort-training && "
            ".venv-ort-training/bin/pip install onnxruntime-training==1.19.2 numpy; "
            "an environment elsewhere is named by EDGESTILL_ORT_TRAINING_PYTHON",
        ),
    )
}
"""By name, in order of preference."""


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
    hint = _record(name).hint
    try:
        module = _load(name)
        reason = module.check()
    except ImportError as error:
        return EngineStatus(name, False, None, str(error), hint)
    if reason is not None:
        return EngineStatus(name, False, None, reason, hint)
    return EngineStatus(name, True, module.version(), None, None)


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
    runner = _load(name).open_runner(threads)
    try:
        return Engine(bundle, name, runner)
    except BaseException:
        runner.close()
        raise


def _require_in_bundle(bundle: Bundle, name: str) -> None:
    if name not in ENGINES:
        raise UsageError(f"no engine is called {name!r}", f"engines: {', '.join(ENGINES)}")
    if name not in bundle.engines:
        raise UsageError(
            f"{bundle.source}: no graphs for engine {name}, only for {', '.join(bundle.engines) or 'none'}",
            f"export it with --engines {','.join((*bundle.engines, name))}",
        )


def _record(name: str) -> EngineRecord:
    if name not in ENGINES:
        raise EngineError(f"no engine is called {name!r}", f"engines: {', '.join(ENGINES)}")
    return ENGINES[name]


def _load(name: str) -> ModuleType:
    return importlib.import_module(_record(name).runner)
