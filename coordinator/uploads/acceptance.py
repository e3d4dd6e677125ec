"""Uploads from their head to their acknowledgement: the blob is durable, then the commit, then the answer.

Uploads that wait for the database at the same time share one commit. Each of them is stepped through the round on its
own, so that one that is refused undoes no other; a crash loses only what nobody was told of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgestill.coordinator.problems import Problem
from edgestill.coordinator.rounds.progress import Progress
from edgestill.coordinator.rounds.round import Effect, Offer, Refusal, step
from edgestill.coordinator.store.blobs import Blobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.group_commit import GroupCommit
from edgestill.coordinator.store.records import DeviceRecord, RoundRecord, UploadRecord
from edgestill.coordinator.store.transaction import Transaction
from edgestill.coordinator.uploads.checks import (
    UploadTicket,
    check_digest,
    check_head,
    parse_round_name,
    read_upload,
)
from edgestill.runtime.device.outputs import largest_body


@dataclass(frozen=True)
class _Arrived:
    """An upload whose bytes are durable and found good."""

    ticket: UploadTicket
    upload: UploadRecord


class Uploads:
    """Checks, stores and accepts uploads; `quota_bytes` is what one device may store in a task."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        progress: Progress,
        clock: Callable[[], float],
        quota_bytes: int,
        max_body_bytes: int,
    ) -> None:
        self._store, self._blobs, self._progress, self._clock = store, blobs, progress, clock
        self._quota_bytes, self._max_body_bytes = quota_bytes, max_body_bytes
        self._accept: GroupCommit[_Arrived, str | Problem] = GroupCommit(self._accept_all)

    def check(
        self,
        device: DeviceRecord,
        round_name: str,
        content_length: int | None,
        content_digest: str | None,
        content_encoding: str,
    ) -> UploadTicket:
        """Everything that can be refused before a body is read. Errors: Problem."""
        number = parse_round_name(round_name, device.task)
        with self._store.read() as transaction:
            task = self._progress.task(transaction, device.task)
            expected = task.expected_upload()
            max_bytes = min(largest_body(expected), self._max_body_bytes)
            check_head(content_length, content_digest, content_encoding, max_bytes)
            assert content_length is not None and content_digest is not None
            record = transaction.round_head(task.name, number)
            part = transaction.part_in_round(task.name, number, device.name)
        if record is None:
            raise Problem("no_such_round", f"round {round_name} has not been opened")
        # a rehearsal, with this device alone: the real step is taken under the lock, once the body is known to be good
        round = replace(record.round, selected=part.selected, accepted=part.accepted)
        _, effects = step(round, Offer(device.name, content_digest, 1), self._clock(), task.rules())
        refusal = _refusal(effects, record, device.name)
        if refusal is not None:
            raise refusal
        if not part.accepted and part.stored_bytes + content_length > self._quota_bytes:
            raise Problem("quota", f"device {device.name} has stored {part.stored_bytes} bytes", 3600.0)
        return UploadTicket(task, number, device.name, max_bytes, expected, bool(part.accepted))

    def take(
        self, ticket: UploadTicket, body: bytes | bytearray, content_digest: str, content_encoding: str
    ) -> str:
        """Accepts the body that a ticket was given for: `created`, or `same`; durable when this returns.

        Errors: Problem; BlobError and StoreError when it could not be kept.
        """
        if ticket.already_there:
            check_digest(body, content_digest)
            return "same"
        upload = read_upload(ticket, body, content_digest, content_encoding, self._clock())
        self._blobs.put(body, content_digest)
        answer = self._accept(_Arrived(ticket, upload))
        if isinstance(answer, Problem):
            raise answer
        return answer

    def _accept_all(self, arrived: Sequence[_Arrived]) -> list[str | Problem]:
        by_round: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for index, one in enumerate(arrived):
            by_round[one.ticket.task.name, one.ticket.number].append(index)
        answers: dict[int, str | Problem] = {}
        records = []
        with self._store.write() as transaction:
            for _, indices in sorted(by_round.items()):  # in one order of locks everywhere
                record, said = self._accept_in_round(transaction, [arrived[index] for index in indices])
                records.append(record)
                answers.update(zip(indices, said, strict=True))
        for record in records:
            self._progress.remember(record)
        return [answers[index] for index in range(len(arrived))]

    def _accept_in_round(
        self, transaction: Transaction, arrived: Sequence[_Arrived]
    ) -> tuple[RoundRecord, list[str | Problem]]:
        task, number, now_s = arrived[0].ticket.task, arrived[0].ticket.number, self._clock()
        transaction.lock_task(task.name)
        record = self._progress.load(transaction, task.name, number)
        assert record is not None
        there = self._still_there(transaction, arrived)
        known = set(record.round.accepted)
        offers = [Offer(one.upload.device, one.upload.digest, one.upload.samples) for one in there]
        record, effects = self._progress.apply_all(transaction, task, record, offers, now_s)
        effects_of = {id(one): caused for one, caused in zip(there, effects, strict=True)}
        answers: list[str | Problem] = []
        created = []
        for one in arrived:
            if id(one) not in effects_of:
                answers.append(Problem("unavailable", "the upload's bytes were deleted", retry_after_s=1))
                continue
            refusal = _refusal(effects_of[id(one)], record, one.upload.device)
            if refusal is not None:
                answers.append(refusal)
            elif one.upload.device in known:
                answers.append("same")
            else:
                known.add(one.upload.device)
                answers.append("created")
                created.append(one.upload)
                transaction.note(task.name, "upload", now_s, number, one.upload.device)
        if created:
            transaction.add_uploads(task.name, number, created)
        return record, answers

    def _still_there(self, transaction: Transaction, arrived: Sequence[_Arrived]) -> list[_Arrived]:
        """All but those whose bytes were deleted after they were stored: an older upload had them, or nothing had."""
        old = transaction.references.perhaps_deleted([one.upload.digest for one in arrived])
        return [
            one
            for one in arrived
            if one.upload.digest not in old or self._blobs.size(one.upload.digest) is not None
        ]


def _refusal(effects: Sequence[Effect], record: RoundRecord, device: str) -> Problem | None:
    for effect in effects:
        if isinstance(effect, Refusal):
            return Problem(effect.kind, f"round {record.name}, device {device}")
    return None
