"""Which uploads agree with the others: reversed, shuffled or random ones do not, however well they are scaled.

A coordinate-wise median or trimmed mean is moved by hostile uploads even when they are outvoted: a fifth of reversed
uploads shifts every coordinate towards zero by a third of the devices' spread, and devices with skewed data spread
widely. So they are left out first. Threshold: Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers" (distances
from the median in median absolute deviations).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FEWEST = 4
"""Of fewer uploads nobody can say which ones are the odd ones out."""
_DEVIATIONS = 3.0
_CONSISTENT = 1.4826
"""Median absolute deviations to standard deviations of a normal distribution."""
_LEAST_GAP = 0.1
"""Cosines that differ by less are alike, however close together the others lie."""


def agreement(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Cosine of each upload [n] with the median of all, coordinate by coordinate; 0 where an upload is all zeros.

    `blocks` are parts of all uploads, [n, any, any]; together they are everything that is compared.
    """
    products, own, others = 0.0, 0.0, 0.0
    for block in blocks:
        flat = block.reshape(len(block), -1)
        middle = np.median(flat, axis=0)
        products += np.sum(flat * middle, axis=1)
        own += np.sum(flat * flat, axis=1)
        others += float(np.sum(middle * middle))
    lengths = np.sqrt(np.asarray(own) * others)
    return np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def odd_ones(cosines: np.ndarray) -> np.ndarray:
    """Which uploads [n] lie more than three robust standard deviations below the median agreement; fewer than half."""
    if len(cosines) < FEWEST:
        return np.zeros(len(cosines), bool)
    middle = np.median(cosines)
    spread = _CONSISTENT * np.median(np.abs(cosines - middle))
    return cosines < middle - max(_DEVIATIONS * spread, _LEAST_GAP)
