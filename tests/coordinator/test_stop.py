"""A task that the operator stops: no rounds, no devices, no result that comes after it, on every store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from edgestill.coordinator.dashboard.views import view_task
from edgestill.coordinator.liveness import Liveness
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.rounds.round import ABANDONED, COMPLETED
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import ObjectBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.transaction import Transaction
from edgestill.runtime.cli import main
from tests.support.coordinator_backends import (  # noqa: F401  fixtures
    postgresql_server,
    postgresql_url,
    store_url,
)
from tests.support.coordinator_commands import CREATE, make_place, run_json, serving  # noqa: F401  fixture
from tests.support.coordinator_round import Clock, add_task, enrol, run_due, submit
from tests.support.coordinator_site import INFO, problem_of

pytestmark = pytest.mark.unit


class Place:
    """A store with two replicas, and one device of task `birds`."""

    def __init__(self, url: str, folder: Path) -> None:
        self.clock, self.folder, blobs = Clock(), folder, ObjectBlobs("memory://")
        store = Store(url)
        other = store if url == "sqlite://" else Store(url)
        self.one, self.two = Service(store, blobs, self.clock), Service(other, blobs, self.clock)
        self.task = add_task(self.one, folder, goal=1, rounds=3)
        self.device = enrol(self.one)

    def refusal(self) -> str:
        with pytest.raises(Problem) as caught:
            self.one.ask(self.device, {})
        return caught.value.kind


@pytest.fixture
def place_of_two(store_url: str, tmp_path: Path) -> Place:  # noqa: F811
    return Place(store_url, tmp_path)


def test_the_open_round_is_abandoned_and_none_follows(place_of_two: Place) -> None:
    site = place_of_two
    assert site.one.ask(site.device, {}) is not None
    submit(site.one, site.task, site.device, "birds.1")
    assert run_due(site.one, site.folder) == 1
    assert site.one.ask(site.device, {}) is not None
    code = site.one.issue_code("birds")
    assert site.two.stop_task("birds")
    assert not site.two.stop_task("birds") and not site.one.stop_task("birds")

    first, second = site.one.rounds("birds")
    assert first.phase == COMPLETED and first.published is not None
    assert (second.phase, second.reason) == (ABANDONED, "stopped by the operator")
    assert site.refusal() == "task_finished"
    with pytest.raises(Problem, match="no rounds left"):
        site.one.enrol(code, {})
    with pytest.raises(Problem) as late:
        submit(site.one, site.task, site.device, "birds.2")
    assert late.value.kind == "late"
    for _ in range(3):
        site.clock.now_s += 100
        assert site.one.tick() == [] == site.two.tick()
    assert len(site.one.rounds("birds")) == 2 and len(site.one.devices("birds")) == 1
    (record,) = site.one.tasks()
    assert record.finished and record.stopped_s == 1000.0 and record.ended == "stopped"
    assert view_task(record, site.one.rounds("birds"), [], [], Liveness(site.clock.now_s, 110.0)).state == "stopped"


def test_a_step_5_that_runs_publishes_nothing_more(place_of_two: Place) -> None:
    site = place_of_two
    site.one.ask(site.device, {})
    submit(site.one, site.task, site.device, "birds.1")
    (job,) = site.one.tick()
    assert site.two.stop_task("birds")
    site.one.run_job(job, site.folder)
    (only,) = site.one.rounds("birds")
    assert (only.phase, only.reason, only.published) == (ABANDONED, "stopped by the operator", None)
    assert site.one.tick() == []


def test_a_task_may_be_stopped_before_its_first_round_and_not_after_its_last(place_of_two: Place) -> None:
    site = place_of_two
    other = add_task(site.one, site.folder / "more", name="fish", goal=1, rounds=1)
    assert site.one.stop_task("birds") and site.one.rounds("birds") == []
    swimmer = enrol(site.one, "fish")
    site.one.ask(swimmer, {})
    submit(site.one, other, swimmer, "fish.1")
    run_due(site.one, site.folder)
    assert not site.one.stop_task("fish")
    assert [record.ended for record in site.one.tasks()] == ["stopped", "finished"]
    with pytest.raises(Problem) as caught:
        site.one.stop_task("crows")
    assert caught.value.kind == "no_such_task"


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize("what", ["ask", "tick"])
def test_no_round_opens_when_the_task_is_stopped_between_looking_and_locking(
    place_of_two: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    site, write = place_of_two, place_of_two.one.store.write

    @contextmanager
    def stop_first() -> Iterator[Transaction]:
        site.two.stop_task("birds")
        with write() as transaction:
            yield transaction

    monkeypatch.setattr(site.one.store, "write", stop_first)
    if what == "ask":
        assert site.refusal() == "task_finished"
    else:
        assert site.one.tick() == []
    assert site.one.rounds("birds") == [] and site.one.tasks()[0].ended == "stopped"


@pytest.mark.contract
def test_stopping_from_another_process_wakes_the_devices(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CREATE, "--goal", "1", "--over-selection", "1"]) == 0
    stop = ["task", "stop", "birds", "--data-dir", "fed"]
    with serving() as (url, _), httpx2.Client(base_url=url, timeout=60) as client:
        tokens = []
        for _ in range(2):
            code = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"][0]
            tokens.append(client.post("/v1/enrol", json={"code": code, "device": INFO}).json()["token"])
        unused = run_json(capsys, "enrol", "--data-dir", "fed", "--task", "birds")["codes"][0]
        busy, idle = ({"Authorization": f"Bearer {token}"} for token in tokens)
        assert client.post("/v1/work", json={}, headers=busy).status_code == 200
        answers: list[httpx2.Response] = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                client.post("/v1/work", params={"wait_s": 25}, json={}, headers=idle)
            )
        )
        waiting.start()
        assert run_json(capsys, *stop) == {"name": "birds", "stopped": True}
        waiting.join()
        assert problem_of(answers[0]) == "task_finished" and answers[0].status_code == 410
        refused = client.post("/v1/enrol", json={"code": unused, "device": INFO})
        assert problem_of(refused) == "task_finished"
        assert "stopped" in client.get("/tasks/birds", headers={"Accept": "text/html"}).text
    assert main(stop) == 0 and "ended already" in capsys.readouterr().out
    assert main(["task", "show", "birds", "--data-dir", "fed"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 8 rounds completed, 2 devices; round 1 is abandoned; the task is stopped" in shown
    assert main(["task", "list", "--data-dir", "fed"]) == 0 and "stopped" in capsys.readouterr().out
    assert main(["enrol", "--task", "birds", "--data-dir", "fed"]) == 2
    assert "task birds is stopped" in (error := capsys.readouterr().err) and "hint:" in error
    assert main(["task", "stop", "crows", "--data-dir", "fed"]) == 2
