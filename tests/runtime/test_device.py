"""The device's shell: it goes through rounds, and whatever the coordinator answers leads to the next."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgestill.runtime.device import local_round, outputs
from edgestill.runtime.device.client import Refused
from edgestill.runtime.device.conditions import Conditions
from edgestill.runtime.device.device import _Stop
from edgestill.runtime.device.journal import WorkFolder, WorkMemory
from edgestill.runtime.device.local_round import Equipment, Options, Privacy, score_tests
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.local_training import LocalResult, train_locally
from edgestill.runtime.device.participant import Participant, Work
from edgestill.runtime.errors import (
    EdgestillError,
    Interrupted,
    StateError,
    TrainingError,
    UsageError,
    WireError,
)
from tests.support.device_bench import Bench, open_bench, upload_undisturbed  # noqa: F401  fixtures
from tests.support.device_fakes import EXPECTED


def test_what_was_measured_is_not_measured_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(local_round, "score_tests", lambda kit: measured.append(kit) or score_tests(kit))
    bench.device(bench.coordinator(), WorkMemory(tmp_path)).run()
    assert len(measured) == 3, "before and after the first of two rounds, after the second"


def test_a_device_reports_what_it_did(bench: Bench, tmp_path: Path) -> None:
    fake = bench.coordinator()
    device = bench.device(fake, WorkFolder(tmp_path / "w"), bytes_down=50)
    assert device.run(rounds=1) == 1 and list(fake.uploads) == ["birds.1"]
    assert device.run() == 1 and device.participant.phase == "finished"
    first, second = fake.reports["birds.1"], fake.reports["birds.2"]
    assert first["samples"] == 40 and sum(first["class_counts"]) == 40
    assert first["bytes_up"] == len(fake.uploads["birds.1"])
    assert first["bytes_down"] == 50 and second["bytes_down"] == len(fake.uploads["birds.1"])
    assert second["before"] == first["after"] and second["after"]["loss"] < first["before"]["loss"]
    assert second["step_ms"] > 0 and 0 < second["max_error"] < 0.1
    left = sorted(path.name for path in (tmp_path / "w").iterdir())
    assert [name.split("-")[0] for name in left] == [
        "blobs", "journal.json", "lock", "rounds.json",
        f"student-{bench.bundle.model_digest[:16]}.safetensors".split("-")[0],
    ]  # fmt: skip


def test_counts_of_too_many_classes_stay_at_home(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MOST_CLASS_COUNTS", bench.bundle.classes - 1)
    fake = bench.coordinator()
    bench.device(fake, WorkMemory(bench.folder / "blobs")).run(rounds=1)
    _, metadata = outputs.unpack(fake.uploads["birds.1"], "identity", EXPECTED)
    assert metadata["samples"] == "40" and "class_counts" not in metadata
    assert "class_counts" not in fake.reports["birds.1"]


def test_memory_and_folder_give_the_same_bytes(
    bench: Bench, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fake = bench.coordinator()
    bench.device(fake, WorkFolder(tmp_path / "w")).run()
    assert fake.uploads == undisturbed


@pytest.mark.parametrize("exchange", ["latents", "parameters"])
@pytest.mark.parametrize("kind", ["late", "quota"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_model_of_its_own_stays_trained_when_its_upload_comes_to_nothing(
    bench: Bench, tmp_path: Path, exchange: str, kind: str, in_memory: bool
) -> None:
    accepted = WorkMemory(bench.folder / "blobs")
    bench.device(bench.coordinator(), accepted).run(rounds=1)
    fake = bench.coordinator()
    fake.task["exchange"] = exchange

    def refuse(call: str) -> None:
        if call == "submit":
            raise Refused("no longer", status=410 if kind == "late" else 403, kind=kind)

    fake.before = refuse
    keep = WorkMemory(bench.folder / "blobs") if in_memory else WorkFolder(tmp_path / "w")
    device = bench.device(fake, keep)
    assert device.run(rounds=1) == 0 and device.participant.last_round == "birds.1"
    mine, initial = keep.student(bench.bundle), bench.bundle.initial_state()
    expected = initial if exchange == "parameters" else accepted.student(bench.bundle)
    for name in initial:
        np.testing.assert_array_equal(mine[name], expected[name])
    assert any((accepted.student(bench.bundle)[name] != initial[name]).any() for name in initial)


def test_epsilon_counts_earlier_rounds_with_the_noise_that_they_had(bench: Bench, tmp_path: Path) -> None:
    fake, keep = bench.coordinator(), WorkMemory(tmp_path)
    for multiplier in (1.0, 100.0):
        options = Options(privacy=Privacy(clip=1.0, noise_multiplier=multiplier))
        assert bench.device(fake, keep, options).run(rounds=1) == 1
    # little noise once is not made good by much noise later
    assert 0 < fake.reports["birds.1"]["epsilon"] < fake.reports["birds.2"]["epsilon"]


def test_after_a_round_without_noise_no_epsilon_is_claimed(bench: Bench, tmp_path: Path) -> None:
    fake, keep = bench.coordinator(), WorkMemory(tmp_path)
    for options in (Options(), Options(privacy=Privacy(clip=1.0, noise_multiplier=5.0))):
        assert bench.device(fake, keep, options).run(rounds=1) == 1
    assert fake.reports["birds.2"]["epsilon"] is None


def test_training_stops_at_the_deadline_and_nothing_is_uploaded(bench: Bench, tmp_path: Path) -> None:
    fake, now_s, seen = bench.coordinator(deadline_s=10.0), [0.0], []

    def clock() -> float:
        now_s[0] += 1.0
        return now_s[0]

    device = bench.device(
        fake, WorkFolder(tmp_path / "w"), clock=clock, watch=lambda event, **details: seen.append(event)
    )
    assert device.run(rounds=1) == 0
    assert fake.submissions == [] and 0 < seen.count("step") < 10
    assert "given up" in seen and device.participant.last_round == "birds.1"
    assert not list((tmp_path / "w").glob("training-*"))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (410, "late"),
        (404, "no_such_round"),
        (409, "not_selected"),
        (413, "too_large"),
        (422, "wrong_outputs"),
    ],
)
def test_a_refused_upload_ends_the_round_and_not_the_device(
    bench: Bench, tmp_path: Path, status: int, kind: str
) -> None:
    fake, seen = bench.coordinator(rounds=1), []

    def refuse(call: str) -> None:
        if call == "submit":
            raise Refused("no", status=status, kind=kind)

    fake.before = refuse
    device = bench.device(
        fake, WorkFolder(tmp_path / "w"), watch=lambda event, **details: seen.append((event, details))
    )
    assert device.run(rounds=1) == 0
    assert ("given up", {"round": "birds.1", "reason": "no"}) in seen
    assert device.participant.phase == "idle" and device.participant.last_round == "birds.1"


def test_a_token_that_is_not_accepted_ends_the_device(bench: Bench, tmp_path: Path) -> None:
    fake = bench.coordinator()

    def refuse(call: str) -> None:
        if call == "submit":
            raise Refused("who?", status=401, kind="unauthorised")

    fake.before = refuse
    with pytest.raises(Refused, match="who"):
        bench.device(fake, WorkFolder(tmp_path / "w")).run()


def test_it_waits_until_the_conditions_are_met_even_in_the_middle_of_training(
    bench: Bench, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    fake, now_s, seen = bench.coordinator(deadline_s=1e6), [0.0], []
    levels = iter([0.1, 0.9, 0.9, 0.1, 0.1, 0.9])

    def clock() -> float:
        now_s[0] += 8.0
        return now_s[0]

    def read_status() -> dict[str, object]:
        return {"battery": next(levels, 0.9), "charging": False}

    device = bench.device(
        fake, WorkFolder(tmp_path / "w"), clock=clock, read_status=read_status,
        conditions=Conditions(minimum_battery=0.5), watch=lambda event, **details: seen.append(event),
    )  # fmt: skip
    assert device.run() == 2
    assert seen[:3] == ["waiting", "asking", "round"]
    assert seen.index("step") < len(seen) - 1 - seen[::-1].index("waiting")
    assert fake.uploads == undisturbed


def test_a_training_that_fails_costs_the_round_and_not_the_student(bench: Bench, tmp_path: Path) -> None:
    fake = bench.coordinator(rounds=1)
    calls = []

    def diverging(*arguments: object, **how: object):
        calls.append(how)
        raise TrainingError("the loss is nan")

    device = bench.device(fake, WorkFolder(tmp_path / "w"), train=diverging)
    assert device.run(rounds=1) == 0 and len(calls) == 1
    student = device.keep.student(bench.bundle)
    assert all(np.array_equal(student[name], value) for name, value in bench.bundle.initial_state().items())


def test_a_round_that_diverges_names_no_file_that_goes_with_it(bench: Bench, tmp_path: Path) -> None:
    fake = bench.coordinator(rounds=1, epochs=20, learning_rate=1000.0, weight_decay=1000.0)
    told: list[str] = []

    def watch(event: str, /, **details: object) -> None:
        told.extend([str(details["reason"])] if event == "given up" else [])

    device = bench.device(fake, WorkFolder(tmp_path / "w"), watch=watch)
    assert device.run(rounds=1) == 0
    assert len(told) == 1 and "training-" not in told[0] and not list((tmp_path / "w").glob("training-*"))


def test_global_outputs_that_do_not_fit_cost_the_round(bench: Bench, tmp_path: Path) -> None:
    fake = bench.coordinator()
    device = bench.device(fake, WorkFolder(tmp_path / "w"))
    device.run(rounds=1)
    fake.uploads["birds.1"] = b"\0" * 40
    assert device.run(rounds=1) == 0
    assert device.participant.last_round == "birds.2"


def test_a_simulation_runs_one_round_without_asking(bench: Bench) -> None:
    fake = bench.coordinator()
    device = bench.device(fake, WorkMemory(bench.folder / "blobs"), conditions=None)
    work = fake.work({}, 0)
    assert work is not None
    report = device.run_round(work)
    assert report is not None and report["samples"] == 40 and list(fake.uploads) == ["birds.1"]
    assert device.run_round(work) is None  # it was done with that one


def test_a_work_folder_serves_one_process(tmp_path: Path) -> None:
    keep = WorkFolder(tmp_path / "w")
    with pytest.raises(EdgestillError, match="in use"):
        WorkFolder(tmp_path / "w")
    keep.write(Participant(completed=3))
    keep.close()
    again = WorkFolder(tmp_path / "w")
    assert again.read() == Participant(completed=3)
    again.close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "x"}', '{"format": "edgestill-journal", "format_version": 1}']
)
def test_a_damaged_journal_is_named(tmp_path: Path, text: str) -> None:
    keep = WorkFolder(tmp_path / "w")
    (tmp_path / "w" / "journal.json").write_text(text)
    with pytest.raises(StateError, match=r"journal\.json"):
        keep.read()
    keep.close()


def test_noise_is_for_outputs_only(bench: Bench) -> None:
    with pytest.raises(UsageError, match="parameters"):
        Equipment(
            {**bench.task, "exchange": "parameters"}, bench.bundle, bench.engine, bench.private, None, {},
            Options(privacy=Privacy(1.0, 1.0)),
        )  # fmt: skip


def test_a_device_can_compare_itself_with_training_alone(bench: Bench, tmp_path: Path) -> None:
    """The oracle is the local training itself, called without any teacher; what is uploaded stays the same."""
    fake, plain = bench.coordinator(), bench.coordinator()
    bench.device(plain, WorkMemory(bench.folder / "blobs")).run()
    with closing(WorkFolder(tmp_path / "w")) as keep:
        device = bench.device(fake, keep, Options(compare_alone=True))
        device.run()
    assert fake.uploads == plain.uploads and "alone" not in plain.reports["birds.2"]
    kit, settings = device.equipment, LocalSettings.from_json(fake.task["local"])
    state = kit.bundle.initial_state()
    for number in (1, 2):
        how = (kit.engine, kit.bundle, kit.private, None, None, settings, 100 + number, state)
        state = train_locally(*how, state_path=None).state
        kit.engine.load_state(state)
        assert fake.reports[f"birds.{number}"]["alone"] == score_tests(kit)
    with closing(WorkFolder(tmp_path / "w")) as again:
        kept = again.alone(kit.bundle)
        assert (kept.done, kept.rounds) == ("birds.2", 2)
        assert all((kept.state[name] == state[name]).all() for name in state)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_who_compares_later_catches_up_first(bench: Bench, tmp_path: Path, where: str) -> None:
    """Told only once the copy was trained in as many rounds as the student."""
    fake = bench.coordinator(rounds=5)
    memory, trained = WorkMemory(bench.folder / "blobs"), []

    def train(*arguments: object, **how: object) -> LocalResult:
        trained.append(1)
        return train_locally(*arguments, **how)

    for compares, rounds, counts in ((False, 2, (2, 0)), (True, 1, (3, 2)), (True, 1, (4, 4)), (True, 1, (5, 5))):
        with closing(WorkFolder(tmp_path / "w")) as folder:
            keep = folder if where == "folder" else memory
            trained.clear()
            device = bench.device(fake, keep, Options(compare_alone=compares), train=train)
            device.run(rounds)
            bundle = device.equipment.bundle
            assert (keep.rounds(bundle)[0], keep.alone(bundle).rounds) == counts
            told = (device.last_report or {}).get("alone")
            assert (told is not None) == (counts[0] == counts[1])
            if told is not None:
                device.equipment.engine.load_state(keep.alone(bundle).state)
                assert told == score_tests(device.equipment)
    assert len(trained) == 2, "and then as often as the student"


def test_a_student_of_an_edgestill_that_did_not_count_is_not_compared(bench: Bench, tmp_path: Path) -> None:
    fake, told = bench.coordinator(), []
    with closing(WorkFolder(tmp_path / "w")) as keep:
        bench.device(fake, keep, Options()).run(1)
        (tmp_path / "w/rounds.json").unlink()
        watch = lambda event, **details: told.append((event, details.get("message", "")))  # noqa: E731
        bench.device(fake, keep, Options(compare_alone=True), watch=watch).run(1)
    assert fake.reports["birds.2"]["alone"] is None
    assert any(event == "warning" and "another --work-dir" in message for event, message in told)


def test_killed_after_training_alone_a_device_does_not_train_so_again(bench: Bench, tmp_path: Path) -> None:
    fake = bench.coordinator()
    work = Work.from_json(fake.work({}, 0.0), 0.0)
    trained: list[int] = []

    def train(*arguments: object, **how: object) -> LocalResult:
        trained.append(1)
        return train_locally(*arguments, **how)

    scores = []
    for _ in range(2):
        with closing(WorkFolder(tmp_path / "w")) as keep:
            device = bench.device(fake, keep, Options(compare_alone=True), train=train)
            scores.append(device._train_alone(work, _Stop(device)))
    assert trained == [1] and scores[0] == scores[1]


def alone_undisturbed(bench: Bench) -> object:
    fake = bench.coordinator(rounds=1)
    bench.device(fake, WorkMemory(bench.folder / "blobs"), Options(compare_alone=True)).run()
    return fake.reports["birds.1"]["alone"]


def test_a_copy_that_is_stopped_at_every_start_comes_to_its_end(bench: Bench, tmp_path: Path) -> None:
    """And the student, which has been uploaded, is in its place meanwhile."""
    fake, student = bench.coordinator(rounds=1), []

    def take_part(keep: WorkFolder) -> bool:
        begun, asked = [], []

        def stop_after_two_steps() -> bool:
            asked.extend(begun[:1])
            return len(asked) > 1

        device = bench.device(
            fake, keep, Options(compare_alone=True), stop_requested=stop_after_two_steps,
            watch=lambda event, **details: begun.append(event) if event == "training alone" else None,
        )  # fmt: skip
        try:
            device.run(rounds=1)
        except Interrupted:
            student.append(keep.student(bench.bundle))
            return False
        return True

    for _ in range(30):
        with closing(WorkFolder(tmp_path / "w")) as keep:
            if take_part(keep):
                break
    assert len(student) > 2 and fake.reports["birds.1"]["alone"] == alone_undisturbed(bench)
    with closing(WorkFolder(tmp_path / "w")) as keep:
        settled = keep.student(bench.bundle)
    for one in student:
        assert all((one[name] == settled[name]).all() for name in settled)
    assert not list((tmp_path / "w").glob("*training-*"))


def test_training_alone_waits_for_the_conditions_as_well(bench: Bench, tmp_path: Path) -> None:
    fake, now_s, seen = bench.coordinator(rounds=1, deadline_s=1e6), [0.0], []

    def clock() -> float:
        now_s[0] += 8.0
        return now_s[0]

    def read_status() -> dict[str, object]:
        low = "training alone" in seen and seen.count("waiting alone") < 3
        seen.extend(["waiting alone"] * low)
        return {"battery": 0.1 if low else 0.9, "charging": False}

    with closing(WorkFolder(tmp_path / "w")) as keep:
        device = bench.device(
            fake, keep, Options(compare_alone=True), clock=clock, read_status=read_status,
            conditions=Conditions(minimum_battery=0.5), watch=lambda event, **details: seen.append(event),
        )  # fmt: skip
        assert device.run() == 1
    assert seen.count("training alone") == 2 and seen.count("waiting alone") == 3 and "settled" in seen
    assert seen.index("training alone") < seen.index("waiting") < len(seen) - 1 - seen[::-1].index("training alone")
    assert fake.reports["birds.1"]["alone"] == alone_undisturbed(bench)


def test_a_copy_that_is_damaged_or_cannot_be_kept_costs_no_round(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, warned = bench.coordinator(rounds=4), []

    def watch(event: str, /, **details: object) -> None:
        warned.extend([str(details["message"])] if event == "warning" else [])

    with closing(WorkFolder(tmp_path / "w")) as keep:
        device = bench.device(fake, keep, Options(compare_alone=True), watch=watch)

        def refuse(*_: object) -> None:
            raise WireError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(keep, "keep_alone", refuse)
            assert device.run(rounds=1) == 1
        (tmp_path / "w" / f"alone-{bench.bundle.model_digest[:16]}.safetensors").write_bytes(b"damaged")
        assert device.run() == 3
        assert keep.alone(bench.bundle).done == "birds.4"
    told = [fake.reports[f"birds.{number}"]["alone"] is not None for number in (1, 2, 3, 4)]
    assert told == [False, False, False, True], "it has caught up"
    assert "No space left" in warned[0] and "starts anew" in warned[1] and len(warned) == 2
