"""Reads a folder with one subfolder of images a class, however deep they lie in it, with or without splits above."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.data.image_file import (
    SUFFIXES,
    BrokenImage,
    check_form,
    import_pillow,
    is_of_the_system,
    read_picture,
    why_not_read,
)
from edgestill.runtime.data.notice import Notice, Tell
from edgestill.runtime.errors import DataError

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip
"""What folders of splits are called, in upper or lower case."""
_NAMED = 3
"""So many files of each kind are named."""
_DIM = 4096
"""16-bit images whose brightest pixel is below this are nearly black once they have eight bits."""


@dataclass(frozen=True)
class FolderSplit:
    """Images uint8 [N, H, W, C], labels int64 [N] that number `names`, the sorted names of the class folders."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


@dataclass
class Tree:
    """The files below a folder by their paths from it, as parts.

    `inside`: by a folder's path the sorted names of the folders in it, without those that are left out.
    """

    root: Path
    pictures: list[tuple[str, ...]] = field(default_factory=list)
    skipped: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    inside: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    @property
    def folders(self) -> list[str]:
        """Those directly in the root."""
        return self.inside.get((), [])

    def below(self, name: str) -> list[tuple[str, ...]]:
        """The pictures in a folder of the root, however deep."""
        return self._by_folder.get(name, [])

    @cached_property
    def _by_folder(self) -> dict[str, list[tuple[str, ...]]]:
        found: dict[str, list[tuple[str, ...]]] = {}
        for parts in self.pictures:
            if len(parts) > 1:
                found.setdefault(parts[0], []).append(parts)
        return found

    def skip(self, pictures: Iterable[tuple[str, ...]], reason: str) -> None:
        self.skipped += [(parts, reason) for parts in pictures]


def read_image_folder(
    path: Path, form: InputSpec, resize: bool, skip_broken: bool, tell: Tell
) -> dict[str, FolderSplit]:
    """By split: `train` alone, or with `test`, `validation` or both.

    Errors: DataError naming a file that is unreadable, unless `skip_broken`, or of another size without `resize`.
    """
    check_form(form, str(path))
    tree = walk(path, skip_broken)
    found = {}
    for split, root in find_splits(tree).items():
        names = class_folders(tree, root)
        if not names:
            raise DataError(f"{root}: no subfolders", "put the images of each class into a folder of its own")
        prefix = root.relative_to(path).parts
        mine = [parts for parts in tree.pictures if parts[: len(prefix)] == prefix]
        tree.skip((p for p in mine if len(p) == len(prefix) + 1), "images outside of a class's folder")
        numbers = {name: number for number, name in enumerate(names)}
        files = [(parts, numbers[parts[len(prefix)]]) for parts in mine if len(parts) > len(prefix) + 1]
        found[split] = (root, files, names)
    _skip_other_roots(tree, [root.relative_to(path).parts for root, _, _ in found.values()])
    reader = Reader(tree, form, resize, skip_broken)
    splits = {}
    for split, (root, files, names) in found.items():
        images, read = reader.read([parts for parts, _ in files])
        if not read:
            tell_of_skipped(tree, tell)
            raise DataError(f"{root}: no images", f"known endings: {' '.join(SUFFIXES)}")
        splits[split] = FolderSplit(images, np.array([files[one][1] for one in read], np.int64), names)
    reader.tell(tell)
    return splits


def read_unlabelled_folder(
    path: Path, form: InputSpec, resize: bool, skip_broken: bool, tell: Tell
) -> np.ndarray:
    """All images of a folder however they lie in it, uint8 [N, H, W, C]; of one with splits those of `train`."""
    check_form(form, str(path))
    tree = walk(path, skip_broken)
    train = [name for name in tree.folders if SPLITS.get(name.casefold()) == "train"]
    others = [name for name in tree.folders if SPLITS.get(name.casefold()) is None and tree.below(name)]
    chosen = tree.pictures
    if len(train) == 1 and not others and tree.below(train[0]):
        chosen = tree.below(train[0])
        tree.skip(sorted(set(tree.pictures) - set(chosen)), "images of other splits")
    reader = Reader(tree, form, resize, skip_broken)
    images, read = reader.read(chosen)
    reader.tell(tell)
    if not read:
        raise DataError(f"{path}: no images", f"known endings: {' '.join(SUFFIXES)}")
    return images


def class_folders(tree: Tree, root: Path) -> tuple[str, ...]:
    """The sorted names of the folders in one of the tree's, without what systems and archives add (.git, __MACOSX)."""
    return tuple(tree.inside.get(root.relative_to(tree.root).parts, ()))


def find_splits(tree: Tree) -> dict[str, Path]:
    """Where the classes' folders lie, by split; a class may be called `train`.

    A folder `train` is a split if it holds folders of images, and there is nothing beside it but other splits.
    Errors: DataError where it cannot be told.
    """
    root = tree.root
    roles: dict[str, list[str]] = {}
    for name in tree.folders:
        if name.casefold() in SPLITS:
            roles.setdefault(SPLITS[name.casefold()], []).append(name)
    holding = [name for name in tree.folders if tree.below(name)]
    classes = [name for name in holding if name.casefold() not in SPLITS]
    deep = {name for name in tree.folders if any(len(parts) > 2 for parts in tree.below(name))}
    flat = {name for name in tree.folders if any(len(parts) == 2 for parts in tree.below(name))}
    named = [name for role in ("train", "test", "validation") for name in roles.get(role, ())]
    layered = [name for name in named if name in deep - flat]
    if classes:
        inner = {name: {parts[1] for parts in tree.below(name) if len(parts) > 2} for name in layered}
        doubtful = [name for name in layered if inner[name] & set(classes)]
        if not doubtful and len(layered) > 1 and set(layered) & set(roles.get("train", ())):
            doubtful = layered
        if not doubtful:
            return {"train": root}
        raise DataError(
            f"{root}: {doubtful[0]}/ looks like a split, and {classes[0]}/ beside it like a class",
            f"move {root / classes[0]} into a folder {root / 'train'}, or rename {doubtful[0]} if it is a class",
        )
    if not named:
        return {"train": root}
    for role, names in roles.items():
        if len(names) > 1:
            raise DataError(
                f"{root}: {' and '.join(names)} are the same split", f"keep one folder for {role}"
            )
    if "train" not in roles:
        raise DataError(
            f"{root}: holds {' and '.join(f'{name}/' for name in named)}, and no train/",
            f"give {root / named[0]}, or put the training images into {root / 'train'}",
        )
    splits = {role: root / names[0] for role, names in roles.items()}
    if flat - deep:
        shallow = min(flat - deep)
        raise DataError(
            f"{root / shallow}: holds images, and no folder for each class",
            "put the images of each class into a folder of its own",
        )
    splits = {role: where for role, where in splits.items() if role == "train" or tree.below(where.name)}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return {role: splits[role] for role in ("train", "test", "validation") if role in splits}


def walk(root: Path, skip_broken: bool = False) -> Tree:
    """What lies below a folder, linked folders included, each once: where it really lies, else by its first link.

    Errors: DataError for a folder that cannot be read, unless `skip_broken`.
    """
    tree, seen = Tree(root), {os.path.realpath(root)}

    def keep_apart(error: OSError) -> None:
        folder = Path(error.filename or root)
        if not skip_broken or folder == root:
            raise DataError(
                f"{folder.absolute()}: this folder cannot be read: {error.strerror}",
                "let it be read, remove it, or pass --skip-broken",
            ) from error
        tree.skip([folder.relative_to(root).parts], "folders that cannot be read")

    starts = [root]
    for start in starts:  # which grows: links come after all that lies here itself
        here = start.relative_to(root).parts
        if here:
            real = os.path.realpath(start)
            if real in seen:
                tree.skip([here], "links to a folder that is read already")
                continue
            seen.add(real)
            tree.inside[here[:-1]].append(here[-1])
        for parent, folders, names in os.walk(start, onerror=keep_apart):
            here = Path(parent).relative_to(root).parts
            kept = tree.inside.setdefault(here, [])
            for name in sorted(folders):
                path = Path(parent, name)
                if is_of_the_system(name):
                    tree.skip([(*here, name)], "files that systems add")
                elif path.is_symlink():
                    starts.append(path)
                elif (real := os.path.realpath(path)) in seen:
                    tree.skip([(*here, name)], "folders that are read already")
                else:
                    seen.add(real)
                    kept.append(name)
            folders[:] = kept
            for name in names:
                reason = why_not_read(name)
                if reason is None:
                    tree.pictures.append((*here, name))
                else:
                    tree.skip([(*here, name)], reason)
    for folder_names in tree.inside.values():
        folder_names.sort()
    tree.pictures.sort()
    tree.skipped.sort()
    return tree


def _skip_other_roots(tree: Tree, roots: Sequence[tuple[str, ...]]) -> None:
    """Pictures of no split: beside `train`, where there are splits."""
    outside = [parts for parts in tree.pictures if not any(parts[: len(root)] == root for root in roots)]
    tree.skip(outside, "images outside of a class's folder")


class Reader:
    """Reads pictures and remembers what a person should hear of them."""

    def __init__(self, tree: Tree, form: InputSpec, resize: bool, skip_broken: bool) -> None:
        import_pillow()
        self._tree, self._form, self._resize, self._skip_broken = tree, form, resize, skip_broken
        self._framed: list[str] = []
        self._deep: list[str] = []
        self._brightest = 0

    def read(self, files: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, list[int]]:
        """Images uint8 [N, H, W, C], and which of the files they are."""
        channels, height, width = self._form.shape
        images, read = np.empty((len(files), height, width, channels), np.uint8), []
        for number, parts in enumerate(files):
            try:
                picture = read_picture(self._tree.root.joinpath(*parts), self._form, self._resize)
            except BrokenImage:
                if not self._skip_broken:
                    raise
                self._tree.skip([parts], "broken images")
                continue
            images[len(read)] = picture.pixels
            read.append(number)
            if picture.several_frames:
                self._framed.append("/".join(parts))
            if picture.brightest is not None:
                self._deep.append("/".join(parts))
                self._brightest = max(self._brightest, picture.brightest)
        return images[: len(read)], read

    def tell(self, tell: Tell) -> None:
        tell_of_skipped(self._tree, tell)
        root = self._tree.root
        if self._framed:
            tell(
                Notice(
                    "frames",
                    f"{root}: of {_counted(len(self._framed), 'image')} with several frames the first is taken: "
                    f"{_some(self._framed)}",
                    {"count": len(self._framed), "files": self._framed[:_NAMED]},
                )
            )
        if self._deep and self._brightest < _DIM:
            tell(
                Notice(
                    "depth",
                    f"{root}: {_counted(len(self._deep), '16-bit image')} no brighter than {self._brightest} of 65535 "
                    f"are nearly black with eight bits ({_some(self._deep)}); scale them to the full range beforehand",
                    {"count": len(self._deep), "brightest": self._brightest, "files": self._deep[:_NAMED]},
                )
            )


def tell_of_skipped(tree: Tree, tell: Tell) -> None:
    """Counts and names what was left out, by reason."""
    if not tree.skipped:
        return
    reasons: dict[str, list[str]] = {}
    for parts, reason in tree.skipped:
        reasons.setdefault(reason, []).append("/".join(parts))
    told = "; ".join(f"{len(files)} ({_some(files)}): {reason}" for reason, files in reasons.items())
    details = {reason: {"count": len(files), "files": files[:_NAMED]} for reason, files in reasons.items()}
    count = len(tree.skipped)
    tell(
        Notice(
            "skipped", f"{tree.root}: {_counted(count, 'file')} skipped: {told}",
            {"source": str(tree.root), "count": count, "reasons": details},
        )
    )  # fmt: skip


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:_NAMED]) + (", …" if len(files) > _NAMED else "")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")
