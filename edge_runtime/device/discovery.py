"""Finding a coordinator on the local network by mDNS, for people who do not know its address.

An announcement proves nothing: anyone on the network can make one. The enrolment code goes to whoever announced
itself, so use it on a network that you trust, or give the address and https. Sources: RFC 6762, RFC 6763.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edgestill.runtime.device.address import check_url
from edgestill.runtime.errors import EdgestillError, UsageError

SERVICE = "_edgestill._tcp.local."
_DOTTED = re.compile(r"://[^/]*[.\[]")


@dataclass(frozen=True)
class Found:
    """A coordinator that announced itself."""

    name: str
    url: str


def discover(timeout_s: float = 3.0, interfaces: list[str] | None = None) -> list[Found]:
    """The coordinators that answer within the time, all of which it takes, ordered by name.

    `interfaces`: addresses to ask on; None for all. Errors: EdgestillError where zeroconf is not installed.
    """
    zeroconf = _import_zeroconf()
    found: dict[str, Found] = {}

    class _Listener(zeroconf.ServiceListener):  # type: ignore[misc, name-defined]
        def add_service(self, asked, type_: str, name: str) -> None:
            info = asked.get_service_info(type_, name, timeout=int(timeout_s * 1000))
            coordinator = None if info is None else read_announcement(name, info)
            if coordinator is not None:
                found[name] = coordinator

        def update_service(self, asked, type_: str, name: str) -> None:
            self.add_service(asked, type_, name)

        def remove_service(self, asked, type_: str, name: str) -> None:
            found.pop(name, None)

    with _opened(zeroconf, interfaces) as asked:
        browser = zeroconf.ServiceBrowser(asked, SERVICE, _Listener())
        time.sleep(timeout_s)
        browser.cancel()
    return sorted(found.values(), key=lambda coordinator: coordinator.name)


def find_one(timeout_s: float = 5.0, interfaces: list[str] | None = None) -> Found:
    """The only coordinator that answers in the time. Errors: EdgestillError for none or several, naming them."""
    found = discover(timeout_s, interfaces)
    if len(found) == 1:
        return found[0]
    if not found:
        raise EdgestillError(
            f"no coordinator announced itself within {timeout_s:g} s",
            "give its address, http://HOST:PORT: many networks do not carry mDNS",
        )
    names = ", ".join(f"{coordinator.name} at {coordinator.url}" for coordinator in found)
    raise EdgestillError(f"several coordinators announced themselves: {names}", "give one's address")


def read_announcement(name: str, info: Any) -> Found | None:
    """The address that an announcement names, else the one it came from; None for neither.

    A bare host name over http gives way to the number: few networks resolve it, and no certificate needs it.
    """
    announced = (info.properties.get(b"url") or b"").decode("utf-8", "replace")
    addresses = sorted(info.parsed_addresses(), key=lambda address: ":" in address)
    try:
        url = check_url(announced)
    except UsageError:
        url = ""
    if not url or (url.startswith("http://") and not _DOTTED.search(url)):
        if not addresses or not info.port:
            return None
        host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
        url = f"http://{host}:{info.port}"
    return Found(name.removesuffix(f".{SERVICE}"), url)


@contextmanager
def _opened(zeroconf: ModuleType, interfaces: list[str] | None) -> Iterator:
    try:
        opened = zeroconf.Zeroconf(interfaces=interfaces or zeroconf.InterfaceChoice.All)
    except OSError as error:
        raise EdgestillError(
            f"mDNS does not work here: {error.strerror or error}", "give the coordinator's address"
        ) from error
    try:
        yield opened
    finally:
        opened.close()


def _import_zeroconf() -> ModuleType:
    try:
        import zeroconf
    except ImportError as error:
        raise EdgestillError(
            "finding a coordinator by mDNS needs the Python package zeroconf",
            "pip install 'edgestill[discovery]', or give the coordinator's address",
        ) from error
    return zeroconf
