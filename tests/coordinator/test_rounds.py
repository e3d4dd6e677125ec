"""A round's state machine: examples of every transition, and what must hold after any events whatever."""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgestill.coordinator.problems import CATALOG, Problem
from edgestill.coordinator.rounds.round import (
    ABANDONED,
    AGGREGATING,
    COLLECTING,
    COMPLETED,
    QUEUED_AT_MOST_S,
    Abandoned,
    Accepted,
    AcceptedUpload,
    Aggregate,
    Ask,
    Begun,
    Completed,
    Failed,
    Offer,
    Published,
    Refusal,
    Round,
    Rules,
    Selected,
    Tick,
    open_round,
    step,
)

RULES = Rules(goal=2, minimum=1, over_selection=1.5, deadline_s=100.0, distil_deadline_s=50.0)


def run(
    round: Round, *events: object, now_s: float = 10.0, rules: Rules = RULES
) -> tuple[Round, list[object]]:
    effects: list[object] = []
    for event in events:
        round, more = step(round, event, now_s, rules)
        effects += more
    return round, effects


def opened(rules: Rules = RULES) -> Round:
    return open_round(3, rules, now_s=0.0)


def test_a_round_that_reaches_its_goal_completes() -> None:
    round, effects = run(opened(), Ask("d-b"), Ask("d-a"), Offer("d-b", "beef", 7), Offer("d-a", "cafe", 5))
    assert effects == [
        Selected("d-b"),
        Selected("d-a"),
        AcceptedUpload("d-b", "beef"),
        AcceptedUpload("d-a", "cafe"),
        Aggregate(("d-a", "d-b")),
    ]
    assert (round.phase, round.deadline_s) == (AGGREGATING, 10.0 + QUEUED_AT_MOST_S)
    assert round.accepted == {"d-a": Accepted("cafe", 5), "d-b": Accepted("beef", 7)}
    round, effects = run(round, Published("f00d"))
    assert (round.phase, round.published, effects) == (COMPLETED, "f00d", [Completed("f00d")])


def test_the_deadline_ends_the_collection_with_the_minimum() -> None:
    round, _ = run(opened(), Ask("d-a"), Offer("d-a", "cafe", 5))
    assert run(round, Tick(), now_s=99.9) == (round, [])
    round, effects = run(round, Tick(), now_s=100.0)
    assert (round.phase, effects) == (AGGREGATING, [Aggregate(("d-a",))])
    assert round.deadline_s == 100.0 + QUEUED_AT_MOST_S


def test_the_deadline_abandons_a_round_below_the_minimum() -> None:
    round, effects = run(run(opened(), Ask("d-a"))[0], Tick(), now_s=100.0)
    assert (round.phase, effects) == (ABANDONED, [Abandoned(round.reason or "")])
    assert round.reason == "0 of at least 1 uploads (1 devices selected) in 100 s"


def test_aggregation_has_a_deadline_of_its_own() -> None:
    round, _ = run(run(opened(), Ask("d-a"), Offer("d-a", "cafe", 5))[0], Tick(), now_s=200.0)
    assert run(round, Tick(), now_s=1000.0) == (round, []), "it waits for its turn"
    round, _ = run(round, Begun(), now_s=1000.0)
    assert (round.begun_s, round.deadline_s) == (1000.0, 1050.0)
    assert run(round, Begun(), Tick(), now_s=1049.9) == (round, []), "who begins anew gets no more time"
    round, effects = run(round, Tick(), now_s=1050.0)
    assert (round.phase, effects) == (ABANDONED, [Abandoned("aggregation took longer than 50 s")])
    assert run(round, Published("f00d"), now_s=1051.0) == (round, [])


def test_a_round_does_not_wait_for_its_turn_for_ever() -> None:
    round, _ = run(run(opened(), Ask("d-a"), Offer("d-a", "cafe", 5))[0], Tick(), now_s=200.0)
    round, effects = run(round, Begun(), Tick(), now_s=200.0 + QUEUED_AT_MOST_S)
    assert effects == [Abandoned("aggregation did not begin within 24 hours")]
    assert round.phase == ABANDONED and round.begun_s is None


@pytest.mark.parametrize("phase", [COLLECTING, AGGREGATING])
def test_a_failure_abandons_with_its_reason(phase: str) -> None:
    round = opened()
    if phase == AGGREGATING:
        round, _ = run(round, Ask("d-a"), Ask("d-b"), Offer("d-a", "cafe", 5), Offer("d-b", "beef", 5))
    round, effects = run(round, Failed("the disk is full"))
    assert (round.phase, round.reason) == (ABANDONED, "the disk is full")
    assert effects == [Abandoned("the disk is full")]


def test_at_most_goal_times_over_selection_devices_are_selected() -> None:
    round, effects = run(opened(), *(Ask(f"d-{i}") for i in range(5)))
    assert effects == [Selected("d-0"), Selected("d-1"), Selected("d-2")]
    assert run(round, Ask("d-1")) == (round, [Selected("d-1")]), (
        "a device that asks again gets its work again"
    )


def test_over_selection_rounds_up_and_not_further() -> None:
    assert Rules(10, 1, 1.1, 1, 1).selected_at_most == 11, "10 · 1.1 is 11.000000000000002 in floating point"
    assert Rules(10, 1, 1.11, 1, 1).selected_at_most == 12


def test_nobody_is_selected_after_the_deadline_or_after_uploading() -> None:
    round, _ = run(opened(), Ask("d-a"), Offer("d-a", "cafe", 5))
    assert run(round, Ask("d-a")) == (round, [])
    assert run(round, Ask("d-b"), now_s=100.0) == (round, [])


def test_offers_that_do_not_count() -> None:
    round, _ = run(opened(), Ask("d-a"), Ask("d-b"), Offer("d-a", "cafe", 5))
    assert run(round, Offer("d-a", "cafe", 5)) == (round, [AcceptedUpload("d-a", "cafe")])
    assert run(round, Offer("d-a", "beef", 5)) == (round, [Refusal("other_digest")])
    assert run(round, Offer("d-z", "beef", 5)) == (round, [Refusal("not_selected")])
    assert run(round, Offer("d-b", "beef", 5), now_s=100.0) == (round, [Refusal("late")])
    done, _ = run(run(round, Tick(), now_s=100.0)[0], Published("f00d"))
    assert run(done, Offer("d-b", "beef", 5)) == (done, [Refusal("late")])
    assert run(done, Offer("d-a", "cafe", 5)) == (done, [AcceptedUpload("d-a", "cafe")])


def test_any_order_of_arrival_gives_the_same_accepted_set() -> None:
    rules = Rules(goal=4, minimum=1, over_selection=1.0, deadline_s=100.0, distil_deadline_s=50.0)
    offers = [Offer(f"d-{name}", name * 4, ord(name)) for name in "bcda"]
    ends = []
    for order in permutations(offers):
        round, effects = run(opened(rules), *(Ask(o.device) for o in order), *order, rules=rules)
        ends.append((round, effects[-1]))
    assert all(end == ends[0] for end in ends)
    assert ends[0][1] == Aggregate(("d-a", "d-b", "d-c", "d-d"))


DEVICES = st.sampled_from([f"d-{name}" for name in "abcdefgh"])
DIGESTS = st.sampled_from(["cafe", "beef", "f00d"])
EVENTS = st.one_of(
    st.builds(Ask, DEVICES),
    st.builds(Offer, DEVICES, DIGESTS, st.integers(0, 100)),
    st.just(Tick()),
    st.just(Begun()),
    st.builds(Published, DIGESTS),
    st.builds(Failed, st.just("it failed")),
)
ALL_RULES = st.integers(1, 5).flatmap(
    lambda goal: st.builds(
        Rules,
        goal=st.just(goal),
        minimum=st.integers(1, goal),
        over_selection=st.floats(1.0, 3.0),
        deadline_s=st.floats(1.0, 100.0),
        distil_deadline_s=st.floats(1.0, 100.0),
    )
)


@given(ALL_RULES, st.lists(st.tuples(EVENTS, st.floats(0.0, 30.0)), max_size=40))
@settings(deadline=None)
def test_ticks_alone_end_any_round(rules: Rules, events: list[tuple[object, float]]) -> None:
    now_s, round = 0.0, open_round(1, rules, 0.0)
    for event, passed_s in events:
        now_s += passed_s
        round, _ = step(round, event, now_s, rules)
    # whatever happened before: two ticks, each at the deadline that the round itself gives, are enough
    for _ in range(2):
        now_s = max(now_s, round.deadline_s)
        round, effects = step(round, Tick(), now_s, rules)
        for effect in effects:
            assert effect == Aggregate(round.accepted_in_order) or isinstance(effect, Abandoned)
    assert round.final
    assert (round.reason is not None) == (round.phase == ABANDONED)
    assert (round.published is not None) == (round.phase == COMPLETED)


class AnyEvents(RuleBasedStateMachine):
    """Compares the machine with its history: what it promised must stay so."""

    @initialize(rules=ALL_RULES)
    def open(self, rules: Rules) -> None:
        self.rules, self.now_s = rules, 1000.0
        self.round = open_round(1, rules, self.now_s)
        self.told_selected: set[str] = set()
        self.promised: dict[str, str] = {}
        self.aggregations: list[Aggregate] = []
        self.ends: list[object] = []

    @rule(event=EVENTS)
    def happen(self, event: object) -> None:
        before = self.round
        self.round, effects = step(before, event, self.now_s, self.rules)
        assert isinstance(before, Round) and step(before, event, self.now_s, self.rules) == (
            self.round,
            effects,
        )
        if before.final:
            assert self.round == before, "a final round never changes"
        for effect in effects:
            match effect:
                case Selected(device):
                    assert event == Ask(device) and not before.final
                    self.told_selected.add(device)
                case AcceptedUpload(device, digest):
                    assert self.promised.setdefault(device, digest) == digest, "one upload a device, for good"
                case Refusal(kind):
                    assert isinstance(event, Offer) and 400 <= CATALOG[kind].status < 500
                    assert self.round == before
                case Aggregate():
                    self.aggregations.append(effect)
                case _:
                    self.ends.append(effect)
        if isinstance(event, Offer):
            assert any(isinstance(effect, AcceptedUpload | Refusal) for effect in effects), (
                "every offer is answered"
            )

    @rule(passed_s=st.floats(0.0, 60.0))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    @precondition(lambda self: hasattr(self, "round"))
    @invariant()
    def holds(self) -> None:
        round = self.round
        assert set(round.accepted) <= round.selected == self.told_selected
        assert len(round.selected) <= self.rules.selected_at_most
        assert len(round.accepted) <= self.rules.goal
        assert {device: upload.digest for device, upload in round.accepted.items()} == self.promised
        assert self.aggregations in ([], [Aggregate(tuple(sorted(self.promised)))])
        if round.phase in (AGGREGATING, COMPLETED):
            assert self.aggregations and len(round.accepted) >= self.rules.minimum
        if round.phase == COLLECTING:
            assert len(round.accepted) < self.rules.goal and not self.aggregations
        expected = {COMPLETED: [Completed(round.published or "")], ABANDONED: [Abandoned(round.reason or "")]}
        assert self.ends == expected.get(round.phase, [])


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_catalog_has_every_problem_of_the_contract() -> None:
    page = (Path(__file__).parents[2] / "docs" / "federation.md").read_text()
    table = page[page.index("## HTTP") : page.index("INFO:")]
    found: set[str] = set()
    for status, names in re.findall(r"(4\d\d) (`[a-z_]+`(?:, `[a-z_]+`)*)", table):
        for kind in re.findall(r"`([a-z_]+)`", names):
            found.add(kind)
            assert CATALOG[kind].status == int(status), kind
    assert {"late", "quota", "task_finished", "not_selected", "malformed"} <= found


def test_a_problem_says_what_where_and_what_next() -> None:
    problem = Problem("late", "birds.3 ended 4 s ago", retry_after_s=2.5)
    assert problem.as_json() == {
        "type": "urn:edgestill:problem:late",
        "title": CATALOG["late"].title,
        "status": 410,
        "detail": "birds.3 ended 4 s ago",
        "hint": CATALOG["late"].hint,
    }
    assert (problem.message, problem.hint, problem.retry_after_s) == (
        "birds.3 ended 4 s ago",
        CATALOG["late"].hint,
        2.5,
    )
    assert Problem("late").detail == CATALOG["late"].title
