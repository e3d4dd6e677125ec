"""Random flips and shifted crops of a batch of images."""

from __future__ import annotations

import numpy as np

from edgestill.runtime.errors import UsageError
from edgestill.runtime.randomness import AUGMENTATION, raw_numbers

AUGMENTATIONS = ("flip", "crop")
PADDING = 4


def check_augmentation(names: tuple[str, ...], shape: tuple[int, ...], *others: tuple[int, ...]) -> None:
    """`shape`: of the first tensor of a sample, which is augmented; `others`: of the further ones.

    Errors: UsageError for an unknown name, samples that are no images, a second image, or images too small for a crop.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise UsageError(
                f"no augmentation is called {name!r}", f"augmentations: {', '.join(AUGMENTATIONS)}"
            )
    if names and len(shape) != 3:
        raise UsageError(
            f"--augment {','.join(names)} is for images (channels, height, width); the bundle takes "
            f"samples of {'x'.join(map(str, shape))}",
            "leave --augment out, or augment the data beforehand",
        )
    if names and any(len(other) == 3 for other in others):
        raise UsageError(
            f"--augment {','.join(names)} would change one image of a sample and not the other",
            "leave --augment out, or augment the data beforehand",
        )
    if "crop" in names and min(shape[1:]) <= PADDING:
        raise UsageError(
            f"--augment crop shifts by up to {PADDING} pixels; images of {shape[1]}x{shape[2]} are too small",
            "leave crop out",
        )


def augment(images: np.ndarray, names: tuple[str, ...], seed: int, epoch: int, step: int) -> np.ndarray:
    """A batch [B, C, H, W], each image flipped left to right by chance (`flip`) and shifted by up to 4 pixels
    each way with its border reflected (`crop`); the input stays as it is."""
    if not names:
        return images
    count, _, height, width = images.shape
    numbers = raw_numbers(seed, AUGMENTATION, epoch, step, 3 * count).reshape(3, count)
    if "crop" in names:
        margin = (PADDING, PADDING)
        padded = np.pad(images, ((0, 0), (0, 0), margin, margin), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        top, left = (numbers[:2] % (2 * PADDING + 1)).astype(np.intp)
        images = windows[np.arange(count), :, top, left]
    if "flip" in names:
        # the highest bit: the crop has used the low ones of the other rows
        flipped = (numbers[2] >> np.uint64(63)).astype(bool)
        images = np.where(flipped[:, None, None, None], images[..., ::-1], images)
    return images
