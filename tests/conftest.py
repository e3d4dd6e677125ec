"""What every test shares: one thread a library, and the tiers in the order in which they are cheap."""

from __future__ import annotations

import os

import pytest

# Two workers on two cores: a library that starts a thread a core would only fight its neighbour.
# Set before any test module imports numpy or torch.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

TIERS = ("tiny", "unit", "contract", "simulation", "device", "long")


def tier(item: pytest.Item) -> int:
    """Index in TIERS of the dearest tier that the test is marked with; `unit` where it has none."""
    marked = [index for index, name in enumerate(TIERS) if item.get_closest_marker(name)]
    return max(marked, default=TIERS.index("unit"))


# First of all plugins, so that `-m unit` already sees the tier given here.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives unmarked tests the tier `unit`; runs cheap tiers first, so that a plain mistake shows early."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in TIERS):
            item.add_marker(pytest.mark.unit)
    items.sort(key=tier)
