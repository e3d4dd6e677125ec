"""What a task asks of every device's training: field `local` of a task. Form: docs/federation.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgestill.runtime.data.augmentation import AUGMENTATIONS
from edgestill.runtime.fields import Node
from edgestill.runtime.training.hyperparameters import (
    CHECKPOINT_EVERY,
    TRANSFER_FRACTION,
    TrainingSettings,
    read_training,
)


@dataclass(frozen=True)
class LocalSettings(TrainingSettings):
    """`checkpoint_every` counts steps."""

    transfer_fraction: float = TRANSFER_FRACTION.default
    augment: str = ""
    """Names of augmentations, separated by commas, as `edgestill train --augment` takes them."""
    checkpoint_every: int = int(CHECKPOINT_EVERY.default)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> LocalSettings:
        """From a task, with defaults for what is left out; fields that this version does not know are ignored.

        Errors: UsageError naming the field, its value, and what is allowed.
        """
        default, node = cls(), Node(given, "local")
        augment = node.get("augment", default.augment).text()
        if set(augment.split(",")) - {"", *AUGMENTATIONS}:
            raise node.get("augment").error(f"some of {', '.join(AUGMENTATIONS)}, separated by commas")
        return cls(
            **read_training(node),
            transfer_fraction=TRANSFER_FRACTION.read(
                node.get("transfer_fraction", default.transfer_fraction)
            ),
            augment=augment,
            checkpoint_every=CHECKPOINT_EVERY.read(node.get("checkpoint_every", default.checkpoint_every)),
        )

    @property
    def augmentations(self) -> tuple[str, ...]:
        return tuple(name for name in self.augment.split(",") if name)
