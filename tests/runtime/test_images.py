"""Pictures of all kinds against Pillow and NumPy, folders of them, and what is said of those that are not read."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.cli import main
from edgestill.runtime.data import image_file
from edgestill.runtime.data.dataset import Splits, class_names_of, load_splits, load_transfer_samples
from edgestill.runtime.data.image_folder import Tree, find_splits
from edgestill.runtime.data.notice import Notice
from edgestill.runtime.errors import DataError
from tests.support.handmade_bundle import SIZE, write_handmade_bundle

WIDTH, HEIGHT = 6, 4
COLOUR = InputSpec((3, HEIGHT, WIDTH), "uint8", (0.5,) * 3, (0.25,) * 3)
GREY = InputSpec((1, HEIGHT, WIDTH), "uint8", (0.5,), (0.25,))
WITH_ALPHA = InputSpec((4, HEIGHT, WIDTH), "uint8", (0.5,) * 4, (0.25,) * 4)
DRAW = np.random.default_rng(3)
BYTES = DRAW.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
WORDS = DRAW.integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)
RGB = Image.fromarray(BYTES[..., :3])


def read(path: Path, form: InputSpec = COLOUR, resize: bool = False) -> np.ndarray:
    return image_file.read_picture(path, form, resize).pixels


def load(root: Path, form: InputSpec = COLOUR, classes: int = 3, **how: bool) -> tuple[Splits, list[Notice]]:
    told: list[Notice] = []
    return load_splits(root, form, classes, tell=told.append, **how), told


def write_16_bit_png(path: Path, words: np.ndarray) -> None:
    """Pillow writes no 16-bit colour. Source: W3C, PNG, 11.2."""
    height, width, channels = words.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in words)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_tiff(path: Path, pixels: np.ndarray, sample_format: int = 1, order: str = "<") -> None:
    """One uncompressed strip. Source: TIFF 6.0, section 8, 19."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = pixels.dtype.itemsize * 8
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits), (259, 3, 1, 1),
               (262, 3, 1, 2 if channels == 3 else 1), (273, 4, 1, 8), (277, 3, 1, channels),
               (278, 4, 1, height), (279, 4, 1, len(data)), (339, 3, channels, sample_format)]  # fmt: skip
    place = 8 + len(data) + 2 + 12 * len(entries) + 4
    table, more = b"", b""
    for tag, kind, count, value in entries:
        table += struct.pack(f"{order}HHI", tag, kind, count)
        if kind == 3 and count > 2:
            table += struct.pack(f"{order}I", place + len(more))
            more += struct.pack(f"{order}{count}H", *[value] * count)
        elif kind == 3:
            table += struct.pack(f"{order}HH", value, value if count == 2 else 0)
        else:
            table += struct.pack(f"{order}I", value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(entries)) + table + b"\0" * 4 + more)


@pytest.mark.parametrize("ending", ["png", "tif", "tiff-big", "pgm"])
@pytest.mark.parametrize("form", [GREY, COLOUR])
def test_16_bit_grey_keeps_its_high_byte(tmp_path: Path, ending: str, form: InputSpec) -> None:
    path = tmp_path / f"x.{ending.partition('-')[0]}"
    levels = WORDS[..., 0]
    if ending == "tiff-big":
        write_tiff(path, levels[..., None], order=">")
    elif ending == "pgm":
        path.write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    np.testing.assert_array_equal(read(path, form), np.repeat((levels >> 8)[..., None], form.shape[0], 2))


def test_16_bit_colour_and_alpha_keep_their_high_byte(tmp_path: Path) -> None:
    write_16_bit_png(tmp_path / "x.png", WORDS)
    np.testing.assert_array_equal(read(tmp_path / "x.png"), WORDS >> 8)
    for order in "<>":
        write_tiff(tmp_path / "x.tif", WORDS, order=order)
        np.testing.assert_array_equal(read(tmp_path / "x.tif"), WORDS >> 8)
    opaque = np.concatenate([WORDS[..., :1], np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)], 2)
    write_16_bit_png(tmp_path / "la.png", opaque)
    np.testing.assert_array_equal(read(tmp_path / "la.png", GREY), WORDS[..., :1] >> 8)


def test_floats_count_from_0_to_1(tmp_path: Path) -> None:
    levels = DRAW.random((HEIGHT, WIDTH)).astype(np.float32)
    levels[0, :2] = 0, 1
    Image.fromarray(levels).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read(tmp_path / "x.tif", GREY)[..., 0], np.round(levels * np.float32(255)))
    for wrong in (levels * 255, levels - 0.5, np.full_like(levels, np.nan)):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "x.tif")
        with pytest.raises(DataError, match=r"/x\.tif: its pixels are floats beyond 0 to 1"):
            read(tmp_path / "x.tif", GREY)
    Image.fromarray((levels * 70000).astype(np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(DataError, match=r"/i\.tif: its pixels are 32-bit whole numbers"):
        read(tmp_path / "i.tif", GREY)


def palette_image() -> Image.Image:
    image = Image.fromarray(BYTES[..., 0] % 3)
    image = image.convert("P") if image.mode != "P" else image
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    return image


KINDS = {
    "1-bit.png": (Image.fromarray(BYTES[..., 0]).convert("1"), {}),
    "1-bit.tif": (Image.fromarray(BYTES[..., 0]).convert("1"), {}),
    "1-bit.pbm": (Image.fromarray(BYTES[..., 0]).convert("1"), {}),
    "grey.png": (Image.fromarray(BYTES[..., 0]), {}),
    "palette.png": (palette_image(), {}),
    "palette.gif": (palette_image(), {}),
    "colour.bmp": (RGB, {}),
    "colour.tga": (RGB, {}),
    "colour.ppm": (RGB, {}),
    "colour.webp": (RGB, {"lossless": True}),
    "colour.avif": (RGB, {"quality": 100}),
    "colour.jp2": (RGB, {}),
    "colour.jfif": (RGB, {"format": "JPEG"}),
    "colour.jpe": (RGB, {"format": "JPEG"}),
    "COLOUR.JPG": (RGB, {"format": "JPEG"}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "cmyk.tif": (RGB.convert("CMYK"), {}),
    "ycbcr.tif": (RGB.convert("YCbCr"), {}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", [GREY, COLOUR])
def test_usual_kinds_are_converted_as_pillow_does(tmp_path: Path, name: str, form: InputSpec) -> None:
    image, options = KINDS[name]
    image.save(tmp_path / name, **options)
    mode = {1: "L", 3: "RGB"}[form.shape[0]]
    with Image.open(tmp_path / name) as reference:
        expected = np.asarray(reference.convert(mode)).reshape(HEIGHT, WIDTH, -1)
    np.testing.assert_array_equal(read(tmp_path / name, form), expected)
    assert expected.std() > 10


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = BYTES.copy()
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    image = Image.fromarray(pixels)
    share = pixels[..., 3:] / 255
    blended = pixels[..., :3] * share + 255 * (1 - share)
    image.save(tmp_path / "x.png")
    assert np.abs(read(tmp_path / "x.png") - blended).max() <= 1
    assert read(tmp_path / "x.png")[0, 0].tolist() == [255] * 3
    np.testing.assert_array_equal(read(tmp_path / "x.png", WITH_ALPHA), pixels)
    grey = Image.fromarray(np.stack([pixels[..., 0], pixels[..., 3]], 2))
    grey.save(tmp_path / "la.png")
    grey_blended = pixels[..., :1] * share + 255 * (1 - share)
    assert grey.mode == "LA" and np.abs(read(tmp_path / "la.png", GREY) - grey_blended).max() <= 1
    # a colour of a palette, or one grey level, may stand for nothing, too
    indices = np.asarray(palette_image())
    palette_image().save(tmp_path / "p.gif", transparency=1)
    seen = read(tmp_path / "p.gif")
    assert (seen[indices == 1] == 255).all() and (seen[indices == 0] == [250, 0, 0]).all()
    black = Image.fromarray(np.where(BYTES[..., 0] > 99, 200, 0).astype(np.uint8))
    black.save(tmp_path / "t.png", transparency=0)
    np.testing.assert_array_equal(
        read(tmp_path / "t.png", GREY)[..., 0], np.where(BYTES[..., 0] > 99, 200, 255)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "avif", "tif"])
def test_pictures_stand_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    path = tmp_path / f"x.{ending}"
    Image.fromarray(BYTES[..., :3].reshape(size[1], size[0], 3)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read(path), expected)


def test_damaged_exif_data_lose_no_picture(tmp_path: Path) -> None:
    RGB.save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish")
    np.testing.assert_array_equal(read(tmp_path / "x.png"), BYTES[..., :3])


def test_heic_is_read_where_its_package_is(tmp_path: Path) -> None:
    import pillow_heif as heif

    (tmp_path / "cat").mkdir()
    heif.from_pillow(RGB.resize((64, 64))).save(tmp_path / "cat/IMG_1.HEIC", quality=100)
    image = load(tmp_path, resize=True)[0].train.images[0]
    small = np.asarray(RGB.resize((64, 64)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(image.transpose(1, 2, 0) - small).mean() < 12


def test_what_needs_a_package_is_named_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()
    RGB.save(tmp_path / "cat/a.png")
    for name in ("b.HEIC", "c.heif", "d.avif", "e.CR2", "f.svg"):
        (tmp_path / "cat" / name).write_bytes(b"some picture")
    monkeypatch.setattr(image_file, "find_spec", lambda name: None)
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    image_file._missing.cache_clear()
    try:
        splits, (notice,) = load(tmp_path)
        with pytest.raises(DataError, match="/b.HEIC: of HEIC images, which need another package") as error:
            read(tmp_path / "cat/b.HEIC")
        assert error.value.hint == "pip install pillow-heif"
    finally:
        image_file._missing.cache_clear()
    assert len(splits.train) == 1 and notice.kind == "skipped" and notice.details["count"] == 5
    reasons = {reason: told["files"] for reason, told in notice.details["reasons"].items()}
    assert reasons == {
        "HEIC images, which need another package: pip install pillow-heif": ["cat/b.HEIC", "cat/c.heif"],
        ".avif images, which this Pillow cannot read: pip install --upgrade pillow": ["cat/d.avif"],
        "raw camera images, which must be converted to PNG or JPEG": ["cat/e.CR2"],
        "images of a format that must be converted to PNG or JPEG": ["cat/f.svg"],
    }
    assert (
        "2 (cat/b.HEIC, cat/c.heif): HEIC images, which need another package: pip install pillow-heif"
        in notice.text
    )


def fill(root: Path, *names: str) -> Path:
    """Pictures, each of a colour of its own, at these paths."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(path)
    return root


def taken(part: object) -> list[tuple[str, int]]:
    """Each sample's class, and which of the pictures it is."""
    return [(part.class_names[label], int(image[0, 0, 0]))
            for label, image in zip(part.labels, part.images, strict=True)]  # fmt: skip


def test_nested_pictures_are_of_the_class_above_them(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "cat/2024/05/b.png", "dog/deep/c.png", "stray.png", ".hidden/d.png")
    (tmp_path / "cat/again").symlink_to(tmp_path / "cat")  # a loop
    (tmp_path / "linked").symlink_to(tmp_path / "dog")  # the same folder twice
    splits, told = load(tmp_path)
    assert taken(splits.train) == [("cat", 1), ("cat", 0), ("dog", 2)]
    assert told[0].details["reasons"] == {
        "files that systems add": {"count": 1, "files": [".hidden"]},
        "images outside of a class's folder": {"count": 1, "files": ["stray.png"]},
        "links to a folder that is read already": {"count": 2, "files": ["cat/again", "linked"]},
    }


@pytest.mark.parametrize("name", ["canine", "zebra"])
def test_what_really_lies_there_comes_before_links_to_it(tmp_path: Path, name: str) -> None:
    """In whichever order their names are."""
    fill(tmp_path / "d", "cat/a.png", "dog/old/b.png")
    fill(tmp_path / "elsewhere", "one/c.png")
    (tmp_path / "d" / name).symlink_to(tmp_path / "d/dog")
    (tmp_path / "d/cat/also").symlink_to(tmp_path / "d/dog/old")  # which is met before the folder itself
    (tmp_path / "d/bird").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/crow").symlink_to(tmp_path / "elsewhere/one")  # by another link's folder
    splits, (notice,) = load(tmp_path / "d")
    assert splits.train.class_names == ("bird", "cat", "dog") == class_names_of(tmp_path / "d")
    assert taken(splits.train) == [("bird", 0), ("cat", 0), ("dog", 1)]
    (told,) = notice.details["reasons"].values()
    assert told == {"count": 3, "files": sorted(["cat/also", "crow", name])}


@pytest.mark.parametrize("locked", ["dog", "cat/more"])
def test_a_folder_that_cannot_be_read_is_named_or_skipped(
    tmp_path: Path, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "cat/a.png", "cat/more/b.png", "dog/c.png")
    scan = os.scandir

    def refuse(path: str) -> object:  # for root, who may do the tests, reads everything
        if str(path) == str(tmp_path / locked):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied") as error:
        load(tmp_path)
    assert str(tmp_path / locked) in error.value.message and "--skip-broken" in error.value.hint
    splits, (notice,) = load(tmp_path, skip_broken=True)
    assert taken(splits.train) == ([("cat", 0), ("cat", 1)] if locked == "dog" else [("cat", 0), ("dog", 2)])
    assert notice.details["reasons"] == {"folders that cannot be read": {"count": 1, "files": [locked]}}


def test_many_classes_are_looked_at_once_each() -> None:
    """Counted in paths that are looked at, which must not grow with the square of the classes."""
    looked = 0

    class Counted(list):
        def __iter__(self) -> Iterator[tuple[str, ...]]:
            nonlocal looked
            for parts in super().__iter__():
                looked += 1
                yield parts

    def count(classes: int) -> int:
        nonlocal looked
        looked = 0
        names = [f"c{number:03}" for number in range(classes)]
        tree = Tree(Path("d"), Counted((name, "a.png") for name in names), [], {(): names})
        assert find_splits(tree) == {"train": Path("d")}
        return looked

    assert count(300) == 10 * count(30) > 0


def test_files_that_systems_add_stop_nobody(tmp_path: Path) -> None:
    fill(tmp_path, "cat/x.png", "dog/y.png")
    for name in ("cat/._x.png", "cat/Thumbs.db", ".DS_Store", "dog/desktop.ini", "__MACOSX/cat/._x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "labels.csv").write_text("a,b")
    splits, (notice,) = load(tmp_path)
    assert taken(splits.train) == [("cat", 0), ("dog", 1)]
    reasons = {reason: told["count"] for reason, told in notice.details["reasons"].items()}
    assert reasons == {"files that systems add": 5, "files that are no images by their ending": 1}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["bus/a.png", "train/b.png", "plane/c.png"], {"train": ["bus", "plane", "train"]}),
        (["bus/a.png", "train/steam/b.png", "train/diesel/c.png"], {"train": ["bus", "train", "train"]}),
        (["exam/a.png", "test/b.png", "Val/c.png"], {"train": ["Val", "exam", "test"]}),
        (["train/x/a.png", "train/y/b.png"], {"train": ["x", "y"]}),
        (["train/x/a.png", "val/x/b.png"], {"train": ["x"], "test": ["x"]}),
        (["Train/x/a.png", "VALID/x/b.png"], {"train": ["x"], "test": ["x"]}),
        (["training/x/a.png", "validation/x/b.png", "testing/x/c.png"],
         {"train": ["x"], "test": ["x"], "validation": ["x"]}),
        (["train/train/a.png", "train/x/b.png", "test/train/c.png"],
         {"train": ["train", "x"], "test": ["train"]}),
        (["train/x/a.png", "train/stray.png", "test/x/b.png"], {"train": ["x"], "test": ["x"]}),
    ],
)  # fmt: skip
def test_what_is_a_split_and_what_a_class(
    tmp_path: Path, names: list[str], splits: dict[str, list[str]]
) -> None:
    found = load(fill(tmp_path, *names))[0]
    parts = {"train": found.train, "test": found.test, "validation": found.validation}
    seen = {name: sorted(name for name, _ in taken(part)) for name, part in parts.items() if part is not None}
    assert seen == splits


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/x/a.png", "test/x/b.png", "x/c.png"],
            "train/ looks like a split, and x/ beside it like a class",
        ),
        (["cat/a.png", "test/cat/b.png"], "test/ looks like a split, and cat/ beside it"),
        (["test/cat/a.png"], "holds test/, and no train/"),
        (["train/a.png", "test/b.png"], "holds images, and no folder for each class"),
        (["train/x/a.png", "Training/x/a.png"], "are the same split"),
        (["a.png"], "no subfolders"),
    ],
)
def test_folders_that_could_be_either_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError) as error:
        load(fill(tmp_path, *names))
    assert message in error.value.message and str(tmp_path) in error.value.message and error.value.hint


def test_a_validation_split_in_arrays(tmp_path: Path) -> None:
    x, y = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8), np.arange(3)
    arrays = {"x_train": x, "y_train": y, "x_val": x[1:], "y_val": y[1:]}
    np.savez(tmp_path / "d.npz", **arrays)
    found = load(tmp_path / "d.npz")[0]
    assert found.test is not None and found.test.labels.tolist() == [1, 2] and found.validation is None
    np.savez(tmp_path / "d.npz", **arrays, x_test=x[:1], y_test=y[:1])
    found = load(tmp_path / "d.npz")[0]
    assert found.choose(None).labels.tolist() == [0] and found.choose("validation").labels.tolist() == [1, 2]


def test_a_transfer_set_needs_no_classes(tmp_path: Path) -> None:
    fill(tmp_path / "flat", "a.png", "b.png", "more/c.png")
    (tmp_path / "flat/notes.txt").write_text("x")
    told: list[Notice] = []
    images = load_transfer_samples(tmp_path / "flat", COLOUR, tell=told.append)[0]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] and told[0].details["count"] == 1
    fill(tmp_path / "split", "train/x/a.png", "test/x/b.png")
    assert load_transfer_samples(tmp_path / "split", COLOUR, tell=told.append)[0][:, 0, 0, 0].tolist() == [0]


def test_of_several_frames_the_first_is_taken_and_said(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    other = Image.new("RGB", (WIDTH, HEIGHT), "white")
    for name in ("a.gif", "b.png", "c.webp", "d.tif"):
        options = {"lossless": True} if name == "c.webp" else {}
        RGB.save(tmp_path / "cat" / name, save_all=True, append_images=[other], **options)
    splits, (notice,) = load(tmp_path)
    for image in splits.train.images[1:]:
        np.testing.assert_array_equal(image.transpose(1, 2, 0), BYTES[..., :3])
    assert notice.kind == "frames" and notice.details["count"] == 4 and "cat/a.gif" in notice.text
    # a phone's JPEG with a preview in it is one picture
    RGB.save(tmp_path / "cat/e.mpo", save_all=True, append_images=[other])
    assert load(tmp_path)[1][0].details["count"] == 4


def test_16_bit_images_that_come_out_black_are_said(tmp_path: Path) -> None:
    (tmp_path / "bone").mkdir()
    for number in range(5):
        Image.fromarray(WORDS[..., 0] >> 4).save(tmp_path / f"bone/{number}.png")
    (notice,) = load(tmp_path, GREY)[1]
    assert notice.kind == "depth" and notice.details["count"] == 5
    assert notice.details["brightest"] == int((WORDS[..., 0] >> 4).max())
    assert "bone/0.png, bone/1.png, bone/2.png, …" in notice.text
    Image.fromarray(WORDS[..., 0]).save(tmp_path / "bone/9.png")
    assert load(tmp_path, GREY)[1] == []


def test_a_broken_image_is_named_with_its_whole_path_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "d", "cat/a.png", "dog/c.png")
    good = (tmp_path / "d/cat/a.png").read_bytes()
    damaged = {"cat/b.png": good[:30], "cat/c.jpg": b"", "dog/a.gif": b"rubbish"}
    for name, content in damaged.items():
        (tmp_path / "d" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load(Path("d"))
    assert str(tmp_path / "d/cat/b.png") in error.value.message and "--skip-broken" in error.value.hint
    splits, (notice,) = load(Path("d"), skip_broken=True)
    assert taken(splits.train) == [("cat", 0), ("dog", 1)]
    assert notice.details["reasons"] == {"broken images": {"count": 3, "files": sorted(damaged)}}
    for name in ("cat/a.png", "dog/c.png"):
        (tmp_path / "d" / name).write_bytes(b"x")
    with pytest.raises(DataError, match="no images"):
        load(Path("d"), skip_broken=True)


def test_the_commands_count_what_they_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_handmade_bundle(tmp_path / "b", objective="ce")
    fill(tmp_path / "d", *(f"{name}/{n}.png" for name in "abcd" for n in range(3)))
    (tmp_path / "d/a/broken.png").write_bytes(b"x")
    (tmp_path / "d/b/notes.txt").write_text("x")
    words = [
        str(tmp_path / "b"),
        "--data",
        str(tmp_path / "d"),
        "--resize",
        "--state",
        str(tmp_path / "s.safetensors"),
    ]
    assert SIZE != WIDTH or SIZE != HEIGHT
    assert main(["train", *words]) == 1
    assert str(tmp_path / "d/a/broken.png") in capsys.readouterr().err
    for command in ("train", "evaluate"):
        assert main([command, *words, "--skip-broken", "--json"]) == 0
        printed = capsys.readouterr()
        last = json.loads(printed.out.splitlines()[-1])
        (notice,) = [one for one in last.get("summary", last)["notices"] if one["kind"] == "skipped"]
        assert notice["count"] == 2 and notice["reasons"]["broken images"] == {
            "count": 1,
            "files": ["a/broken.png"],
        }
        assert "2 files skipped" in printed.err and "a/broken.png" in printed.err
