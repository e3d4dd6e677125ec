"""A round's life as a pure state machine: `step(round, event, now_s, rules) → (round, effects)`.

collecting → aggregating → completed, or abandoned with a reason from either. Every phase that is not final has a
deadline, and a `Tick` past it ends the phase: a round that is ticked cannot hang, whoever disappears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

COLLECTING = "collecting"
AGGREGATING = "aggregating"
COMPLETED = "completed"
ABANDONED = "abandoned"
PHASES = (COLLECTING, AGGREGATING, COMPLETED, ABANDONED)
QUEUED_AT_MOST_S = 86_400.0
"""How long a round waits for its turn to be aggregated."""
FINAL_PHASES = frozenset({COMPLETED, ABANDONED})


@dataclass(frozen=True)
class Rules:
    """What a task asks of each of its rounds."""

    goal: int
    minimum: int
    over_selection: float
    deadline_s: float
    """Of the collection, from the opening of the round."""
    distil_deadline_s: float
    """Of aggregation and distillation, from their beginning."""

    @property
    def selected_at_most(self) -> int:
        # rounded first: 10 · 1.1 is 11.000000000000002
        return math.ceil(round(self.goal * self.over_selection, 9))


@dataclass(frozen=True)
class Accepted:
    """One upload that counts: SHA-256 of its body, and the private samples behind it."""

    digest: str
    samples: int


@dataclass(frozen=True)
class Round:
    """A round as it stands; times are seconds since the epoch."""

    number: int
    phase: str
    opened_s: float
    deadline_s: float
    """When the present phase ends at the latest; of a final phase, when its last one would have."""
    selected: frozenset[str] = frozenset()
    accepted: Mapping[str, Accepted] = field(default_factory=dict)
    """By device; uploads that were answered with "accepted" and will be aggregated."""
    begun_s: float | None = None
    """When aggregation began; None while the round waits for its turn."""
    reason: str | None = None
    """Why the round was abandoned."""
    published: str | None = None
    """Digest of the blob with the round's global outputs, once completed."""

    @property
    def final(self) -> bool:
        return self.phase in FINAL_PHASES

    def collects(self, now_s: float) -> bool:
        """Whether uploads still count."""
        return self.phase == COLLECTING and now_s < self.deadline_s

    @property
    def accepted_in_order(self) -> tuple[str, ...]:
        """The devices to aggregate, by name: whatever order they came in."""
        return tuple(sorted(self.accepted))


@dataclass(frozen=True)
class Ask:
    """A device that meets its conditions asks for work."""

    device: str


@dataclass(frozen=True)
class Offer:
    """A device offers an upload that has been read, decoded and found in order."""

    device: str
    digest: str
    samples: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Begun:
    """Somebody starts on step 5, for the first time or once more."""


@dataclass(frozen=True)
class Published:
    """Step 5 has ended with a blob of global outputs."""

    digest: str


@dataclass(frozen=True)
class Failed:
    """Step 5 has failed, or the operator has stopped the round."""

    reason: str


@dataclass(frozen=True)
class Selected:
    """The device takes part; it has not uploaded yet."""

    device: str


@dataclass(frozen=True)
class AcceptedUpload:
    """The upload counts, once, however often it was offered."""

    device: str
    digest: str


@dataclass(frozen=True)
class Refusal:
    """The offer does not count; `kind` is one of the catalog of problems."""

    kind: str


@dataclass(frozen=True)
class Aggregate:
    """The collection has ended; step 5 is to run over these devices, in this order."""

    devices: tuple[str, ...]


@dataclass(frozen=True)
class Completed:
    published: str


@dataclass(frozen=True)
class Abandoned:
    reason: str


Event = Ask | Offer | Tick | Begun | Published | Failed
Effect = Selected | AcceptedUpload | Refusal | Aggregate | Completed | Abandoned


def open_round(number: int, rules: Rules, now_s: float) -> Round:
    """A round that begins to collect; numbers count from 1."""
    return Round(number, COLLECTING, opened_s=now_s, deadline_s=now_s + rules.deadline_s)


def step(round: Round, event: Event, now_s: float, rules: Rules) -> tuple[Round, tuple[Effect, ...]]:
    """The round after one event, and what has to be done about it.

    Events that no longer matter, such as results for a round that has ended, change nothing and have no effect.
    """
    match event:
        case Ask(device):
            return _ask(round, device, now_s, rules)
        case Offer(device, digest, samples):
            return _offer(round, device, Accepted(digest, samples), now_s, rules)
        case Tick():
            return _tick(round, now_s, rules)
        case Begun() if round.phase == AGGREGATING and round.begun_s is None and now_s < round.deadline_s:
            # the first time only: a step 5 that takes its coordinator down with it must end, too
            return replace(round, begun_s=now_s, deadline_s=now_s + rules.distil_deadline_s), ()
        case Published(digest) if round.phase == AGGREGATING:
            return replace(round, phase=COMPLETED, published=digest), (Completed(digest),)
        case Failed(reason) if not round.final:
            return _abandon(round, reason)
    return round, ()


def _ask(round: Round, device: str, now_s: float, rules: Rules) -> tuple[Round, tuple[Effect, ...]]:
    if not round.collects(now_s) or device in round.accepted:
        return round, ()
    if device not in round.selected:
        if len(round.selected) >= rules.selected_at_most:
            return round, ()
        round = replace(round, selected=round.selected | {device})
    return round, (Selected(device),)


def _offer(
    round: Round, device: str, upload: Accepted, now_s: float, rules: Rules
) -> tuple[Round, tuple[Effect, ...]]:
    # first what was promised: a device whose answer got lost is told the same again, even after the deadline
    if device in round.accepted:
        if round.accepted[device].digest == upload.digest:
            return round, (AcceptedUpload(device, upload.digest),)
        return round, (Refusal("other_digest"),)
    if device not in round.selected:
        return round, (Refusal("not_selected"),)
    if not round.collects(now_s):
        return round, (Refusal("late"),)
    round = replace(round, accepted={**round.accepted, device: upload})
    effects: tuple[Effect, ...] = (AcceptedUpload(device, upload.digest),)
    if len(round.accepted) >= rules.goal:
        round, more = _aggregate(round, now_s)
        effects += more
    return round, effects


def _tick(round: Round, now_s: float, rules: Rules) -> tuple[Round, tuple[Effect, ...]]:
    if round.final or now_s < round.deadline_s:
        return round, ()
    if round.phase == AGGREGATING and round.begun_s is None:
        return _abandon(round, f"aggregation did not begin within {QUEUED_AT_MOST_S / 3600:g} hours")
    if round.phase == AGGREGATING:
        return _abandon(round, f"aggregation took longer than {rules.distil_deadline_s:g} s")
    if len(round.accepted) >= rules.minimum:
        return _aggregate(round, now_s)
    return _abandon(
        round,
        f"{len(round.accepted)} of at least {rules.minimum} uploads "
        f"({len(round.selected)} devices selected) in {rules.deadline_s:g} s",
    )


def _aggregate(round: Round, now_s: float) -> tuple[Round, tuple[Effect, ...]]:
    round = replace(round, phase=AGGREGATING, deadline_s=now_s + QUEUED_AT_MOST_S)
    return round, (Aggregate(round.accepted_in_order),)


def _abandon(round: Round, reason: str) -> tuple[Round, tuple[Effect, ...]]:
    return replace(round, phase=ABANDONED, reason=reason), (Abandoned(reason),)
