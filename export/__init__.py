"""From a PyTorch module to a bundle. Called, the package itself exports: `edgestill.export(student, output)`.

torch is imported by the modules in it, and by the call, not by the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from edgestill.runtime.opened_bundle import OpenedBundle


class _Export(ModuleType):
    """The package's module, which can be called."""

    def __call__(
        self,
        student: str | nn.Module | Callable[..., nn.Module],
        output: str | Path,
        *,
        latent_size: int | None = None,
        classes: int | None = None,
        class_names: str | tuple[str, ...] = (),
        batch: int = 32,
        widths: tuple[int, ...] | None = None,
        normalization: str = "batch",
        input_shape: tuple[int, ...] | None = None,
        input_dtype: str | None = None,
        also_input: str | tuple[str, ...] = (),
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        split: tuple[str, ...] = (),
        objective: str = "lkd",
        kd_loss: str | None = None,
        negatives: int | None = None,
        features: int | None = None,
        teacher_latent_size: int | None = None,
        optimizer: str = "sgd",
        nesterov: bool = False,
        clip_gradients: bool = False,
        freeze: tuple[str, ...] = (),
        common_head: bool = False,
        engines: tuple[str, ...] = ("native", "onnxruntime", "executorch"),
        seed: int = 0,
        overwrite: bool = False,
        progress: Callable[[str], None] = lambda line: None,
        engine: str | None = None,
        threads: int = 0,
        resize: bool = False,
        skip_broken: bool = False,
    ) -> OpenedBundle:
        """Writes the bundle of a student to the folder or .zip `output`, and opens it as `edgestill.open` does.

        student: a module, whose weights become the initial state and which stays as it is; a factory of one; a
        built-in student's name; or `package.module:factory`. latent_size, classes: read from a module, else 128 and 10.
        class_names: what the outputs mean, in their order; a path: the names of those data.
        also_input: further tensors of a sample, "tokens:int64:20" each. Of what are names, one may be given alone.
        The other options are those of `edgestill export` (docs/students.md).
        Errors: UsageError, LoweringError and TargetError, which say what to do in their `hint`.
        """
        given = locals()
        from edgestill.export.cli import read_input
        from edgestill.export.exporter import export_bundle, options_of
        from edgestill.runtime.opened_bundle import OpenedBundle

        for name in ("split", "freeze", "engines"):
            given[name] = tuple(given[name].split(",")) if isinstance(given[name], str) else tuple(given[name])
        also = (also_input,) if isinstance(also_input, str) else also_input
        given["more_inputs"] = tuple(read_input(text) for text in also)
        path = export_bundle(options_of(given), output, progress, overwrite)
        return OpenedBundle(path, engine, threads, resize, skip_broken)


sys.modules[__name__].__class__ = _Export
