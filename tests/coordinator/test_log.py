"""What the coordinator says of itself: a line each, once, and no secret in any."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.coordinator_site import Site, make_site, outputs, problem_of

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def test_a_federation_in_its_log(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="coordinator")
    one, two = site.enrol(), site.enrol()
    assert one.work().status_code == 200 and two.work().status_code == 200
    assert problem_of(one.upload("birds.1", b"nonsense")) == "malformed"
    assert problem_of(one.upload("birds.1%0Aforged", b"nonsense")) in ("no_such_round", "not_found")
    assert one.upload("birds.1", outputs(1)).status_code == 201
    assert two.upload("birds.1", outputs(2)).status_code == 201
    (job,) = site.service.tick()
    site.service.tick()
    site.clock.now_s += 3
    site.service.run_job(job, tmp_path)
    site.service.tick()
    site.clock.now_s += 60
    site.service.tick()
    (first, second) = site.service.rounds("birds")
    lines = [record.getMessage() for record in caplog.records if record.name == "coordinator"]
    assert [line for line in lines if "forged" not in line] == [
        f"device {one.name} is enrolled for task birds",
        f"device {two.name} is enrolled for task birds",
        "round birds.1 is open, for 60 s",
        f"upload of {one.name} for round 'birds.1' is refused: malformed",
        "round birds.1 has collected 2 uploads",
        "step 5 of birds.1 has started",
        "step 5 of birds.1 has ended after 3.0 s",
        f"round birds.1 is completed, published {first.published}",
        "round birds.2 is open, for 60 s",
        f"round birds.2 is abandoned: {second.reason}",
    ]
    text = "\n".join(lines)
    assert not any("\n" in line for line in lines)
    for secret in (one.token, two.token, one.code, two.code, one.code.replace("-", "")):
        assert secret not in text


def test_nothing_is_said_of_what_was_not_committed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="coordinator")
    with pytest.raises(ZeroDivisionError), site.service.store.write() as transaction:
        transaction.say("never")
        raise ZeroDivisionError
    assert caplog.records == []


def test_workers_log_like_the_server() -> None:
    script = (
        "from edgestill.coordinator.opening import start_logging; import logging;"
        "from edgestill.coordinator.settings import Settings;"
        "start_logging(Settings()); logging.getLogger('coordinator').info('heard')"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert said.endswith("INFO coordinator: heard\n")
