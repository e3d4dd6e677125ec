"""The participant: its state machine stays sound under any events, and goes through its phases in order."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.runtime.device import participant as machine
from edgestill.runtime.device.participant import Participant, Work, resume, step
from edgestill.runtime.errors import StateError

DIGESTS = ("a" * 64, "b" * 64)


def work_of(number: int, deadline_s: float) -> Work:
    return Work(f"birds.{number}", number, deadline_s, DIGESTS[number % 2], 10, number)


times = st.floats(0, 100)
reasons = st.lists(st.sampled_from(["hot", "flat"]), max_size=2).map(tuple)
events = st.one_of(
    st.builds(machine.Checked, reasons, times),
    st.builds(machine.Offered, st.builds(work_of, st.integers(1, 4), times), times),
    st.just(machine.NothingYet()),
    st.builds(machine.Fetched, times),
    st.builds(machine.Trained, st.just({"samples": 3}), times),
    st.builds(machine.Held, reasons, times),
    st.builds(machine.Packed, st.sampled_from(DIGESTS), st.just("identity"), st.just({"bytes_up": 1}), times),
    st.just(machine.Accepted()),
    st.builds(machine.Ticked, times),
    st.builds(machine.RoundGone, st.just("late")),
    st.just(machine.Settled()),
    st.just(machine.TaskFinished()),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(events, max_size=40))
def test_whatever_happens_the_state_is_sound_and_something_is_left_to_do(happened: list) -> None:
    state = Participant()
    uploaded: dict[str, str] = {}
    for event in happened:
        before = state
        state, effects = step(state, event)
        assert state.phase in machine.PHASES
        assert (state.work is None) or state.phase not in ("idle", "finished")
        assert (state.work is not None) or state.phase in ("idle", "waiting", "finished")
        # the last effect leads on, until the task is finished
        assert bool(effects) == (state.phase != "finished")
        assert not any(isinstance(effect, machine.Discard) for effect in effects[-1:])
        assert Participant.from_json(json.loads(json.dumps(state.as_json()))) == state
        assert state.completed >= before.completed
        if not isinstance(event, machine.Packed):
            assert state.privacy_spent == before.privacy_spent
        now_s = getattr(event, "now_s", None)
        for effect in effects:
            if isinstance(effect, machine.Fetch | machine.Train | machine.Pack | machine.Upload):
                assert now_s is None or now_s < effect.work.deadline_s
            if isinstance(effect, machine.Upload):
                # one round, one body
                if before.phase == "uploading":
                    assert effect.digest == before.upload
                uploaded[effect.work.round] = effect.digest
            if isinstance(effect, machine.Settle):
                assert isinstance(event, machine.Accepted) or before.phase == "uploaded"
                assert effect.work.round in uploaded
    # a restart does what the last effect was about to do
    if state.phase != "finished" and happened:
        assert resume(state)


@settings(deadline=None)
@given(st.integers(1, 4))
def test_a_round_goes_through_its_phases_in_order(number: int) -> None:
    state, phases = Participant(), []
    work = work_of(number, 50.0)
    for event in (
        machine.Checked((), 0),
        machine.Offered(work, 0),
        machine.Fetched(1),
        machine.Held(("hot",), 2),
        machine.Checked(("hot",), 3),
        machine.Checked((), 4),
        machine.Fetched(5),
        machine.Trained({"samples": 3}, 6),
        machine.Packed(DIGESTS[0], "zstd", {"bytes_up": 9}, 7, 0.25),
        machine.Ticked(8),
        machine.Accepted(),
        machine.Settled(),
    ):
        state, effects = step(state, event)
        phases.append(state.phase)
    assert phases == [
        "idle", "fetching", "training", "waiting", "waiting", "fetching", "training", "packing", "uploading",
        "uploading", "uploaded", "idle",
    ]  # fmt: skip
    assert state == Participant(last_round=work.round, completed=1, privacy_spent=0.25)
    # a round that is over is not begun again, however often it is offered
    again, effects = step(state, machine.Offered(work, 9))
    assert again == state and effects == (machine.CheckConditions(machine.AGAIN_S),)
    assert step(state, machine.TaskFinished()) == (replace(state, phase="finished"), ())


@pytest.mark.parametrize("phase", ["waiting", "fetching", "training", "packing", "uploading"])
@pytest.mark.parametrize("event", [machine.Ticked(60), machine.RoundGone("its deadline passed")])
def test_a_round_that_is_over_is_given_up(phase: str, event: object) -> None:
    state = Participant(phase, work_of(1, 50.0), upload=DIGESTS[0], report={"samples": 1}, privacy_spent=0.5)
    after, effects = step(state, event)
    if phase == "uploading" or (
        phase == "packing" and isinstance(event, machine.Ticked)
    ):  # it has learned something
        # a restart finds the round again, and keeps what was learned
        assert after == replace(state, phase="keeping", reasons=("its deadline passed",))
        assert effects == resume(after) == (machine.KeepTrained(work_of(1, 50.0), "its deadline passed"),)
        after, effects = step(after, machine.Settled())
    else:
        assert effects[0] == machine.Discard(work_of(1, 50.0), "its deadline passed")
    assert after == Participant(last_round="birds.1", privacy_spent=0.5)
    assert effects[-1] == machine.CheckConditions()


@pytest.mark.parametrize(
    ("phase", "event"),
    [("training", machine.Trained({}, 60)), ("packing", machine.Packed(DIGESTS[0], "identity", {}, 60))],
)
def test_training_that_ended_past_the_deadline_counts_for_the_device(phase: str, event: object) -> None:
    _, effects = step(Participant(phase, work_of(1, 50.0)), event)
    assert effects == (machine.KeepTrained(work_of(1, 50.0), "its deadline passed"),)


def test_an_accepted_upload_is_settled_after_the_deadline_too() -> None:
    state = Participant("uploaded", work_of(1, 50.0), upload=DIGESTS[0])
    assert step(state, machine.Ticked(60)) == (state, (machine.Settle(work_of(1, 50.0), {}),))


@pytest.mark.parametrize(
    "change",
    [
        {"round": "../../etc"}, {"round": "birds"}, {"round": "birds.0"}, {"global_outputs": "../x"},
        {"deadline_s": float("nan")}, {"deadline_s": "soon"}, {"seed": -1}, {"seed": None}, {"number": None},
        {"size_bytes": -1},
    ],
)  # fmt: skip
def test_work_that_is_out_of_form_is_refused(change: dict) -> None:
    good = {
        "round": "birds.1",
        "number": 1,
        "deadline_s": 9,
        "global_outputs": None,
        "size_bytes": 0,
        "seed": 4,
    }
    assert Work.from_json(good, 1.0).deadline_s == 10.0
    with pytest.raises(StateError):
        Work.from_json({**good, **change}, 1.0)
