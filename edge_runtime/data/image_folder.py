"""Reads a folder with one subfolder of image files a class, with or without train/ and test/ above them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def is_image_folder(path: Path) -> bool:
    """Whether a path is a folder; what is in it shows when it is read."""
    return path.is_dir()


def read_image_folder(
    path: Path, form: InputSpec, resize: bool
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Splits as (images uint8 [N, H, W, C], labels) and the class names, which are the sorted folder names.

    Errors: DataError naming a file that is unreadable, or of another size when `resize` is off.
    """
    if form.dtype != "uint8" or not form.is_image or form.shape[0] not in _MODES:
        raise DataError(
            f"{path}: images cannot feed a bundle that takes {form}",
            "give an .npz of the bundle's samples",
        )
    roots = {"train": path / "train", "test": path / "test"} if (path / "train").is_dir() else {"train": path}
    roots = {name: root for name, root in roots.items() if root.is_dir()}
    names = tuple(sorted(_class_folders(roots["train"])))
    if not names:
        raise DataError(
            f"{roots['train']}: no subfolders", "put the images of each class into a folder of its own"
        )
    pillow = _import_pillow()
    parts = {}
    for split, root in roots.items():
        strangers = _class_folders(root) - set(names)
        if strangers:
            raise DataError(f"{root}: class {min(strangers)!r} is not among the training classes")
        files = [(file, label) for label, name in enumerate(names) for file in _image_files(root / name)]
        if not files:
            raise DataError(f"{root}: no images", f"known endings: {' '.join(SUFFIXES)}")
        images = np.empty((len(files), *form.shape[1:], form.shape[0]), np.uint8)
        for index, (file, _) in enumerate(files):
            images[index] = _read_image(pillow, file, form, resize)
        parts[split] = (images, np.array([label for _, label in files], np.int64))
    return parts, names


def _class_folders(root: Path) -> set[str]:
    """Names of the subfolders, without those that systems and archives add (.git, __MACOSX)."""
    return {
        child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith((".", "__"))
    }


def _image_files(folder: Path) -> list[Path]:
    return (
        sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
        if folder.is_dir()
        else []
    )


def _read_image(pillow: ModuleType, file: Path, form: InputSpec, resize: bool) -> np.ndarray:
    channels, height, width = form.shape
    try:
        with pillow.open(file) as image:
            image = image.convert(_MODES[channels])  # before scaling: a palette's numbers cannot be mixed
            if image.size != (width, height):
                if not resize:
                    raise DataError(f"{file}: {image.size[0]}x{image.size[1]} pixels, the bundle takes "
                                    f"{width}x{height}", "scale the images, or pass --resize")  # fmt: skip
                image = image.resize((width, height), pillow.Resampling.BILINEAR)
            return np.asarray(image).reshape(height, width, channels)
    except DataError:
        raise
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise DataError(f"{file}: not a readable image: {error}", "remove the file or repair it") from error


def _import_pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "a folder of images needs Pillow", "pip install 'edgestill[images]', or give an .npz"
        ) from error
    return Image
