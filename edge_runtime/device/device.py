"""A device at work: carries out what the participant's state machine asks for, and journals every step.

Everything that it touches is given: the coordinator, where it keeps things, the trainer, clock, sleep, status.
So a simulation runs this very code without sockets, files or waiting.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from edgestill.runtime.device import outputs
from edgestill.runtime.device import participant as machine
from edgestill.runtime.device.client import Coordinator, DamagedBlob, Refused, Unreachable
from edgestill.runtime.device.conditions import Conditions, unmet
from edgestill.runtime.device.journal import Alone, Keep
from edgestill.runtime.device.local_round import (
    Equipment,
    TrainLocally,
    expected_outputs,
    pack_round,
    read_published,
    score_tests,
    train_alone,
    train_round,
)
from edgestill.runtime.device.local_training import train_locally
from edgestill.runtime.device.participant import Participant, Work
from edgestill.runtime.device.privacy import epsilon_of_spent
from edgestill.runtime.errors import EdgestillError, Interrupted, StateError, TrainingError, WireError
from edgestill.runtime.training.trainer import StepRecord

LONG_POLL_S = 25.0
_OUT_OF_REACH_S = (1.0, 60.0)
"""The first and the longest pause while the coordinator is out of reach."""
_ALONE_A_ROUND = 2
"""Trainings of the copy that learns from nobody, at most: one for the round, one to catch up."""


class Watch(Protocol):
    """Is told what a device does."""

    def __call__(self, event: str, /, **details: Any) -> None: ...


def no_watch(event: str, /, **details: Any) -> None:
    """A `Watch` that looks away."""


@dataclass
class Device:
    """One device in one task; `name` as the coordinator gave it.

    `clock`: seconds of the epoch. `conditions` None: train whatever the status is. `random` makes the noise of
    privacy (None: from the operating system). `bytes_down` starts with what was downloaded before the first round.
    """

    name: str
    coordinator: Coordinator
    keep: Keep
    equipment: Equipment
    conditions: Conditions | None = Conditions()
    read_status: Callable[[], Mapping[str, object]] = dict
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    stop_requested: Callable[[], bool] = lambda: False
    train: TrainLocally = train_locally
    random: np.random.Generator | None = None
    peak_rss_bytes: Callable[[], int | None] = lambda: None
    watch: Watch = no_watch
    bytes_down: int = 0
    scores: Mapping[str, float | None] | None = None
    """Accuracies of the student between rounds, where they are known: nothing is measured twice."""
    needed_blobs: frozenset[str] = frozenset()
    """Digests of downloads that every round needs."""
    long_poll_s: float = LONG_POLL_S
    training: bool = field(default=False, init=False)
    """Whether a training step may be under way, which a signal should let end."""
    last_report: Mapping[str, Any] | None = field(default=None, init=False)
    """Of the round that was settled last."""

    def __post_init__(self) -> None:
        self.participant: Participant = self.keep.read()
        self._done = 0
        self._out_of_reach_s = 0.0
        self._without_work = False
        self._told: dict[str, Any] = {}
        self._given_up: str | None = None
        self._after: Mapping[str, float | None] | None = None  # of what this process trained last
        work = self.participant.work
        self.keep.clean(None if work is None else work.round)

    @property
    def epsilon(self) -> float | None:
        """Of all that may have left the device so far; None without noise, or once anything left without."""
        privacy, spent = self.equipment.options.privacy, self.participant.privacy_spent
        return None if privacy is None or spent is None else epsilon_of_spent(spent, privacy.delta)

    def run(self, rounds: int | None = None) -> int:
        """Takes part until the task is finished, or `rounds` rounds are over; returns how many were uploaded.

        Errors: Interrupted when `stop_requested`, and whatever a person must mend; the journal is in order then.
        """
        before, first_done = self.participant.completed, self._done
        if self.participant.work is not None and self.participant.phase != "training":
            self.watch("continuing", round=self.participant.work.round, phase=self.participant.phase)
        if self.participant.phase == "finished":
            self.watch("finished")
        self._follow(machine.resume(self.participant), lambda: rounds == self._done - first_done)
        return self.participant.completed - before

    def run_round(self, work: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """One round from its WORK to the accepted upload, without asking for work or for conditions.

        Returns the report; None when the round was given up. For a device outside of any round.
        """
        completed, first_done = self.participant.completed, self._done
        now_s = self.clock()
        effects = self._step(machine.Offered(Work.from_json(work, now_s), now_s))
        if self.participant.work is None:
            return None
        self._follow(effects, lambda: self._done > first_done)
        return self.last_report if self.participant.completed > completed else None

    def _follow(self, effects: tuple[machine.Effect, ...], is_over: Callable[[], bool]) -> None:
        while effects and not is_over():
            for effect in effects[:-1]:
                self._perform(effect)
            if is_over():
                return
            event = self._perform(effects[-1])
            if event is None:
                return
            effects = self._step(event)
            if isinstance(event, machine.Settled):
                self._done += 1

    def _step(self, event: machine.Event) -> tuple[machine.Effect, ...]:
        after, effects = machine.step(self.participant, event)
        if after != self.participant:
            self.keep.write(after)
            self.participant = after
        return effects

    def _perform(self, effect: machine.Effect) -> machine.Event | None:
        """Does it; a failure that may pass becomes a pause and the news that time went by."""
        if self.stop_requested():
            raise Interrupted("stopped between two steps of a round", "run the same command again to go on")
        try:
            match effect:
                case machine.CheckConditions(after_s):
                    return self._check_conditions(after_s)
                case machine.AskForWork():
                    event = self._ask_for_work()
                case machine.Fetch(work):
                    event = self._fetch(work)
                case machine.Train(work):
                    event = self._train(work)
                case machine.Pack(work):
                    event = self._pack(work)
                case machine.Upload(work, digest, content_encoding):
                    event = self._upload(work, digest, content_encoding)
                case machine.Settle(work, report):
                    event = self._settle(work, report)
                case machine.KeepTrained(work, reason):
                    return self._keep_trained(work, reason)
                case machine.Discard(work, reason):
                    self._done += 1
                    self.keep.clean(None)
                    self._tell_given_up(work, reason)
                    return None
        except (Unreachable, Refused) as error:
            if not isinstance(error, Refused) or error.transient:
                return self._wait_for_coordinator(error)
            event = self._answer_refusal(effect, error)
        if self._out_of_reach_s:
            self.watch("in reach again")
        self._out_of_reach_s = 0.0
        return event

    def _check_conditions(self, after_s: float) -> machine.Event:
        if after_s:
            self.sleep(after_s)
        reasons = self._unmet()
        if reasons and reasons != self.participant.reasons:
            self.watch("waiting", reasons=list(reasons))
        return machine.Checked(reasons, self.clock())

    def _ask_for_work(self) -> machine.Event:
        self._tell_standing()
        self.watch("asking")
        answer = self.coordinator.work(self.read_status(), self.long_poll_s)
        self._without_work = answer is None
        if answer is None:
            return machine.NothingYet()
        now_s = self.clock()
        work = Work.from_json(answer, now_s)
        if work.round != self.participant.last_round:
            self.watch("round", round=work.round, number=work.number, seconds_left=work.deadline_s - now_s)
        return machine.Offered(work, now_s)

    def _tell_standing(self) -> None:
        """Says what this device waits for, once after each change, if it has done its part or got none."""
        last = self.participant.last_round
        if last is None and not self._without_work:
            return
        standing = self.coordinator.standing()
        if standing is None or (standing["round"] != last and not self._without_work):
            return
        told = {name: value for name, value in standing.items() if name != "seconds_left"}
        if told != self._told:
            self._told = told
            self.watch("standing", **standing, given_up=standing["round"] == self._given_up)

    def _fetch(self, work: Work) -> machine.Event:
        try:
            self._published(work)
        except (WireError, DamagedBlob) as error:
            return machine.RoundGone(error.message)
        self.keep.clean_blobs(self.needed_blobs | {work.global_outputs or ""})
        return machine.Fetched(self.clock())

    def _published(self, work: Work) -> dict[str, np.ndarray] | None:
        if work.global_outputs is None:
            return None
        kit = self.equipment
        expected = expected_outputs(kit.task, kit.bundle, kit.transfer)
        if not 0 < work.size_bytes <= outputs.largest_body(expected):
            raise WireError(f"global outputs of {work.size_bytes} bytes cannot be this task's")
        path = self.keep.blob_path(work.global_outputs)
        if not path.exists():
            self.bytes_down += work.size_bytes
        path = self.coordinator.blob(work.global_outputs, work.size_bytes, path)
        return read_published(path.read_bytes(), expected)

    def _train(self, work: Work) -> machine.Event:
        kit, stop = self.equipment, _Stop(self, work.deadline_s)
        student, published = self.keep.student(kit.bundle), self._published(work)
        self.watch("training", round=work.round, samples=len(kit.private), student=kit.bundle.student.name)
        first = True

        def tell(record: StepRecord) -> None:
            nonlocal first
            if first and record.step > 1:
                self.watch("continuing", round=work.round, phase="training", step=record.step - 1)
            first = False
            self.watch("step", **record.as_json())

        self.training = True
        try:
            state, report = train_round(
                kit,
                work,
                published,
                student,
                scores=self.scores,
                train=self.train,
                state_path=self.keep.training_path(work.round),
                should_stop=stop,
                on_step=tell,
            )
        except TrainingError as error:
            return machine.RoundGone(error.what)  # the training's file goes with the round
        except Interrupted as interrupted:
            return self._held(stop, interrupted)
        finally:
            self.training = False
        self.keep.keep_trained(work.round, state)
        self._after = report["after"]
        report |= {"peak_rss_bytes": self.peak_rss_bytes(), "bytes_down": self.bytes_down}
        self.watch("trained", round=work.round, **report)
        return machine.Trained(report, self.clock())

    def _pack(self, work: Work) -> machine.Event:
        kit = self.equipment
        try:
            state = self.keep.trained(work.round, kit.bundle)
        except StateError:
            return machine.RoundGone("it was trained with another student than this device has now")
        except WireError as error:
            return machine.RoundGone(error.message)
        try:
            spent = kit.spend_privacy(self.participant.privacy_spent)
            packed, report = pack_round(kit, state, self.random, spent)
        except (WireError, TrainingError) as error:
            return machine.RoundGone(error.message)
        self.keep.put_body(work.round, packed.body)
        self.watch("packed", round=work.round, **report)
        digest = hashlib.sha256(packed.body).hexdigest()
        return machine.Packed(digest, packed.content_encoding, report, self.clock(), spent)

    def _upload(self, work: Work, digest: str, content_encoding: str) -> machine.Event:
        if self.clock() >= work.deadline_s:
            return machine.Ticked(self.clock())
        body = self.keep.body(work.round)
        if hashlib.sha256(body).hexdigest() != digest:
            return machine.RoundGone("its packed outputs are lost or damaged")
        self.coordinator.submit(work.round, self.name, body, content_encoding)
        privacy = self.equipment.options.privacy
        spent = {} if privacy is None else {"epsilon": self.epsilon, "delta": privacy.delta}
        self.watch("uploaded", round=work.round, size_bytes=len(body), **spent)
        return machine.Accepted()

    def _settle(self, work: Work, report: Mapping[str, Any]) -> machine.Event:
        self._settle_student(work)
        if self.equipment.options.compare_alone:
            stop = _Stop(self)
            try:
                report = {**report, "alone": self._train_alone(work, stop)}
            except Interrupted as interrupted:
                return self._held(stop, interrupted)
        try:
            self.coordinator.report(work.round, self.name, report)
        except (Refused, Unreachable) as error:
            # the upload is what counts; a report that nobody wants must not keep the device from its next round
            self.watch("report not taken", reason=error.message)
        self.keep.clean(None)
        self.bytes_down = 0
        self.last_report = report
        self.watch("settled", round=work.round, report=dict(report))
        return machine.Settled()

    def _train_alone(self, work: Work, stop: _Stop) -> Mapping[str, float | None] | None:
        """After the upload, so that no deadline can pass meanwhile.

        The copy of a device that compares only since a while trains twice a round until it has been trained in as many
        rounds as the student. None before that, and where it failed, which costs no round. Errors: Interrupted, with a
        checkpoint.
        """
        kit = self.equipment
        count, last = self.keep.rounds(kit.bundle)
        if count is None:
            message = (
                "the student cannot be compared with itself alone: an older edgestill did not count its rounds; enrol "
                "again in another --work-dir"
            )
            self.watch("warning", message=message)
            return None
        wanted = count if last == work.round else count + 1
        try:
            alone = self.keep.alone(kit.bundle)
        except EdgestillError as error:
            self.keep.forget_alone(kit.bundle)
            self.watch("warning", message=f"the copy to compare with starts anew next round: {error.message}")
            return None
        try:
            for left in reversed(range(min(_ALONE_A_ROUND, wanted - alone.rounds))):
                if alone.done != work.round:  # else before the device was killed
                    alone = self._train_alone_once(work, alone, wanted, left == 0, stop)
        except Interrupted:
            raise
        except EdgestillError as error:
            self.watch("warning", message=f"training alone failed: {getattr(error, 'what', error.message)}")
            return None
        if alone.rounds != wanted:
            return None
        kit.engine.load_state(alone.state)
        return score_tests(kit)

    def _train_alone_once(self, work: Work, alone: Alone, wanted: int, is_last: bool, stop: _Stop) -> Alone:
        kit, number = self.equipment, alone.rounds + 1
        self.watch("training alone", round=work.round, behind=wanted - number)
        if number < wanted:  # what another round drew is not known any more
            work = replace(work, seed=int(np.random.SeedSequence((work.seed, number)).generate_state(1)[0]))
        path = self.keep.alone_training_path(work.round, number)
        self.training = True
        try:
            state = train_alone(kit, work, alone.state, train=self.train, state_path=path, should_stop=stop)
        finally:
            self.training = False
        trained = Alone(state, number, work.round if is_last else "")
        self.keep.keep_alone(trained, kit.bundle)
        return trained

    def _held(self, stop: _Stop, interrupted: Interrupted) -> machine.Event:
        """What follows from a training that `stop` interrupted. Errors: `interrupted`, where a person asked for it."""
        if stop.held:
            self.watch("waiting", reasons=list(stop.held))
            return machine.Held(stop.held, self.clock())
        if stop.requested:
            raise interrupted
        return machine.Ticked(self.clock())

    def _keep_trained(self, work: Work, reason: str) -> machine.Event:
        if self.equipment.exchange != "parameters":
            self._settle_student(work)
        self.keep.clean(None)
        self._tell_given_up(work, reason)
        return machine.Settled()

    def _settle_student(self, work: Work) -> None:
        self.keep.settle(work.round, self.equipment.bundle)
        self.scores, self._after = self._after, None

    def _tell_given_up(self, work: Work, reason: str) -> None:
        self._given_up = work.round
        self.watch("given up", round=work.round, reason=reason)

    def _answer_refusal(self, effect: machine.Effect, refused: Refused) -> machine.Event:
        if refused.kind == "task_finished":
            self.watch("finished")
            work = self.participant.work
            return machine.TaskFinished() if work is None else machine.RoundGone(refused.message)
        if refused.status == 401 or isinstance(effect, machine.AskForWork):
            raise refused
        return machine.RoundGone(refused.message)

    def _wait_for_coordinator(self, error: EdgestillError) -> machine.Event:
        first_s, longest_s = _OUT_OF_REACH_S
        self._out_of_reach_s = min(longest_s, max(first_s, 2 * self._out_of_reach_s))
        wanted_s = getattr(error, "retry_after_s", None)
        self.watch("out of reach", reason=error.message)
        self.sleep(self._out_of_reach_s if wanted_s is None else wanted_s)
        return machine.Ticked(self.clock())

    def _unmet(self) -> tuple[str, ...]:
        if self.conditions is None:
            return ()
        return tuple(unmet(self.conditions, self.read_status()))


class _Stop:
    """Whether training should stop, asked after every step; and then, why."""

    def __init__(self, device: Device, deadline_s: float = math.inf) -> None:
        self._device, self._deadline_s = device, deadline_s
        self._looked_s = device.clock()
        self.requested = False
        self.held: tuple[str, ...] = ()

    def __call__(self) -> bool:
        device = self._device
        now_s = device.clock()
        if device.stop_requested():
            self.requested = True
        elif now_s < self._deadline_s:
            if now_s - self._looked_s < machine.WAITING_S:
                return False
            self._looked_s = now_s
            self.held = device._unmet()
            return bool(self.held)
        return True
