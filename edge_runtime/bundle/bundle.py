"""Opens a bundle, a folder or a .zip, and refuses it unless every byte is what its manifest says."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.manifest import (
    GraphSpec,
    InputSpec,
    Manifest,
    Objective,
    Optimizer,
    Student,
    TensorSpec,
    parse_manifest,
)
from edgestill.runtime.errors import BundleError, EdgestillError, StateError, UsageError
from edgestill.runtime.files import sha256_of_file

if TYPE_CHECKING:
    import tempfile
    import zipfile

__all__ = ["Bundle", "GraphSpec", "InputSpec", "Manifest", "Objective", "Optimizer", "Student", "TensorSpec"]

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_BUNDLE_BYTES = 4 * 2**30
MAX_FILES = 1000
_TAMPERED = "do not use this bundle: copy or export it again"


@dataclass(frozen=True)
class Bundle:
    """An opened and checked bundle; `path` is its folder (a temporary one for a .zip)."""

    path: Path
    manifest: Manifest
    source: Path
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens a folder or a .zip and checks names, sizes and digests of all its files.

        Errors: BundleError saying which file or field and why; UsageError when there is nothing.
        """
        source = Path(path)
        if source.is_dir():
            return cls(source, _check_folder(source), source)
        if not source.exists():
            raise UsageError(
                f"{source}: no such bundle", "make one with `edgestill export --student NAME --output DIR`"
            )
        import tempfile  # imported, like zipfile, when first needed: they delay the start

        temporary = tempfile.TemporaryDirectory(prefix="edgestill-bundle-")
        try:
            _extract(source, Path(temporary.name))
            return cls(Path(temporary.name), _check_folder(Path(temporary.name)), source, temporary)
        except BundleError as error:
            temporary.cleanup()
            # the folder is gone, and nobody knows its name
            raise BundleError(error.message.replace(temporary.name, str(source)), error.hint) from error
        except BaseException:
            temporary.cleanup()
            raise

    @property
    def student(self) -> Student:
        return self.manifest.student

    @property
    def latent_size(self) -> int:
        return self.manifest.latent_size

    @property
    def classes(self) -> int:
        return self.manifest.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs mean, in their order; empty where the bundle does not say."""
        return self.manifest.class_names

    @property
    def batch(self) -> int:
        return self.manifest.batch

    @property
    def input(self) -> InputSpec:
        return self.manifest.input

    @property
    def more_inputs(self) -> tuple[InputSpec, ...]:
        return self.manifest.more_inputs

    @property
    def samples(self) -> tuple[InputSpec, ...]:
        """All tensors of a sample, in the order in which `encode` takes them."""
        return (self.manifest.input, *self.manifest.more_inputs)

    @property
    def sample_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.samples)

    @property
    def noise_specs(self) -> tuple[TensorSpec, ...]:
        """The uniform numbers that a step takes, for dropout and its like."""
        return tuple(spec for spec in self.inputs("train_step") if spec.name.startswith("noise."))

    @property
    def objective(self) -> Objective:
        return self.manifest.objective

    @property
    def optimizer(self) -> Optimizer:
        return self.manifest.optimizer

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(self.manifest.graphs)

    @property
    def has_common_head(self) -> bool:
        return self.manifest.common_head is not None

    @property
    def state_specs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.state

    @property
    def training_memory_bytes(self) -> int:
        """What training takes at most, by the manifest: the state twice (old and new) and the planned memory."""
        planned = [self.graph(engine, "train_step").planned_memory_bytes or 0 for engine in self.engines]
        return 2 * sum(spec.size_bytes for spec in self.state_specs) + max(planned, default=0)

    def inputs(self, graph: str) -> tuple[TensorSpec, ...]:
        """What `train_step` or `encode` takes besides state."""
        return self.manifest.inputs[graph]

    def outputs(self, graph: str) -> tuple[TensorSpec, ...]:
        """What `train_step` or `encode` gives besides state."""
        return self.manifest.outputs[graph]

    def graph(self, engine: str, graph: str) -> GraphSpec:
        """Errors: BundleError when the bundle has no graphs for the engine."""
        if engine not in self.manifest.graphs:
            raise BundleError(
                f"{self.source}: no graphs for engine {engine!r}, only for {', '.join(self.engines)}",
                f"export it with --engines {','.join((*self.engines, engine))}",
            )
        return self.manifest.graphs[engine][graph]

    def file(self, name: str) -> Path:
        """Where a file of the bundle lies on disk."""
        return self.path / name

    def initial_state(self) -> dict[str, np.ndarray]:
        """The state that the bundle starts from. Errors: StateError, WireError."""
        arrays = wire.load(self.file(self.manifest.state_file)).arrays
        return self.check_state(arrays, source=f"{self.source}: {self.manifest.state_file}")

    def check_state(self, state: Mapping[str, np.ndarray], source: str = "state") -> dict[str, np.ndarray]:
        """The state in the manifest's order, if it has exactly the manifest's tensors, shapes and dtypes.

        Errors: StateError naming the first few tensors that differ.
        """
        specs = {spec.name: spec for spec in self.state_specs}
        problems = [f"{name!r} is missing" for name in specs if name not in state]
        problems += [f"{name!r} is not in the bundle" for name in state if name not in specs]
        for name, spec in specs.items():
            if name in state and (state[name].shape != spec.shape or state[name].dtype != spec.numpy_dtype):
                problems.append(
                    f"{name!r} is {state[name].dtype}{list(state[name].shape)}, "
                    f"not {spec.dtype}{list(spec.shape)}"
                )
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise StateError(
                f"{source} does not fit this bundle: {'; '.join(problems[:3])}{more}",
                "use a state file that was trained with this bundle, or one exported alike",
            )
        return {name: state[name] for name in specs}

    @cached_property
    def model_digest(self) -> str:
        """SHA-256 of what a training run depends on: student, objective, optimizer, specs and initial state.

        Not of the engines' graphs, so that a run may go on with another engine.
        """
        manifest = self.manifest
        text = json.dumps(
            [
                manifest.student.name,
                dict(manifest.student.options),
                manifest.latent_size,
                manifest.classes,
                manifest.batch,
                [list(manifest.input.shape), manifest.input.dtype, manifest.input.mean, manifest.input.std],
                _objective_of(manifest),
                [manifest.optimizer.name, manifest.optimizer.nesterov],
                list(manifest.freeze),
                [[s.name, list(s.shape), s.dtype, s.role, s.written] for s in manifest.state],
                manifest.files[manifest.state_file].sha256,
                *self._newer_specs(),
            ],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _newer_specs(self) -> list[list[object]]:
        """What older bundles could not say, so that their digests stay as they were."""
        named = [[s.name, list(s.shape), s.dtype, s.mean, s.std] for s in self.samples]
        noise = [[spec.name, list(spec.shape)] for spec in self.noise_specs]
        said = len(named) == 1 and self.input.name == "images"
        clips = [["clips"]] if self.optimizer.clips else []
        return [*([] if said else [named]), *([noise] if noise else []), *clips]

    def contains(self, path: str | Path) -> bool:
        """Whether a path lies in the bundle's folder, where nothing may be added."""
        return Path(path).resolve().is_relative_to(self.source.resolve())

    def close(self) -> None:
        """Removes the temporary folder of a .zip; harmless otherwise."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _objective_of(manifest: Manifest) -> list[str | int | None]:
    """With sizes only where there are some, so that the digests of older bundles stay as they were."""
    objective = manifest.objective
    sizes = (objective.negatives, objective.features, objective.teacher_latent_size)
    return [objective.name, objective.kd_loss, *(size for size in sizes if size is not None)]


def _check_folder(folder: Path) -> Manifest:
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise BundleError(
            f"{folder}: no manifest.json, so not a bundle", "give a folder that `edgestill export` wrote"
        )
    if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{manifest_path}: larger than {MAX_MANIFEST_BYTES} bytes", _TAMPERED)
    try:
        manifest = parse_manifest(manifest_path.read_bytes())
    except EdgestillError as error:
        raise BundleError(f"{folder}: {error.message}", error.hint) from error
    found = _list_files(folder)
    for name in sorted(found - set(manifest.files)):
        raise BundleError(
            f"{folder}: {name} is not listed in the manifest", "remove it, or export the bundle again"
        )
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = folder / name
        if name not in found:
            raise BundleError(f"{folder}: {name} is missing", "copy or export the bundle again")
        if not path.resolve().is_relative_to(root) or not path.is_file():
            raise BundleError(f"{folder}: {name} is not a file inside the bundle", _TAMPERED)
        if path.stat().st_size != record.size_bytes:
            raise BundleError(
                f"{folder}: {name} has {path.stat().st_size} bytes, not {record.size_bytes}", _TAMPERED
            )
        if sha256_of_file(path) != record.sha256:
            raise BundleError(
                f"{folder}: {name} has been changed (its SHA-256 differs from the manifest)", _TAMPERED
            )
    return manifest


def _list_files(folder: Path) -> set[str]:
    found: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=False):
        # a linked folder is not walked into, so it must count as a file that nobody listed
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found.update((Path(parent) / name).relative_to(folder).as_posix() for name in (*names, *links))
        if len(found) > MAX_FILES:
            raise BundleError(f"{folder}: more than {MAX_FILES} files, so not a bundle")
    return found - {"manifest.json"}


def _extract(source: Path, target: Path) -> None:
    """Unpacks a .zip whose members may lie in one common folder.

    Errors: BundleError for names that leave the folder, links, encryption, or too many bytes.
    """
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MAX_FILES or sum(member.file_size for member in members) > MAX_BUNDLE_BYTES:
                raise BundleError(
                    f"{source}: unpacks to more than {MAX_FILES} files or {MAX_BUNDLE_BYTES} bytes"
                )
            for member in members:
                _check_member(source, member)
            prefix = _common_folder([member.filename for member in members])
            for member in members:
                destination = target / member.filename.removeprefix(prefix)
                if destination.exists():
                    raise BundleError(f"{source}: {member.filename} stands twice in the archive", _TAMPERED)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, destination.open("xb") as unpacked:
                    _copy_exactly(packed, unpacked, member.file_size, f"{source}: {member.filename}")
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        zlib.error,
    ) as error:
        raise BundleError(
            f"{source}: not a readable .zip: {error}", "give the bundle's folder or its .zip"
        ) from error


def _check_member(source: Path, member: zipfile.ZipInfo) -> None:
    name, mode = member.filename, member.external_attr >> 16
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or "\0" in name:
        raise BundleError(f"{source}: member {name!r} leaves the bundle", _TAMPERED)
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise BundleError(f"{source}: member {name!r} is a link or a device, not a file", _TAMPERED)
    if member.flag_bits & 1:
        raise BundleError(f"{source}: member {name!r} is encrypted", "pack the bundle without a password")


def _common_folder(names: list[str]) -> str:
    if "manifest.json" in names:
        return ""
    heads = {name.split("/", 1)[0] for name in names}
    head = next(iter(heads), "")
    return f"{head}/" if len(heads) == 1 and f"{head}/manifest.json" in names else ""


def _copy_exactly(packed: IO[bytes], unpacked: IO[bytes], size_bytes: int, where: str) -> None:
    """Copies at most the announced size: a bomb that lies about its size stops here."""
    remaining = size_bytes
    while chunk := packed.read(min(1 << 20, remaining + 1)):
        remaining -= len(chunk)
        if remaining < 0:
            raise BundleError(f"{where} is larger than its entry says", _TAMPERED)
        unpacked.write(chunk)
