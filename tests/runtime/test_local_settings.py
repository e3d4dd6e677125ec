"""What a task asks of local training: the contract's defaults, and wrong fields are named."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_settings_are_those_of_the_contract() -> None:
    """docs/federation.md, row `local`."""
    row = re.search(r"\| `local` \|[^{]*(\{[^}]*\})", (ROOT / "docs/federation.md").read_text())
    documented = json.loads(row[1])
    mine = asdict(LocalSettings())
    assert documented == mine
    assert LocalSettings.from_json(documented) == LocalSettings() == LocalSettings.from_json({"later": 1})
    changed = LocalSettings.from_json({"epochs": 3, "momentum": 0, "augment": "flip,crop"})
    assert (changed.epochs, changed.momentum, changed.augmentations) == (3, 0.0, ("flip", "crop"))


@pytest.mark.parametrize(
    "bad",
    [
        *({"epochs": value} for value in (1.5, True, 0)),
        *({"alpha": value} for value in ("1", float("nan"), 1.01)),
        *({"augment": value} for value in (None, "blur")),
        {"momentum": 1},
        {"checkpoint_every": 0},
    ],
)
def test_settings_of_another_type_or_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"local.{next(iter(bad))}"):
        LocalSettings.from_json(bad)
