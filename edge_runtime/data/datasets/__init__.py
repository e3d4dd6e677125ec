"""The shipped data, real images as .npz without pickle: `cifar10-mini` for devices and tests, `cifar100-transfer-mini`
of other classes, and `cifar10-transfer-mini` of the same ones: 600 images to exchange outputs on, and, as its test
split, 400 to choose by; none of its 1,000 is in `cifar10-mini`."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {
    name: Path(__file__).parent / f"{name}.npz"
    for name in ("cifar10-mini", "cifar100-transfer-mini", "cifar10-transfer-mini")
}
