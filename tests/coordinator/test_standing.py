"""What a waiting device is told of the present round."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.runtime.device.client import HttpCoordinator
from tests.support.coordinator_site import INFO, Device, Site, make_site, outputs, problem_of

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def test_a_device_that_has_uploaded_hears_of_the_others(site: Site) -> None:
    one, two = site.enrol(), site.enrol()
    nothing = {
        "round": None, "phase": None, "uploads": 0, "goal": 2, "seconds_left": None, "best_round": None,
    }  # fmt: skip
    assert one.get("/v1/standing").json() == nothing
    assert {device.work().json()["round"] for device in (one, two)} == {"birds.1"}
    assert one.upload("birds.1", outputs(1)).status_code == 201
    site.clock.now_s += 20
    collecting = nothing | {"round": "birds.1", "phase": "collecting", "uploads": 1, "seconds_left": 40.0}
    assert one.get("/v1/standing").json() == two.get("/v1/standing").json() == collecting
    assert two.upload("birds.1", outputs(2)).status_code == 201
    aggregating = one.get("/v1/standing").json()
    assert (aggregating["phase"], aggregating["uploads"]) == ("aggregating", 2)
    for job in site.service.tick():
        site.service.run_job(job, site.folder)
    ended = one.get("/v1/standing").json()
    assert (ended["round"], ended["phase"], ended["seconds_left"]) == ("birds.1", "completed", None)


def test_only_a_device_of_the_task_hears_of_it(site: Site) -> None:
    assert problem_of(site.client.get("/v1/standing")) == "unauthorised"


def test_a_coordinator_that_does_not_say_is_no_failure() -> None:
    import httpx2

    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        return httpx2.Response((404, 503, 200)[len(asked) - 1], content=iter([b"{}"]))

    client = HttpCoordinator("http://c", transport=httpx2.MockTransport(answer))
    assert client.standing() is None and client.standing() is None and client.standing() is None
    assert asked == ["/v1/standing"] * 3


def test_a_device_that_fitted_no_student_says_that_it_has_more_now(site: Site) -> None:
    little = {**INFO, "memory_bytes": 999}
    code = site.service.issue_code("birds")
    enrolled = site.client.post("/v1/enrol", json={"code": code, "device": little}).json()
    device = Device(site, enrolled["device"], enrolled["token"], code)
    refused = device.get("/v1/assignment")
    assert problem_of(refused) == "no_fitting_student"
    assert "cnn3 needs 0.1 MB and onnxruntime" in refused.json()["detail"]
    assert problem_of(site.client.put("/v1/info", json=INFO)) == "unauthorised"
    empty = site.client.put("/v1/info", json={**INFO, "engines": []}, headers=device.headers)
    assert problem_of(empty) == "invalid"
    for _ in range(2):
        assert site.client.put("/v1/info", json=INFO, headers=device.headers).status_code == 204
    assert device.get("/v1/assignment").json()["student"]["student"] == "cnn3"
    told = site.client.put("/v1/info", json=little, headers=device.headers)
    assert told.status_code == 204 and problem_of(device.get("/v1/assignment")) == "no_fitting_student"
    assert [one.info["memory_bytes"] for one in site.service.devices("birds")] == [999]
