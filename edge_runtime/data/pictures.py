"""Samples whose labels nobody looks at, each with the name by which a person knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.cifar import find_cifar
from edgestill.runtime.data.dataset import find_source, fit_tensors, read_unlabelled
from edgestill.runtime.data.image_file import SUFFIXES, check_form
from edgestill.runtime.data.image_folder import Reader, Tree, find_splits, walk
from edgestill.runtime.data.notice import Tell
from edgestill.runtime.errors import DataError, UsageError


@dataclass(frozen=True)
class Unlabelled:
    """The tensors of samples [N, …], in a bundle's order, and each sample's name: a file, or its place from 0."""

    names: tuple[str, ...]
    samples: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.names)


def load_unlabelled(
    source: str,
    forms: tuple[InputSpec, ...],
    split: str | None,
    resize: bool,
    skip_broken: bool,
    tell: Tell,
) -> Unlabelled:
    """A data source; `forms`: the bundle's `samples`. None is the test split if there is one, else all there is.

    Errors: DataError, UsageError.
    """
    path = find_source(source)
    if path.is_dir() and not find_cifar(path):
        return load_pictures([_split_of(path, split, skip_broken)], forms, resize, skip_broken, tell)
    samples = fit_tensors(read_unlabelled(source, forms, split, tell), forms, source)
    return Unlabelled(tuple(map(str, range(len(samples[0])))), samples)


def _split_of(path: Path, split: str | None, skip_broken: bool) -> Path:
    """Where the pictures of a folder's split lie; None is as above. Errors: UsageError, DataError."""
    tree = walk(path, skip_broken)
    try:
        splits = find_splits(tree)
    except DataError:  # without labels, pictures may lie in it as they like
        if split is not None:
            raise
        return path
    if split is not None and split not in splits:
        raise UsageError(f"{path} has no {split} split", f"it has {' and '.join(splits)}; or leave --split out")
    return splits.get(split or "test", path)


def load_pictures(
    paths: Sequence[Path], forms: tuple[InputSpec, ...], resize: bool, skip_broken: bool, tell: Tell
) -> Unlabelled:
    """Picture files, and all pictures in folders, however deep. Errors: DataError naming the file; UsageError."""
    if len(forms) > 1:
        raise DataError(
            f"the bundle takes {len(forms)} tensors a sample ({', '.join(form.name for form in forms)}), not pictures",
            "give an .npz with --data",
        )
    names: list[str] = []
    parts: list[np.ndarray] = []
    for path in paths:
        check_form(forms[0], str(path))
        if not path.exists():
            raise UsageError(f"{path}: no such file", "give pictures, folders of pictures, or data with --data")
        tree = walk(path, skip_broken) if path.is_dir() else Tree(path.parent, [(path.name,)])
        reader = Reader(tree, forms[0], resize, skip_broken)
        images, read = reader.read(tree.pictures)
        reader.tell(tell)
        parts.append(images)
        names += [str(tree.root.joinpath(*tree.pictures[number])) for number in read]
    if not names:
        raise DataError(f"{', '.join(map(str, paths))}: no images", f"known endings: {' '.join(SUFFIXES)}")
    return Unlabelled(tuple(names), fit_tensors([np.concatenate(parts)], forms, "the pictures"))
