"""The checks of one upload, of its head before and of its body after it is read, without any store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.store.records import UploadRecord
from edgestill.coordinator.task.task import Task
from edgestill.runtime.device import outputs
from edgestill.runtime.errors import WireError

_ROUND = re.compile(r"([a-z][a-z0-9-]{0,39})\.([1-9][0-9]{0,8})")
_SAMPLES = re.compile(r"[1-9][0-9]{0,8}")
_MOST_SAMPLES = 10**9


@dataclass(frozen=True)
class UploadTicket:
    """An upload that may be read: at most `max_bytes`."""

    task: Task
    number: int
    device: str
    max_bytes: int
    expected: Mapping[str, tuple[int, ...]]
    already_there: bool
    """Whether the very same upload was accepted before."""


def parse_round_name(name: str, task: str) -> int:
    """The number of a round of the task. Errors: Problem `no_such_round`."""
    match = _ROUND.fullmatch(name)
    if match is None or match[1] != task:
        raise Problem("no_such_round", f"{name[:60]!r} is no round of task {task}")
    return int(match[2])


def check_head(
    content_length: int | None, content_digest: str | None, content_encoding: str, max_bytes: int
) -> None:
    """What the request's head alone decides. Errors: Problem."""
    if content_length is None:
        raise Problem("length_required")
    if content_digest is None:
        raise Problem("malformed", "the upload has no Content-Digest with a sha-256")
    if content_encoding not in outputs.CONTENT_ENCODINGS:
        raise Problem("encoding", f"Content-Encoding {content_encoding[:40]!r} is not read")
    if content_length > max_bytes:
        raise Problem("too_large", f"the body has {content_length} bytes, at most {max_bytes} are taken")


def read_upload(
    ticket: UploadTicket, body: bytes | bytearray, content_digest: str, content_encoding: str, now_s: float
) -> UploadRecord:
    """The upload that a body carries, fully decoded once: what is accepted can be aggregated.

    Errors: Problem `digest_mismatch`, `too_large`, `encoding`, `wrong_outputs`, `malformed`.
    """
    check_digest(body, content_digest)
    try:
        _, metadata = outputs.unpack(body, content_encoding, ticket.expected, source="the upload")
    except outputs.UnknownEncoding as error:
        raise Problem("encoding", error.message) from error
    except outputs.WrongOutputs as error:
        raise Problem("wrong_outputs", error.message) from error
    except WireError as error:
        raise Problem("malformed", error.message) from error
    samples, counts = metadata.get("samples", ""), metadata.get("class_counts")
    if not _SAMPLES.fullmatch(samples):
        raise Problem("wrong_outputs", "metadata `samples` is not a whole number from 1 to 999999999")
    class_counts = None if counts is None else _parse_class_counts(counts, ticket.task.classes)
    return UploadRecord(
        ticket.device, content_digest, len(body), content_encoding, int(samples), class_counts, now_s
    )


def check_digest(body: bytes | bytearray, content_digest: str) -> None:
    """Errors: Problem `digest_mismatch`."""
    if hashlib.sha256(body).hexdigest() != content_digest:
        raise Problem("digest_mismatch", "the body's SHA-256 is not that of Content-Digest")


def _parse_class_counts(text: str, classes: int) -> tuple[int, ...]:
    try:
        counts = json.loads(text)
    except (ValueError, RecursionError):
        counts = None
    if (
        not isinstance(counts, list)
        or len(counts) != classes
        or not all(type(count) is int and 0 <= count < _MOST_SAMPLES for count in counts)
    ):
        raise Problem("wrong_outputs", f"metadata `class_counts` is not a list of {classes} counts")
    return tuple(counts)
