"""`edgestill device`: who is there, and whose token is worth nothing any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgestill.coordinator import service as services
from edgestill.coordinator.liveness import REVOKED
from edgestill.coordinator.opening import open_existing
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import load_settings
from edgestill.runtime.cli import main
from tests.support.coordinator_commands import CREATE, make_place  # noqa: F401  fixture

pytestmark = pytest.mark.contract
INFO = {"name": "lab\x1b[31m", "engines": ["native"], "memory_bytes": None, "processor": "x", "version": "1"}


@pytest.fixture
def service(place: Path) -> Service:
    assert main([*CREATE, "--exchange", "latents", "--mode", "consensus"]) == 0
    return open_existing(load_settings({"data_dir": "fed"}))


def enrol(service: Service) -> dict[str, str]:
    return service.enrol(service.issue_code("birds"), INFO)


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    capsys.readouterr()
    assert main(["device", "list", *words, "--data-dir", "fed", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_devices_are_listed_and_revoked(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys) == []
    one, two = enrol(service), enrol(service)
    assert [row["device"] for row in listed(capsys, "birds")] == [one["device"], two["device"]]
    assert main(["device", "list", "--data-dir", "fed"]) == 0
    said = capsys.readouterr().out
    assert "waiting" in said and "\x1b" not in said

    words = ["device", "revoke", "--data-dir", "fed"]
    assert main([*words, one["device"], "d-nobody"]) == 2
    said = capsys.readouterr().err
    assert "no device d-nobody" in said and "`edgestill device list --data-dir fed`" in said
    assert service.authenticate(one["token"]).name == one["device"], "none, where one is not there"
    assert main([*words, one["device"]]) == 0 and main([*words, one["device"]]) == 0
    said = capsys.readouterr().err
    assert "revoked" in said and "was revoked before" in said
    assert [row["state"] for row in listed(capsys)] == [REVOKED, "waiting"]
    with pytest.raises(Problem, match="not known"):
        service.authenticate(one["token"])
    assert service.authenticate(two["token"]).name == two["device"]
    assert main(["device", "list", "fish", "--data-dir", "fed"]) == 2
    assert "there are: birds" in capsys.readouterr().err


def test_a_running_coordinator_forgets_whom_it_knew(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory of tokens is short; another process revoked the device."""
    device = enrol(service)
    service.authenticate(device["token"])
    assert main(["device", "revoke", device["device"], "--data-dir", "fed"]) == 0
    assert service.identify(device["token"]).name == device["device"]
    now_s = services.time.monotonic() + services._IDENTIFIED_S + 1
    monkeypatch.setattr(services.time, "monotonic", lambda: now_s)
    with pytest.raises(Problem, match="not known"):
        service.identify(device["token"])
