"""Announces the coordinator on the local network by mDNS as `_edgestill._tcp`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from edgestill.coordinator.http.address import lan_addresses
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
    addresses = lan_addresses(host)
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
