"""What devices send and get as JSON; see docs/federation.md for the fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST_BYTES = 2**53 - 1


def _printable(text: str) -> str:
    # a NUL or a lone surrogate would fail in the database, a control character in the log
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


Text = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]
Bytes = Annotated[int, Field(ge=0, le=LARGEST_BYTES)]
Share = Annotated[float, Field(ge=0, le=1)]


class Form(BaseModel):
    """Unknown fields are ignored, so that a newer device can talk to an older coordinator."""

    model_config = ConfigDict(extra="ignore", strict=False, frozen=True)


class Info(Form):
    """What a device says about itself at enrolment."""

    name: Text = ""
    engines: list[Text] = Field(min_length=1, max_length=20)
    memory_bytes: Bytes | None = None
    processor: Text = ""
    version: Text = ""


class Enrolment(Form):
    """An enrolment code and the device that uses it."""

    code: Text = Field(min_length=1)
    device: Info


class Enrolled(BaseModel):
    """The device's name and token; the token is shown this once."""

    device: str
    token: str
    task: str


class Assignment(BaseModel):
    """The task without its students, and the student that this device trains."""

    task: dict[str, Any]
    student: dict[str, Any]


class Status(Form):
    """How the device is."""

    battery: Share | None = None
    charging: bool | None = None
    temperature_c: Annotated[float, Field(ge=-300, le=1000)] | None = None
    memory_free_bytes: Bytes | None = None
    metered: bool | None = None


class Work(BaseModel):
    """A round that the device is selected for; `deadline_s` is the seconds left."""

    round: str
    number: int
    deadline_s: float
    global_outputs: str | None
    size_bytes: int | None
    seed: int


class Standing(BaseModel):
    """How far the task's present round is, for a device that waits; nulls before the first round.

    `best_round`: whose global model is the best so far on the task's validation images; null without such images.
    """

    round: str | None
    phase: str | None
    uploads: int
    goal: int
    seconds_left: float | None
    best_round: int | None = None


class Figures(Form):
    """Accuracy on the device's own classes and on all, and the loss."""

    t_priv: Share | None = None
    t_uni: Share | None = None
    loss: Number | None = None


class Report(Form):
    """What a device reports about a round; every field is optional."""

    engine: Text | None = None
    step_ms: Annotated[float, Field(ge=0, le=1e9)] | None = None
    peak_rss_bytes: Bytes | None = None
    epsilon: Annotated[float, Field(ge=0, le=1e300)] | None = None
    max_error: Annotated[float, Field(ge=0, le=1e300)] | None = None
    bytes_up: Bytes | None = None
    bytes_down: Bytes | None = None
    samples: Bytes | None = None
    class_counts: Annotated[list[Bytes], Field(max_length=10_000)] | None = None
    before: Figures | None = None
    after: Figures | None = None
    alone: Figures | None = None
    """Of the same student trained on the device's own data alone, for as long, where the device compares."""
