"""The shipped data: `cifar10-mini` and `cifar100-transfer-mini`, real images as .npz without pickle."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {name: Path(__file__).parent / f"{name}.npz" for name in ("cifar10-mini", "cifar100-transfer-mini")}
