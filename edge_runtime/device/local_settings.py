"""What a task asks of every device's training: field `local` of a task. Form: docs/federation.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgestill.runtime.data.augmentation import AUGMENTATIONS
from edgestill.runtime.fields import Node


@dataclass(frozen=True)
class LocalSettings:
    """A number that the bundle's step does not take (momentum for AdamW, temperature without KL divergence) is not
    used. `checkpoint_every` counts steps."""

    epochs: int = 1
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    alpha: float = 0.5
    temperature: float = 4.0
    logit_share: float = 0.5
    transfer_fraction: float = 0.5
    augment: str = ""
    """Names of augmentations, separated by commas, as `edgestill train --augment` takes them."""
    checkpoint_every: int = 50

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> LocalSettings:
        """From a task, with defaults for what is left out; fields that this version does not know are ignored.

        Errors: UsageError naming the field, its value, and what is allowed.
        """
        default, node = cls(), Node(given, "local")

        def whole(name: str, most: int) -> int:
            return node.get(name, getattr(default, name)).integer(1, most)

        def number(name: str, least: float, most: float, below: bool = False) -> float:
            return node.get(name, getattr(default, name)).number(least, most, below)

        augment = node.get("augment", default.augment).text()
        if set(augment.split(",")) - {"", *AUGMENTATIONS}:
            raise node.get("augment").error(f"some of {', '.join(AUGMENTATIONS)}, separated by commas")
        return cls(
            epochs=whole("epochs", 10_000),
            learning_rate=number("learning_rate", 0.0, 1e3),
            momentum=number("momentum", 0.0, 1.0, below=True),
            weight_decay=number("weight_decay", 0.0, 1e3),
            alpha=number("alpha", 0.0, 1.0),
            temperature=number("temperature", 1e-3, 1e3),
            logit_share=number("logit_share", 0.0, 1.0),
            transfer_fraction=number("transfer_fraction", 0.0, 1.0, below=True),
            augment=augment,
            checkpoint_every=whole("checkpoint_every", 1_000_000),
        )

    @property
    def augmentations(self) -> tuple[str, ...]:
        return tuple(name for name in self.augment.split(",") if name)
