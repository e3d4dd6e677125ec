"""Which Host headers are answered: those of a page that had its name lead here are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from edgestill.coordinator.http.hosts import host_of, known_hosts
from edgestill.coordinator.settings import Settings
from edgestill.runtime.errors import UsageError
from tests.support.coordinator_site import make_site, problem_of


@pytest.mark.parametrize(
    "header, host",
    [
        ("localhost", "localhost"), ("LocalHost:8000", "localhost"), ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "::1"), ("[::1]", "::1"), ("edge.example.:8000", "edge.example"), ("", ""),
        ("localhost.trap.example", "localhost.trap.example"), ("[localhost", "localhost"),
    ],
)  # fmt: skip
def test_a_host_header_is_read_without_its_port(header: str, host: str) -> None:
    assert host_of(header) == host


@pytest.mark.parametrize(
    "settings, known",
    [
        ({}, {"localhost", "127.0.0.1", "::1"}),
        ({"host": "127.0.0.9"}, {"localhost", "127.0.0.1", "::1", "127.0.0.9"}),
        (
            {"public_url": "https://Edge.example:8443/x"},
            {"localhost", "127.0.0.1", "::1", "edge.example"},
        ),
        ({"allowed_hosts": "a.example, B"}, {"localhost", "127.0.0.1", "::1", "a.example", "b"}),
        ({"dashboard_token": "sesame"}, None),
        ({"host": "0.0.0.0"}, None),
        ({"host": "somewhere"}, None),
        ({"host": "0.0.0.0", "allowed_hosts": "a"}, {"localhost", "127.0.0.1", "::1", "0.0.0.0", "a"}),
    ],
)
def test_names_are_checked_where_only_this_machine_may_look_or_where_some_are_given(
    settings: dict[str, str], known: set[str] | None
) -> None:
    assert known_hosts(Settings(**settings)) == known


def test_another_name_is_refused_on_every_page(tmp_path: Path) -> None:
    site = make_site(tmp_path, allowed_hosts="")
    for path in ("/", "/events", "/metrics", "/docs", "/v1/assignment", "/static/dashboard.js"):
        for host in ("trap.example", "trap.example:8000", "127.0.0.1.trap.example", "testserver"):
            answer = site.client.get(path, headers={"Host": host})
            assert answer.status_code == 421 and problem_of(answer) == "misdirected"
            assert "birds" not in answer.text and host not in answer.text
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        answer = site.client.get("/", headers={"Host": host})
        assert answer.status_code == 200 and "birds" in answer.text
    figures = site.client.get("/metrics", headers={"Host": "localhost"}).text
    assert 'edgestill_refusals_total{kind="misdirected"} 24.0' in figures


def test_a_further_name_is_answered(tmp_path: Path) -> None:
    site = make_site(tmp_path, allowed_hosts="edge.example")
    with_name = TestClient(site.app, base_url="https://edge.example")
    assert with_name.get("/").status_code == 200
    assert TestClient(site.app, base_url="https://other.example").get("/").status_code == 421


@pytest.mark.parametrize(
    "name", ["edge.example:8000", "https://edge.example", "[::1]", "edge.example.", "a b"]
)
def test_a_name_that_would_never_match_is_refused_at_start(name: str) -> None:
    with pytest.raises(UsageError, match="allowed_hosts") as caught:
        Settings(allowed_hosts=f"localhost, {name}")
    assert repr(name) in str(caught.value) and "edge.example" in caught.value.hint


def test_addresses_are_names_too() -> None:
    assert {"::2", "192.0.2.7", "my_box"} <= known_hosts(Settings(allowed_hosts="::2,192.0.2.7, my_box,"))
