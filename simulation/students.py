"""Bundles for a simulation: exported through `edgestill export`, kept in a cache by what decides their bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from edgestill.runtime.errors import UsageError
from edgestill.simulation.bundles import BundleRequest, ExportFailed, prepare_bundle
from edgestill.simulation.settings import SimulationSettings

# Channels of the built-in students' stages, as in export/students/registry.py, which needs torch; a test compares them.
WIDTHS = {
    "cnn3": (32, 64, 128),
    "cnn4": (32, 64, 128, 128),
    "cnn5": (32, 64, 128, 128, 256),
    "resnet8": (16, 32, 64),
    "resnet18": (64, 128, 256, 512),
    "mobilenet-tiny": (32, 64, 128),
    "mobilenetv2": (16, 24, 32, 64, 96, 160, 320),
    "mobilenetv3-small": (16, 24, 40, 48, 96),
    "efficientnet-lite0": (16, 24, 40, 80, 112, 192, 320),
    "shufflenetv2": (116, 232, 464),
    "convnext-atto": (40, 80, 160, 320),
    "vit-tiny": (192,),
    "ds-cnn": (64, 64, 64, 64, 64),
    "cnn1d": (128, 256, 128),
    "gru": (64, 64),
    "text-attention": (128,),
}
ENGINE = "native"


def default_cache() -> Path:
    """Where exported bundles are kept from run to run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgestill" / "bundles"


def narrow(student: str, divisor: int) -> tuple[str, ...]:
    """Words for `edgestill export` that divide a built-in student's channels; none for a student of the user's."""
    if divisor == 1 or student not in WIDTHS:
        return ()
    return ("--widths", ",".join(str(max(1, width // divisor)) for width in WIDTHS[student]))


def prepare_students(
    settings: SimulationSettings, cache: Path, progress: Callable[[str], None]
) -> tuple[list[Path], Path | None]:
    """Bundles of the devices' students in the order asked for, and the global student's if there is one.

    Errors: UsageError, ExportFailed from the exporter.
    """

    def export(student: str) -> Path:
        options = ("--seed", str(settings.seed % 2**31), *narrow(student, settings.width_divisor))
        if settings.exports_common_head:
            options += ("--common-head",)
        request = BundleRequest(
            student, settings.batch, settings.latent_size, settings.exported_objective, settings.optimizer, options
        )
        try:
            return prepare_bundle(request, [ENGINE], cache, progress)[0]
        except ExportFailed as error:
            if find_spec("torch") is not None:
                raise
            raise UsageError(
                f"the student {student} must be exported, and PyTorch is not installed here",
                "`edgestill demo --output demo` lays students that are exported already: `edgestill simulate --bundle "
                "demo/cnn3 --global-bundle demo/cnn5`",
            ) from error

    own = list(settings.bundles) or [export(name) for name in dict.fromkeys(settings.students)]
    if not settings.distils:
        return own, None
    if settings.global_bundle is not None:
        return own, settings.global_bundle
    if settings.global_student is not None:
        return own, export(settings.global_student)
    return own, own[-1]
