"""Finding a coordinator by mDNS: what an announcement says, and which one is taken."""

from __future__ import annotations

import os
import sys

import pytest

from edgestill.runtime.device import discovery
from edgestill.runtime.errors import EdgestillError


@pytest.mark.parametrize(
    ("properties", "addresses", "url"),
    [
        ({"url": "https://pi.example:8443"}, ["127.0.0.1"], "https://pi.example:8443"),
        ({"url": "http://laptop:8321"}, ["127.0.0.1"], "http://127.0.0.1:8321"),
        ({"url": "https://laptop:8443"}, ["127.0.0.1"], "https://laptop:8443"),
        ({"url": "file:///etc"}, ["fe80::1", "127.0.0.1"], "http://127.0.0.1:8321"),
        ({}, ["fe80::1"], "http://[fe80::1]:8321"),
        ({}, [], None),
    ],
)
def test_an_announcement_gives_an_address(
    properties: dict[str, str], addresses: list[str], url: str | None
) -> None:
    zeroconf = pytest.importorskip("zeroconf")
    info = zeroconf.ServiceInfo(
        discovery.SERVICE,
        f"pi.{discovery.SERVICE}",
        port=8321,
        properties=properties,
        parsed_addresses=addresses,
    )
    found = discovery.read_announcement(f"pi.{discovery.SERVICE}", info)
    assert (None if found is None else (found.name, found.url)) == (None if url is None else ("pi", url))


@pytest.mark.contract
def test_a_coordinator_on_this_machine_is_found_by_mdns() -> None:
    zeroconf = pytest.importorskip("zeroconf")
    name, only = f"test-{os.getpid()}", ["127.0.0.1"]
    info = zeroconf.ServiceInfo(
        discovery.SERVICE, f"{name}.{discovery.SERVICE}", port=8321, properties={"url": "https://pi.example:8443"},
        parsed_addresses=only, server=f"{name}.local.",
    )  # fmt: skip
    try:
        announcing = zeroconf.Zeroconf(interfaces=only)
    except OSError as error:
        pytest.skip(f"no multicast here: {error}")
    found: list[str] = []
    try:
        announcing.register_service(info)
        for wait_s in (2.0, 4.0, 8.0):
            found = found or [
                one.url for one in discovery.discover(wait_s, interfaces=only) if one.name == name
            ]
            if found:
                break
    finally:
        announcing.close()
    if not found:
        pytest.skip("the loopback interface carries no multicast here")
    assert found == ["https://pi.example:8443"]


def test_discovery_says_what_to_install_and_chooses_nobody_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = discovery.Found("a", "http://192.0.2.1:1"), discovery.Found("b", "http://192.0.2.2:1")
    for answers, message in (([], "no coordinator"), ([one, other], "several")):
        monkeypatch.setattr(discovery, "discover", lambda *_, answers=answers: answers)
        with pytest.raises(EdgestillError, match=message):
            discovery.find_one()
    monkeypatch.setattr(discovery, "discover", lambda *_: [one])
    assert discovery.find_one() == one
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(EdgestillError, match="zeroconf"):
        discovery.find_one()
