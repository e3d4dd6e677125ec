"""Step 5 in another process: it does the work, and every way to fail ends the round with a reason."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgestill.coordinator.distillation.worker import run_in_process, run_in_thread, runner_for
from edgestill.coordinator.http.app import make_app
from tests.support.coordinator_site import Site, make_site, outputs

pytestmark = pytest.mark.contract
WORKER = (sys.executable, "-m", "edgestill.coordinator.distillation.worker")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A round whose step 5 is due."""
    site = make_site(tmp_path, f"sqlite:///{tmp_path / 'coordinator.db'}")
    site.clock.now_s = time.time()  # the worker has no other clock
    devices = [site.enrol(), site.enrol()]
    site.service.tick()
    for seed, device in enumerate(devices):
        assert device.work().status_code == 200
        assert device.upload("birds.1", outputs(seed)).status_code == 201
    return site


def run_job(site: Site, command: tuple[str, ...]) -> None:
    (job,) = site.service.tick()
    asyncio.run(run_in_process(site.app.state.context, job, command))


def first_round(site: Site):
    return next(one for one in site.service.rounds("birds") if one.number == 1)


def test_a_worker_publishes_what_a_thread_would(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_job(site, WORKER)
    assert "INFO coordinator: round birds.1 is completed" in capfd.readouterr().err
    site.service.tick()
    published = first_round(site)
    assert published.phase == "completed" and published.reason is None

    other = tmp_path / "other"
    other.mkdir()
    twin = make_site(other)
    twin.service.tick()
    (one, two) = (twin.enrol(), twin.enrol())
    for seed, device in enumerate((one, two)):
        assert device.work().status_code == 200
        assert device.upload("birds.1", outputs(seed)).status_code == 201
    (job,) = twin.service.tick()
    assert runner_for(twin.settings) is run_in_thread, "no other process sees a store in memory"
    asyncio.run(run_in_thread(twin.app.state.context, job))
    assert first_round(twin).published == published.published


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "import sys; print('no memory', file=sys.stderr); sys.exit(3)",
            "failed with exit code 3: no memory",
        ),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9"),
        ("print('x' * 1000000); import sys; sys.stderr.write('y' * 1000000); sys.exit(1)", "exit code 1"),
    ],
)
def test_a_worker_that_fails_ends_the_round(site: Site, script: str, reason: str) -> None:
    run_job(site, (sys.executable, "-c", script))
    site.service.tick()
    ended = first_round(site)
    assert ended.phase == "abandoned" and reason in ended.reason
    assert [one.number for one in site.service.rounds("birds")] == [1, 2] or site.service.tick() == []


def test_a_worker_that_never_returns_is_killed_at_the_deadline(tmp_path: Path) -> None:
    site = make_site(tmp_path, f"sqlite:///{tmp_path / 'coordinator.db'}")
    context = site.app.state.context
    from edgestill.coordinator.distillation.worker import _work

    noted = tmp_path / "pid"
    script = f"import os, time; open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    reason = asyncio.run(_work(b"{}\n", (sys.executable, "-c", script), 2.0))
    assert reason == "took longer than 2 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    assert context.metrics is not None


def test_a_worker_that_has_done_its_work_exits_with_0_while_its_coordinator_listens(
    site: Site, tmp_path: Path
) -> None:
    (job,) = site.service.tick()
    order = {
        "settings": site.settings.as_json(secrets=True),
        "job": dataclasses.asdict(job),
        "folder": str(tmp_path),
    }
    worker = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    worker.stdin.write(json.dumps(order).encode() + b"\n")
    worker.stdin.flush()  # and stays open, as a coordinator's end of it does
    assert worker.wait(timeout=60) == 0, worker.stderr.read()
    worker.stdin.close()
    worker.stderr.close()
    assert first_round(site).phase == "completed"


def test_a_worker_ends_with_its_coordinator() -> None:
    script = "import sys, edgestill.coordinator.distillation.worker as w; w._end_with(sys.stdin.fileno())"
    worker = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    worker.stdin.close()
    assert worker.wait(timeout=60) == 3


def test_the_loop_runs_the_worker_and_opens_the_next_round(site: Site) -> None:
    from starlette.testclient import TestClient

    site.service.clock = time.time
    with TestClient(make_app(site.service, site.settings)) as client:
        deadline = time.monotonic() + 60
        while first_round(site).phase != "completed" and time.monotonic() < deadline:
            client.get("/healthz")
            time.sleep(0.1)
    assert first_round(site).phase == "completed"
