"""The catalog of problems (RFC 9457): everything that the coordinator refuses, whoever asks.

`http/problem_responses.py` makes responses of them, `uploads/refusal_counts.py` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgestill.runtime.errors import EdgestillError

TYPE_PREFIX = "urn:edgestill:problem:"


@dataclass(frozen=True)
class ProblemKind:
    """What every problem of one kind shares: the HTTP status, a title, and what to do next."""

    status: int
    title: str
    hint: str


CATALOG: dict[str, ProblemKind] = {
    "malformed": ProblemKind(
        400, "The request is not well formed", "send what docs/federation.md says, in UTF-8"
    ),
    "digest_mismatch": ProblemKind(
        400,
        "The body is not what its digest says",
        "send the upload again, with `Content-Digest: sha-256=:…:` over the body as sent",
    ),
    "unauthorised": ProblemKind(
        401,
        "No valid token",
        "send `Authorization: Bearer TOKEN` with the token from enrolment, or enrol again with a new code",
    ),
    "code_refused": ProblemKind(
        403,
        "The enrolment code is unknown, used or expired",
        "ask the operator for a new code: `edgestill enrol --task TASK`",
    ),
    "token_not_set": ProblemKind(
        403,
        "The coordinator gives models to this machine alone while it has no dashboard token",
        "on the coordinator's machine `edgestill task export TASK --output FILE.safetensors --bundle DIR`, with its "
        "--data-dir; or serve with EDGESTILL_DASHBOARD_TOKEN set, and ask with that token",
    ),
    "foreign_device": ProblemKind(
        403, "The token belongs to another device", "send outputs and reports under your own device name only"
    ),
    "not_found": ProblemKind(
        404, "There is no such thing for this device", "ask for work again and use the names in the answer"
    ),
    "no_such_round": ProblemKind(
        404, "The device's task has no such round", "ask for work again and use the round in the answer"
    ),
    "no_such_task": ProblemKind(404, "There is no such task", "list the tasks with `edgestill task list`"),
    "no_model": ProblemKind(
        404,
        "The task has no such global model",
        "ask for the round `last`, or one that `edgestill task show TASK` lists as completed",
    ),
    "method_not_allowed": ProblemKind(
        405, "This address does not take this method", "see docs/federation.md for what it takes"
    ),
    "no_fitting_student": ProblemKind(
        409,
        "No student of the task fits the device",
        "start again with more --memory, or with an engine that is named there; else the task needs a smaller student",
    ),
    "not_selected": ProblemKind(
        409, "The device was not selected for the round", "ask for work and wait to be selected"
    ),
    "other_digest": ProblemKind(
        409,
        "The device has already uploaded other outputs for the round",
        "keep the first upload; ask for work for the next round",
    ),
    "task_exists": ProblemKind(
        409, "There is another task of this name", "choose another name; a task does not change once created"
    ),
    "late": ProblemKind(410, "The round no longer collects outputs", "drop them and ask for work again"),
    "task_finished": ProblemKind(410, "The task has no rounds left", "stop asking; there is nothing to do"),
    "length_required": ProblemKind(
        411, "The length of the body is unknown", "send `Content-Length`, not a chunked body"
    ),
    "too_large": ProblemKind(
        413,
        "The body is larger than this request allows",
        "send only the tensors of the task, uncompressed or zstd",
    ),
    "encoding": ProblemKind(
        415,
        "The body has a type or an encoding that is not read",
        "send `Content-Encoding: zstd` or none, and JSON where JSON is asked for",
    ),
    "range_not_satisfiable": ProblemKind(
        416, "The range lies outside the blob", "ask from 0, or drop the partial file"
    ),
    "misdirected": ProblemKind(
        421,
        "The coordinator does not answer to the name that was asked for",
        "use the address that `edgestill serve` printed, or start it with --allowed-hosts NAME",
    ),
    "wrong_outputs": ProblemKind(
        422,
        "The outputs are not those that the task asks for",
        "send exactly the task's tensors, shapes and precision, all values finite",
    ),
    "invalid": ProblemKind(
        422, "A field has a value that is not allowed", "correct the field that the detail names"
    ),
    "quota": ProblemKind(
        429, "The device stores more than it may", "ask the operator for a larger --quota-bytes"
    ),
    "header_too_large": ProblemKind(431, "The headers are too large", "send shorter headers"),
    "internal": ProblemKind(
        500, "The coordinator failed", "try again; if it stays, see the coordinator's log"
    ),
    "unavailable": ProblemKind(
        503, "The coordinator cannot answer now", "wait as long as `Retry-After` says and try again"
    ),
}


class Problem(EdgestillError):
    """A refusal of one kind of `CATALOG`; `detail` says what and where, `retry_after_s` when to come back."""

    def __init__(self, kind: str, detail: str | None = None, retry_after_s: float | None = None) -> None:
        entry = CATALOG[kind]
        self.kind = kind
        self.status = entry.status
        self.title = entry.title
        self.detail = entry.title if detail is None else detail
        self.retry_after_s = retry_after_s
        super().__init__(self.detail, entry.hint)

    def as_json(self) -> dict[str, str | int | None]:
        """The body of the answer. Source: RFC 9457."""
        return {
            "type": TYPE_PREFIX + self.kind,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "hint": self.hint,
        }
