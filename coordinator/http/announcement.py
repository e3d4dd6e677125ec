"""Announces the coordinator on the local network by mDNS as `_edgestill._tcp`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from edgestill.runtime.device.discovery import SERVICE
from edgestill.runtime.errors import EdgestillError, UsageError


@contextmanager
def announce(url: str, host: str, port: int) -> Iterator[None]:
    """The announcement stands while the block runs; the TXT record `url` is where to go.

    Errors: EdgestillError without the package zeroconf; UsageError for a host that no other machine reaches.
    """
    try:
        from zeroconf import ServiceInfo, Zeroconf
    except ModuleNotFoundError as error:
        raise EdgestillError(
            "--mdns needs the Python package zeroconf", "pip install 'edgestill[discovery]'"
        ) from error
    addresses = [address for address in _addresses(host) if not address.startswith("127.")]
    if not addresses:
        raise UsageError(
            f"--mdns while listening on {host}", "add --host 0.0.0.0, so that others can connect"
        )
    name = socket.gethostname().split(".")[0]
    info = ServiceInfo(
        SERVICE,
        f"{name}-{port}.{SERVICE}",
        parsed_addresses=addresses,
        port=port,
        properties={"url": url},
        server=f"{name}.local.",
    )
    network = Zeroconf()
    try:
        network.register_service(info, allow_name_change=True)
        yield
    finally:
        network.unregister_all_services()
        network.close()


def _addresses(host: str) -> list[str]:
    """The IPv4 addresses of this machine that `host` stands for."""
    if host not in ("0.0.0.0", "::", ""):
        return sorted({entry[4][0] for entry in socket.getaddrinfo(host, None, socket.AF_INET)})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # nothing is sent: connecting a datagram socket only chooses the address of the outgoing interface
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return []
        return [probe.getsockname()[0]]
