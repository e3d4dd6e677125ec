"""How fast this machine multiplies matrices: the bound that a training step's share of the peak refers to."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import numpy as np

SIZES = (256, 512, 1024)
REPEATS = 3


def matrix_products(threads: int) -> dict[str, Callable[[np.ndarray, np.ndarray], object]]:
    """Products of two float32 matrices, by library; NumPy's threads are set by environment."""
    products: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {"numpy": np.matmul}
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        products["torch"] = lambda a, b: torch.mm(torch.from_numpy(a), torch.from_numpy(b))
    return products


class PeakMeter:
    """Measures the best matrix-product rate again and again; a machine's clock is not constant."""

    def __init__(self, threads: int) -> None:
        generator = np.random.default_rng(0)
        self._products = matrix_products(threads)
        self._operands = {
            size: generator.standard_normal((2, size, size), dtype=np.float32) for size in SIZES
        }

    def measure(self) -> float:
        """Best rate over all libraries and sizes in floating-point operations a second (2·n³ a product)."""
        best = 0.0
        for product in self._products.values():
            for size, (a, b) in self._operands.items():
                for _ in range(REPEATS):
                    started = time.perf_counter()
                    product(a, b)
                    best = max(best, 2 * size**3 / (time.perf_counter() - started))
        return best
