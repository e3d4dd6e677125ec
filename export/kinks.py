"""Keeps the images of a parity check off the points where a student's gradient jumps.

Where a ReLU's input is zero, or two pixels of a pooling window are equal, but for rounding, two correct implementations
may send a gradient different ways, and then differ by per cents: eager PyTorch does from itself in another memory
format. Real images meet a few such points a batch, so a few of their pixels are moved by a grey level or two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edgestill.export.reference import ReferenceStep, set_training

MARGIN = 5e-6
"""Distance wanted from every kink, in standard deviations of the activation; engines round at about 3e-7."""
ROUNDS = 25

aten = torch.ops.aten
_KINKS = {
    aten.relu.default: (0.0,),
    aten.relu_.default: (0.0,),
    aten.hardtanh.default: (0.0, 6.0),
    aten.hardtanh_.default: (0.0, 6.0),
    aten.hardswish.default: (-3.0, 3.0),
    aten.hardswish_.default: (-3.0, 3.0),
}


@dataclass(frozen=True)
class NearKink:
    """An activation too close to a kink: which image, and where in it as shares of height and width."""

    image: int
    row: float
    column: float


def move_off_kinks(reference: ReferenceStep, images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The images of one batch with noise of a grey level, and more of it where the reference's next step has a kink."""
    grey = images.dtype == np.uint8
    size = 1.0 if grey else 1e-3 * float(images.std() or 1.0)
    # Noise all over first: in flat regions of a photograph all pixels of a window are tied.
    images = _moved(images, random.integers(-1, 2, images.shape) * size)
    best, fewest = images, None
    for _ in range(ROUNDS):
        near = find_near_kinks(reference, images)
        if fewest is None or len(near) < fewest:
            best, fewest = images, len(near)
        if not near:
            break
        noise = np.zeros(images.shape)
        for kink in near:
            height, width = images.shape[2:]
            row = min(int(kink.row * height) + random.integers(0, 2), height - 1)
            column = min(int(kink.column * width) + random.integers(0, 2), width - 1)
            noise[kink.image, :, row, column] = random.choice([-2, -1, 1, 2], images.shape[1]) * size
        images = _moved(images, noise)
    return best


def _moved(images: np.ndarray, noise: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return np.clip(images + noise.astype(np.int64), 0, 255).astype(np.uint8)
    return (images + noise).astype(np.float32)


def find_near_kinks(reference: ReferenceStep, images: np.ndarray, margin: float = MARGIN) -> list[NearKink]:
    """Those of the forward pass of a training step."""
    saved = {name: buffer.clone() for name, buffer in reference.student.named_buffers()}
    set_training(reference.student, reference.bundle)
    watcher = _Watcher(margin)
    with watcher, torch.no_grad():
        reference.outputs(torch.from_numpy(images))
    with torch.no_grad():
        for name, buffer in reference.student.named_buffers():
            buffer.copy_(saved[name])
    return watcher.found


class _Watcher(TorchDispatchMode):
    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.found: list[NearKink] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _KINKS:
            clipped = func in (aten.hardtanh.default, aten.hardtanh_.default) and len(args) > 2
            for kink in args[1:3] if clipped else _KINKS[func]:
                distances = (args[0] - kink).abs()
                self._see(torch.where(distances > 0, distances, torch.inf), float(args[0].std()))
        elif func is aten.max_pool2d_with_indices.default:
            self._see_windows(*args)
        return func(*args, **(kwargs or {}))

    def _see(self, distances: torch.Tensor, scale: float) -> None:
        """distances: [N, C, H, W] or [N, F]."""
        near = (distances < self.margin * scale).nonzero()
        for index in near.tolist():
            place = [i / size for i, size in zip(index[2:], distances.shape[2:], strict=True)] or [0.5, 0.5]
            self.found.append(NearKink(index[0], *place))

    def _see_windows(self, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False) -> None:
        """How far every pixel of every window is below the window's largest."""
        n, channels, height, width = F.max_pool2d(
            x, kernel, stride or None, padding, dilation, ceil_mode
        ).shape
        pad_h, pad_w = (padding, padding) if isinstance(padding, int) else (padding[0], padding[-1])
        padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h), value=-3e38)
        columns = F.unfold(padded, tuple(kernel), dilation, 0, tuple(stride or kernel))
        columns = columns.reshape(n, channels, -1, height * width)
        top = columns.amax(2, keepdim=True)
        gaps = torch.where(columns < top, top - columns, torch.inf).amin(2)
        # Equal after rounding is near enough. But pixels that a ReLU before set to zero, the extremes of their image's
        # channel, may well be tied: no gradient gets past that ReLU.
        lowest, highest = x.amin((2, 3)).unsqueeze(2), x.amax((2, 3)).unsqueeze(2)
        tied = (columns == top).sum(2) > 1
        tied &= (top[:, :, 0] > lowest) & (top[:, :, 0] < highest)
        gaps = torch.where(tied, 0.0, gaps)
        self._see(gaps.reshape(n, channels, height, width), float(x.std()))
