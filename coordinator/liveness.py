"""How a device stands: what it does for the present round, and since when nothing was heard of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgestill.coordinator.rounds.round import COLLECTING
from edgestill.coordinator.store.overview import RoundOverview
from edgestill.coordinator.store.records import DeviceRecord

TRAINING, UPLOADING, UPLOADED, WAITING, SILENT, DONE, REVOKED = STATES = (
    "training", "uploading", "uploaded", "waiting", "silent", "done", "revoked",
)  # fmt: skip


_CLOCKS_S = 5.0
"""By which the clocks of two replicas may differ."""


@dataclass(frozen=True)
class Liveness:
    """When a device counts as silent, and whose uploads are arriving at this replica."""

    now_s: float
    silent_after_s: float
    arriving: Collection[str] = ()

    @classmethod
    def at(cls, now_s: float, long_poll_s: float, arriving: Collection[str]) -> Liveness:
        """With twice as long as a device that waits lets a request for work stand, and a minute for what goes wrong."""
        return cls(now_s, 2 * long_poll_s + 60, frozenset(arriving))

    def state_of(self, device: DeviceRecord, present: RoundOverview | None, ended: bool) -> str:
        """One of STATES; `present` is the task's last round.

        A device that trains need not be heard: it counts as training until it uploads or the round no longer
        collects. After the task has ended all are done.
        """
        if device.revoked:
            return REVOKED
        if device.name in self.arriving:
            return UPLOADING
        if ended:
            return DONE
        if present is not None and present.phase == COLLECTING and device.name in present.selected:
            # who was selected has asked since the round opened, so it was heard
            heard = device.seen_s > present.opened_s - _CLOCKS_S
            if heard and device.name not in present.accepted and self.now_s < present.deadline_s:
                return TRAINING
        if self.now_s - device.seen_s > self.silent_after_s:
            return SILENT
        if present is not None and present.phase == COLLECTING and device.name in present.accepted:
            return UPLOADED
        return WAITING
