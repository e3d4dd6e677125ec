"""A device's side of a round as a pure state machine: what to do next, and what follows from how it went.

`step(state, event)` gives the next state and the effects that the shell (`device.py`) carries out in order. The
last effect always leads to another event, until the task is finished. Nothing here reads a clock or a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgestill.runtime.errors import StateError

PHASES = (
    "idle",
    "waiting",
    "fetching",
    "training",
    "packing",
    "uploading",
    "uploaded",
    "keeping",
    "finished",
)
WAITING_S = 30.0
"""Between two looks at conditions that are not met."""
AGAIN_S = 5.0
"""Before asking again when the coordinator offers the round that this device is done with."""

_ROUND = re.compile(r"[a-z][a-z0-9-]{0,39}\.[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Work:
    """A round that this device is selected for; `deadline_s` on the device's clock, in seconds of the epoch."""

    round: str
    number: int
    deadline_s: float
    global_outputs: str | None
    size_bytes: int
    seed: int

    @classmethod
    def from_json(cls, work: Mapping[str, Any], now_s: float) -> Work:
        """WORK of docs/federation.md, whose deadline is in seconds from now.

        Errors: StateError for anything else; names become file names, so their form matters.
        """
        try:
            name, digest = work["round"], work.get("global_outputs")
            parsed = cls(
                round=str(name),
                number=int(work["number"]),
                deadline_s=now_s + float(work["deadline_s"]),
                global_outputs=None if digest is None else str(digest),
                size_bytes=int(work.get("size_bytes") or 0),
                seed=int(work["seed"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StateError(f"the coordinator's work is not readable: {error!r}") from error
        parsed.check()
        return parsed

    def check(self) -> None:
        """Errors: StateError for a name, a digest or a number out of its form."""
        named = self.global_outputs is None or _DIGEST.fullmatch(self.global_outputs)
        if not _ROUND.fullmatch(self.round) or not named:
            raise StateError(f"round {self.round[:60]!r} or its global outputs have no proper name")
        if not 0 <= self.seed < 2**63 or self.size_bytes < 0 or not abs(self.deadline_s) < 1e12:
            raise StateError(f"round {self.round}: seed, size or deadline are out of range")


@dataclass(frozen=True)
class Participant:
    """Where a device stands. `work` is None outside of a round; `upload` is the digest of the packed body."""

    phase: str = "idle"
    work: Work | None = None
    upload: str | None = None
    content_encoding: str = "identity"
    report: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    """Why it waits, or why the upload came to nothing."""
    last_round: str | None = None
    """The round that it was done with last, by an upload or without."""
    completed: int = 0
    """Rounds with an accepted upload."""
    privacy_spent: float | None = 0.0
    """What may have left the device so far, as `privacy.spend` adds it up; None: something left without noise."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Participant:
        """Errors: StateError for anything that `as_json` would not give."""
        try:
            work = value["work"]
            parsed = cls(
                **{
                    **value,
                    "work": None if work is None else Work(**work),
                    "reasons": tuple(value["reasons"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise StateError(f"the journal is not readable: {error!r}") from error
        needs_work = parsed.phase in _IN_ROUND
        if parsed.phase not in PHASES or (parsed.work is None and needs_work):
            raise StateError(f"the journal's phase {parsed.phase!r} does not fit the rest of it")
        if parsed.work is not None:
            parsed.work.check()
        return parsed


_IN_ROUND = ("fetching", "training", "packing", "uploading", "uploaded", "keeping")
_BEFORE_DEADLINE = ("waiting", "fetching", "training", "packing", "uploading")


# Events: what happened. Where `now_s` stands, a round whose deadline has passed is given up.


@dataclass(frozen=True)
class Checked:
    """The conditions were read; `unmet` are the reasons against taking part now."""

    unmet: tuple[str, ...]
    now_s: float


@dataclass(frozen=True)
class Offered:
    """The coordinator gave work."""

    work: Work
    now_s: float


@dataclass(frozen=True)
class NothingYet:
    """The coordinator has no work for this device now."""


@dataclass(frozen=True)
class Fetched:
    """Everything that the round needs is here."""

    now_s: float


@dataclass(frozen=True)
class Trained:
    """Local training is over and its state is kept; `report` is what it measured."""

    report: Mapping[str, Any]
    now_s: float


@dataclass(frozen=True)
class Held:
    """Training stopped, after a checkpoint, because conditions are not met any more."""

    reasons: tuple[str, ...]
    now_s: float


@dataclass(frozen=True)
class Packed:
    """The body lies in the work folder; `report` is added to the round's."""

    digest: str
    content_encoding: str
    report: Mapping[str, Any]
    now_s: float
    privacy_spent: float | None = None
    """With this body."""


@dataclass(frozen=True)
class Accepted:
    """The coordinator has the upload."""


@dataclass(frozen=True)
class Ticked:
    """Time passed without news, for example while the coordinator was out of reach."""

    now_s: float


@dataclass(frozen=True)
class RoundGone:
    """The round cannot be finished: the coordinator closed or refused it, or training failed."""

    reason: str


@dataclass(frozen=True)
class Settled:
    """State and files of a round that is over are in order."""


@dataclass(frozen=True)
class TaskFinished:
    """There are no rounds left."""


Event = (
    Checked | Offered | NothingYet | Fetched | Trained | Held | Packed | Accepted | Ticked | RoundGone
    | Settled | TaskFinished
)  # fmt: skip


# Effects: what the shell does now.


@dataclass(frozen=True)
class CheckConditions:
    """Wait, then read the conditions: → Checked."""

    after_s: float = 0.0


@dataclass(frozen=True)
class AskForWork:
    """→ Offered, NothingYet, Ticked or TaskFinished."""


@dataclass(frozen=True)
class Fetch:
    """Download what the round needs: → Fetched, RoundGone or Ticked."""

    work: Work


@dataclass(frozen=True)
class Train:
    """Train, or go on training from the checkpoint: → Trained, Held, RoundGone or Ticked."""

    work: Work


@dataclass(frozen=True)
class Pack:
    """Make the body and keep it: → Packed or RoundGone."""

    work: Work


@dataclass(frozen=True)
class Upload:
    """Send the kept body, which has this digest: → Accepted, RoundGone or Ticked."""

    work: Work
    digest: str
    content_encoding: str


@dataclass(frozen=True)
class Settle:
    """Send the report, carry the trained state over, remove the round's files: → Settled."""

    work: Work
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Discard:
    """Remove the round's files; leads to no event."""

    work: Work
    reason: str


@dataclass(frozen=True)
class KeepTrained:
    """Training has come to its end, and only the upload came to nothing: → Settled.

    Carry the trained state over where the device's model is its own (every exchange but `parameters`), and remove the
    round's files.
    """

    work: Work
    reason: str


Effect = CheckConditions | AskForWork | Fetch | Train | Pack | Upload | Settle | Discard | KeepTrained


def step(state: Participant, event: Event) -> tuple[Participant, tuple[Effect, ...]]:
    """The state after an event, and what to do now.

    An event that does not fit the phase changes nothing and leads to what there was to do anyway.

    No effect of a round is given after its deadline, but for settling what was accepted in time, and for keeping what
    training has come to.
    """
    phase, work = state.phase, state.work
    if phase == "finished":
        return state, ()
    now_s = getattr(event, "now_s", None)
    if work is not None and phase in _BEFORE_DEADLINE:
        if now_s is not None and now_s >= work.deadline_s:
            trained = phase in ("packing", "uploading") or isinstance(event, Trained)
            return _give_up(state, "its deadline passed", trained)
        if isinstance(event, RoundGone):
            return _give_up(state, event.reason, phase == "uploading")
    match event:
        case TaskFinished() if phase in ("idle", "waiting"):
            return replace(_outside(state), phase="finished"), ()
        case Checked(unmet) if phase in ("idle", "waiting"):
            if unmet:
                state = replace(state, phase="waiting", reasons=unmet)
            elif work is not None:
                state = replace(state, phase="fetching", reasons=())
            else:
                return replace(state, phase="idle", reasons=()), (AskForWork(),)
        case Offered(offer) if phase == "idle":
            if offer.round == state.last_round or offer.deadline_s <= event.now_s:
                return state, (CheckConditions(AGAIN_S),)
            state = replace(state, phase="fetching", work=offer)
        case Fetched() if phase == "fetching":
            state = replace(state, phase="training")
        case Trained(report) if phase == "training":
            state = replace(state, phase="packing", report=report)
        case Held(reasons) if phase == "training":
            state = replace(state, phase="waiting", reasons=reasons)
        case Held(reasons) | Checked(reasons) if phase == "uploaded" and reasons:  # training alone waits, too
            return replace(state, reasons=reasons), (CheckConditions(WAITING_S),)
        case Checked() if phase == "uploaded":
            state = replace(state, reasons=())
        case Packed(digest, encoding, report, _, spent) if phase == "packing":
            state = replace(
                state,
                phase="uploading",
                upload=digest,
                content_encoding=encoding,
                report={**state.report, **report},
                privacy_spent=spent,
            )
        case Accepted() if phase == "uploading":
            state = replace(state, phase="uploaded")
        case Settled() if phase in ("uploaded", "keeping") and work is not None:
            completed = state.completed + (phase == "uploaded")
            state = replace(_outside(state), last_round=work.round, completed=completed)
            return state, (CheckConditions(),)
    return state, resume(state)


def resume(state: Participant) -> tuple[Effect, ...]:
    """What to do in a state, whatever led to it: after a restart, and again after a failure that may pass."""
    work = state.work
    if state.phase == "finished":
        return ()
    if state.phase == "waiting":
        return (CheckConditions(WAITING_S),)
    if work is None:
        return (CheckConditions(),)
    if state.phase == "fetching":
        return (Fetch(work),)
    if state.phase == "training":
        return (Train(work),)
    if state.phase == "packing":
        return (Pack(work),)
    if state.phase == "uploading" and state.upload is not None:
        return (Upload(work, state.upload, state.content_encoding),)
    if state.phase == "keeping":
        return (KeepTrained(work, "; ".join(state.reasons)),)
    return (Settle(work, state.report),)


def _give_up(state: Participant, reason: str, trained: bool) -> tuple[Participant, tuple[Effect, ...]]:
    assert state.work is not None
    if trained:  # a phase of its own: the files must not be removed by a restart before they are carried over
        after = replace(state, phase="keeping", reasons=(reason,))
        return after, resume(after)
    after = replace(_outside(state), last_round=state.work.round)
    return after, (Discard(state.work, reason), CheckConditions())


def _outside(state: Participant) -> Participant:
    return replace(
        state, phase="idle", work=None, upload=None, content_encoding="identity", report={}, reasons=()
    )
