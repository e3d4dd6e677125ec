"""One picture of any of the usual formats as uint8 pixels, upright, eight bits a channel, without transparency.

What is not plain 8-bit colour: 16 bits become their high byte, as Pillow does it for 16-bit colour; floats count from
0 to 1; transparency is laid on white, unless the bundle takes four channels; the EXIF orientation is applied; of
several frames the first is taken. Source of the orientation's values: CIPA DC-008 (Exif 2.32), 4.6.4 A.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.errors import DataError

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff", ".tga", ".pcx", ".webp", ".avif", ".jp2", ".j2k", ".heic", ".heif", ".hif",
)  # fmt: skip
_BUILT_IN = {".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}
"""What Pillow may be built without."""
_BY_HEIF = (".heic", ".heif", ".hif")
_TO_CONVERT = {
    "raw camera images, which must be converted to PNG or JPEG": (
        ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw",
    ),
    "images of a format that must be converted to PNG or JPEG": (
        ".jxl", ".svg", ".psd", ".xcf", ".exr", ".hdr", ".eps", ".pdf", ".ico", ".jxr", ".dcm", ".fits", ".ai",
    ),
}  # fmt: skip
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx")
_TURNS = {
    2: ("FLIP_LEFT_RIGHT",), 3: ("ROTATE_180",), 4: ("FLIP_TOP_BOTTOM",), 5: ("TRANSPOSE",),
    6: ("ROTATE_270",), 7: ("TRANSVERSE",), 8: ("ROTATE_90",),
}  # fmt: skip
_ORIENTATION = 0x0112
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_FRAMED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
"""Formats whose further frames are pictures of their own; a phone's MPO holds a preview, for instance."""


@dataclass(frozen=True)
class Picture:
    """`pixels` uint8 [H, W, C]; `several_frames`: whether there were more; `brightest`: of 16-bit grey levels."""

    pixels: np.ndarray
    several_frames: bool = False
    brightest: int | None = None


class BrokenImage(DataError):
    """A file that is called a picture and is none that can be read."""


def check_form(form: InputSpec, where: str) -> None:
    """Errors: DataError for a bundle that takes no pictures."""
    if form.dtype != "uint8" or not form.is_image or form.shape[0] not in _MODES:
        raise DataError(
            f"{where}: images cannot feed a bundle that takes {form}", "give an .npz of the bundle's samples"
        )


def why_not_read(name: str) -> str | None:
    """Why a file of this name is not read as a picture; None for one that is."""
    if is_of_the_system(name):
        return "files that systems add"
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        found = (reason for reason, endings in _TO_CONVERT.items() if suffix in endings)
        return next(found, "files that are no images by their ending")
    return _missing(suffix)


def is_of_the_system(name: str) -> bool:
    """Whether a file or folder is one that a system or an archive adds, such as ._x.png, Thumbs.db, .git, __MACOSX."""
    return name.startswith((".", "__")) or name.casefold() in _SYSTEM_FILES


def read_picture(file: Path, form: InputSpec, resize: bool) -> Picture:
    """Errors: BrokenImage naming the file; DataError for one of another size without `resize`."""
    pillow = import_pillow()
    channels, height, width = form.shape
    if (lacking := _missing(file.suffix.lower())) is not None:
        what, _, remedy = lacking.partition(": ")
        raise BrokenImage(f"{file.absolute()}: of {what}", remedy)
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise BrokenImage(f"{file.absolute()}: is no file", "remove it, or pass --skip-broken")
    try:
        if file.suffix.lower() in _BY_HEIF:
            _register_heif()
        with warnings.catch_warnings(action="ignore"), pillow.open(file) as image:
            image.load()  # of some formats it knows only then how the picture lies
            several = image.format in _FRAMED and bool(getattr(image, "is_animated", False))
            turns = _TURNS.get(_orientation(image), ())
            image, brightest = _eight_bits(pillow, image)
            for turn in turns:
                image = image.transpose(getattr(pillow.Transpose, turn))
            if channels != 4:
                image = _on_white(pillow, image)
            image = image.convert(_MODES[channels])  # before scaling: a palette's numbers cannot be mixed
            size = image.size
            if size != (width, height) and resize:
                image = image.resize((width, height), pillow.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except (BrokenImage, MemoryError):  # a picture is not broken because memory is short
        raise
    except Exception as error:  # Pillow raises whatever its decoders raise
        reason = "it is empty" if _is_empty(file) else str(error) or type(error).__name__
        raise BrokenImage(
            f"{file.absolute()}: not a readable image: {reason.replace(str(file), file.name)}",
            "remove or repair it, or pass --skip-broken",
        ) from error
    if size != (width, height) and not resize:
        raise DataError(
            f"{file.absolute()}: {size[0]}x{size[1]} pixels, the bundle takes {width}x{height}",
            "scale the images, or pass --resize",
        )
    return Picture(pixels.reshape(height, width, channels), several, brightest)


@cache
def import_pillow() -> ModuleType:
    """Pillow's module Image. Errors: DataError where it is not installed."""
    try:
        return import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise DataError("images need Pillow", "pip install 'edgestill[images]', or give an .npz") from error


@cache
def _missing(suffix: str) -> str | None:
    """What an ending needs that is not here."""
    if suffix in _BY_HEIF and find_spec("pillow_heif") is None:
        return "HEIC images, which need another package: pip install pillow-heif"
    if suffix in _BUILT_IN:
        import_pillow()
        from PIL import features

        if not features.check(_BUILT_IN[suffix]):
            return f"{suffix} images, which this Pillow cannot read: pip install --upgrade pillow"
    return None


@cache
def _register_heif() -> None:
    import_module("pillow_heif").register_heif_opener()


def _orientation(image: object) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))  # type: ignore[attr-defined]
    except Exception:  # damaged EXIF data are no reason to lose the picture
        return 1


def _eight_bits(pillow: ModuleType, image: object) -> tuple[object, int | None]:
    """The picture with eight bits a channel, and the brightest of its 16-bit grey levels. Errors: BrokenImage."""
    mode, made_of = image.mode, getattr(image, "format", None)  # type: ignore[attr-defined]
    if mode.startswith("I;16") or (mode == "I" and made_of in ("PNG", "PPM")):
        levels = np.asarray(image)
        return pillow.fromarray((levels >> 8).astype(np.uint8)), int(levels.max(initial=0))
    if mode == "I":
        raise _without_range(image, "32-bit whole numbers")
    if mode == "F":
        levels = np.asarray(image)
        if not (np.isfinite(levels).all() and levels.min(initial=0) >= 0 and levels.max(initial=0) <= 1):
            raise _without_range(image, "floats beyond 0 to 1")
        return pillow.fromarray(np.round(levels * np.float32(255)).astype(np.uint8)), None
    return image, None


def _without_range(image: object, what: str) -> BrokenImage:
    name = Path(str(getattr(image, "filename", "the image"))).absolute()
    return BrokenImage(
        f"{name}: its pixels are {what}, which have no known range",
        "save it with 8 or 16 bits a channel, or as floats from 0 to 1; or pass --skip-broken",
    )


def _on_white(pillow: ModuleType, image: object) -> object:
    """Transparent pixels have no colour of their own: what is stored in them is anything."""
    if not image.has_transparency_data:  # type: ignore[attr-defined]
        return image
    seen = image.convert("RGBA")  # type: ignore[attr-defined]
    return pillow.alpha_composite(pillow.new("RGBA", seen.size, "white"), seen)


def _is_empty(file: Path) -> bool:
    try:
        return file.stat().st_size == 0
    except OSError:
        return False
