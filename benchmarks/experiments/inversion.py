"""Two attacks that turn uploaded rows (latents, logits) back into images, and how alike two images are.

Images are float32 [N, C, H, W] from 0 to 1 throughout. A decoder learns from pairs of images and rows (Dosovitskiy and
Brox 2016); the gradient attack knows the student's parameters and moves an image until the student gives the rows
(Mahendran and Vedaldi 2015).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Represent = Callable[[torch.Tensor], torch.Tensor]
"""Rows [N, l] of images, differentiable."""

_WINDOW, _WINDOW_SIGMA = 11, 1.5
_WIDTHS = (96, 64, 32)
_DECODER_RATE, _GRADIENT_RATE = 2e-3, 0.1


def psnr_db(images: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB, against a peak of 1; 100 where two are equal."""
    errors = np.square(images.astype(np.float64) - rebuilt).mean(axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(errors, 1e-10))


def ssim(images: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, -1 to 1, mean over channels and all whole 11x11 Gaussian windows.

    Images have at least 11 pixels each way. Source: Wang, Bovik, Sheikh, Simoncelli 2004.
    """
    x, y = (torch.from_numpy(np.asarray(array, np.float64)) for array in (images, rebuilt))
    channels = x.shape[1]
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    line /= line.sum()
    window = (line[:, None] * line).expand(channels, 1, -1, -1).contiguous()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window, groups=channels)

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    alike /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return alike.mean(dim=(1, 2, 3)).numpy()


class Decoder(nn.Module):
    """Rows [N, l] to images: a linear layer to an eighth of the height and width, then three transposed convolutions.

    Rows are standardised by the `rows` that it is made with. Images are a multiple of 8 pixels each way.
    """

    def __init__(self, rows: torch.Tensor, shape: tuple[int, int, int]):
        super().__init__()
        channels, height, width = shape
        self.register_buffer("mean", rows.mean(dim=0))
        self.register_buffer("deviation", rows.std(dim=0).clamp_min(1e-12))
        self.start = nn.Sequential(
            nn.Linear(rows.shape[1], _WIDTHS[0] * (height // 8) * (width // 8)),
            nn.Unflatten(1, (_WIDTHS[0], height // 8, width // 8)),
        )
        blocks: list[nn.Module] = []
        for wide, narrow in zip(_WIDTHS, (*_WIDTHS[1:], 16), strict=True):
            blocks += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
        self.blocks = nn.Sequential(*blocks, nn.ReLU(), nn.Conv2d(16, channels, 3, padding=1), nn.Sigmoid())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.start((rows - self.mean) / self.deviation))


def train_decoder(
    rows: np.ndarray,
    images: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    *,
    epochs: int,
    seed: int,
    batch: int = 64,
) -> Callable[[np.ndarray], np.ndarray]:
    """Learns `images` from `rows` by squared error; returns rows [N, l] -> images.

    Of all epochs the one stays whose error on `validation` (rows, images) is smallest: rows of noise cannot be
    learned, only remembered. Same arguments, same function.
    """
    x, y = torch.from_numpy(rows), torch.from_numpy(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(x, tuple(images.shape[1:]))
        batch = min(batch, len(x))
        steps = epochs * (len(x) // batch)
        optimizer = torch.optim.Adam(decoder.parameters(), _DECODER_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _DECODER_RATE, total_steps=steps)
        best, best_error = copy.deepcopy(decoder.state_dict()), float("inf")
        for _ in range(epochs):
            decoder.train()
            order = torch.randperm(len(x))
            for chosen in order[: len(x) // batch * batch].view(-1, batch):
                loss = F.mse_loss(decoder(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            error = float(np.square(_decode(decoder, validation[0]) - validation[1]).mean())
            if error < best_error:
                best, best_error = copy.deepcopy(decoder.state_dict()), error
    decoder.load_state_dict(best)
    return lambda given: _decode(decoder, given)


def _decode(decoder: Decoder, rows: np.ndarray) -> np.ndarray:
    decoder.eval()
    with torch.no_grad():
        return np.concatenate([decoder(part).numpy() for part in torch.from_numpy(rows).split(256)])


def invert_by_gradient(
    represent: Represent, rows: np.ndarray, start: np.ndarray, *, smoothness: float, steps: int
) -> np.ndarray:
    """Images whose rows come near `rows` [N, l]: Adam on the images, each for itself, from `start` [N, C, H, W].

    An image's loss is |represent(image) - row|² / |row|² + smoothness · total variation (the mean absolute difference
    of neighbouring pixels). Values stay within 0 and 1 as they are the sigmoid of what is moved.
    """
    target = torch.from_numpy(rows)
    scale = target.square().sum(dim=1).clamp_min(1e-12)
    free = torch.tensor(start).clamp(0.01, 0.99).logit().requires_grad_()
    optimizer = torch.optim.Adam([free], _GRADIENT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        images = free.sigmoid()
        misfit = (represent(images) - target).square().sum(dim=1) / scale
        loss = (misfit + smoothness * total_variation(images)).sum()
        (free.grad,) = torch.autograd.grad(loss, [free])
        optimizer.step()
        schedule.step()
    return free.detach().sigmoid().numpy()


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference of neighbouring pixels of each image, down plus across."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean(dim=(1, 2, 3))
    return down + across
