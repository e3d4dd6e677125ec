"""The students that come with the product, a row each, and the user's own by the name of a factory."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from edgestill.export.students import networks
from edgestill.export.students.networks import Student, StudentOptions
from edgestill.runtime.errors import UsageError

INSTANCE = "instance:"
"""What begins the name of a student that was exported as a module, not by the name of a factory."""
IMAGE, WINDOW = (3, 32, 32), (9, 128)


@dataclass(frozen=True)
class Architecture:
    """A built-in student: where it is published, and what it takes where the options do not say."""

    name: str
    build: Callable[[StudentOptions], Student]
    source: str
    widths: tuple[int, ...]
    input_shape: tuple[int, ...] = IMAGE
    input_dtype: str = "uint8"
    normalizes_batches: bool = True

    def __call__(self, options: StudentOptions) -> Student:
        """The student, with weights of torch's generator as it stands. Errors: UsageError."""
        shape, widths = tuple(options.input_shape or self.input_shape), tuple(options.widths or self.widths)
        own_widths, own_shape = (",".join(map(str, own)) for own in (self.widths, self.input_shape))
        if len(widths) != len(self.widths):
            parts = f"{len(self.widths)} {'blocks' if self.name.startswith('cnn') else 'stages'}"
            raise UsageError(f"{self.name} has {parts} but --widths gives {widths}", f"--widths {own_widths}")
        if options.normalization != "batch" and not self.normalizes_batches:
            raise UsageError(f"{self.name} has its paper's LayerNorm", "leave --normalization out")
        hint = f"--input-shape {own_shape} --widths {own_widths}"
        with _naming(f"{self.name} of widths {widths} cannot take inputs of {shape}", hint):
            return self.build(replace(options, input_shape=shape, widths=widths))


_TABLE = (
    ("cnn3", networks.cnn, "", (32, 64, 128)),
    ("cnn4", networks.cnn, "", (32, 64, 128, 128)),
    ("cnn5", networks.cnn, "", (32, 64, 128, 128, 256)),
    ("resnet8", networks.resnet, "He et al. 2016", (16, 32, 64)),
    ("resnet18", networks.resnet, "He et al. 2016", (64, 128, 256, 512)),
    ("mobilenet-tiny", networks.mobilenet_tiny, "Howard et al. 2017", (32, 64, 128)),
    ("mobilenetv2", networks.mobilenet_v2, "Sandler et al. 2018", (16, 24, 32, 64, 96, 160, 320)),
    ("mobilenetv3-small", networks.mobilenet_v3_small, "Howard et al. 2019", (16, 24, 40, 48, 96)),
    ("efficientnet-lite0", networks.efficientnet_lite0, "Liu 2020", (16, 24, 40, 80, 112, 192, 320)),
    ("shufflenetv2", networks.shufflenet_v2, "Ma et al. 2018", (116, 232, 464)),
    ("convnext-atto", networks.convnext_atto, "Liu et al. 2022", (40, 80, 160, 320), IMAGE, "uint8", False),
    ("vit-tiny", networks.vit_tiny, "Dosovitskiy et al. 2021", (192,), IMAGE, "uint8", False),
    ("ds-cnn", networks.ds_cnn, "Zhang et al. 2017", (64,) * 5, (1, 49, 10), "float32"),
    ("cnn1d", networks.cnn1d, "Wang et al. 2017", (128, 256, 128), WINDOW, "float32"),
    ("gru", networks.gru, "Cho et al. 2014", (64, 64), WINDOW, "float32"),
    ("text-attention", networks.text_attention, "Vaswani et al. 2017", (128,), (64,), "int64", False),
)
ARCHITECTURES: dict[str, Architecture] = {row[0]: Architecture(*row) for row in _TABLE}


def build_student(name: str, options: StudentOptions, seed: int = 0) -> nn.Module:
    """A built-in architecture by name, or the user's own by `package.module:factory` or `file.py:factory`.

    A factory may take any of `latent_size`, `classes`, `input_shape` as keywords. Initial weights follow `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(name, options)


def _build(name: str, options: StudentOptions) -> nn.Module:
    if name.startswith(INSTANCE):
        message = f"the student was exported as an instance of {name.removeprefix(INSTANCE)}, which has no factory"
        raise UsageError(message, hint="name what makes it: --student package.module:factory or file.py:factory")
    if ":" not in name:
        if name not in ARCHITECTURES:
            hint = f"use one of {', '.join(ARCHITECTURES)}, or your own as package.module:factory"
            raise UsageError(f"no student is called {name!r}", hint)
        if options.normalization not in ("batch", "group", "none"):
            raise UsageError(f"normalization {options.normalization!r}", hint="use batch, group or none")
        return ARCHITECTURES[name](options)
    if options.widths is not None or options.normalization != "batch":
        message = f"--widths and --normalization belong to the built-in students, not to {name}"
        raise UsageError(message, hint="leave them out and let your factory choose")
    given = {"latent_size": options.latent_size, "classes": options.classes}
    return _call(_find_factory(name), name, given | {"input_shape": options.input_shape or IMAGE})


def find_student(student: object, seed: int, given: Mapping[str, object]) -> str | nn.Module:
    """The name of a factory that can be imported, so that a bundle knows where its student comes from; else the module.

    `given`: keywords for a factory, of which it may take any. Errors: UsageError.
    """
    if isinstance(student, nn.Module):
        return student
    if not callable(student):
        message = f"a student of type {type(student).__name__}"
        raise UsageError(message, hint="give a module, a factory of one, or a student's name")
    module, name = getattr(student, "__module__", ""), getattr(student, "__qualname__", "a factory")
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is student:
        return f"{module}:{name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _call(student, name, given)


def _call(factory: Callable[..., nn.Module], name: str, given: Mapping[str, object]) -> nn.Module:
    """What a factory makes of those of the given keywords that it takes; None is not given. Errors: UsageError."""
    with _naming(f"the factory {name} failed"):
        signature = inspect.signature(factory).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
        taken = {key: value for key, value in given.items() if anything or key in signature}
        student = factory(**{key: value for key, value in taken.items() if value is not None})
    if not isinstance(student, nn.Module):
        raise UsageError(f"the factory {name} returned {type(student).__name__}, not a torch.nn.Module")
    return student


def _find_factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.rpartition(":")
    hint = "write package.module:factory (importable from here) or path/to/file.py:factory"
    with _naming(f"cannot import {module_name}", hint):
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise UsageError(f"no file {module_name}", hint=hint)
            own = f"edgestill_student_{path.stem}"  # of no other module's name
            spec = importlib.util.spec_from_file_location(own, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[own] = module
            spec.loader.exec_module(module)
        else:
            sys.path[:0] = [""] * ("" not in sys.path)  # an installed script does not see the user's folder
            module = importlib.import_module(module_name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UsageError(f"{module_name} has no callable {attribute!r}", hint=hint)
    return factory


@contextmanager
def _naming(what: str, hint: str | None = None) -> Iterator[None]:
    """Whatever else goes wrong inside becomes a UsageError that begins with `what`."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what}: {type(error).__name__}: {error}", hint) from error
