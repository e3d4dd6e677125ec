"""What a simulated coordinator runs on: a clock that only the simulation moves, and entropy from the seed."""

from __future__ import annotations

import hashlib


class VirtualClock:
    """Seconds since the epoch that pass when the simulation says so; calling it reads it."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance_to(self, moment_s: float) -> None:
        """Never backwards."""
        self.now_s = max(self.now_s, moment_s)


class SeededEntropy:
    """Bytes that look random and follow from a seed: names and tokens are the same in every run.

    For simulations only: a token that follows from a seed protects nothing.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn = 0

    def __call__(self, count: int) -> bytes:
        # one block an address, extended by SHAKE to any length
        block = hashlib.shake_256(f"edgestill simulation {self._seed} {self._drawn}".encode())
        self._drawn += 1
        return block.digest(count)
