"""The address that people and devices are told: one that other machines reach, and that the certificate is for."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from edgestill.coordinator.settings import Settings

EVERYWHERE = ("0.0.0.0", "::", "")
"""What to listen on for every address of this machine."""


def url_of(settings: Settings, port: int) -> str:
    """The public URL where one is set; else the first name or address of this machine that fits."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = settings.host
    if host in EVERYWHERE:
        # few networks resolve a bare host name, so an address of the network is better
        found = lan_addresses(host)
        host = next((name for name in _names(found) if _objection(settings, name) is None), next(_names(found)))
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"


def _names(addresses: list[str]) -> Iterator[str]:
    """What this machine may be called; a name is looked up, which may take long, only once it is asked for."""
    yield from addresses
    yield socket.getfqdn()
    yield socket.gethostname()


def lan_addresses(host: str) -> list[str]:
    """The IPv4 addresses of this machine that `host` stands for, loopback left out."""
    if host not in EVERYWHERE:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, socket.AF_INET)})
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # nothing is sent: connecting a datagram socket only chooses the address of the outgoing interface
                probe.connect(("192.0.2.1", 9))
            except OSError:
                return []
            found = [probe.getsockname()[0]]
    return [address for address in found if not is_loopback(address)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_private(settings: Settings) -> bool:
    """Whether the coordinator is meant for this machine alone, by where it listens and what devices are told."""
    public = urlsplit(settings.public_url).hostname
    return is_loopback(settings.host) and (public is None or is_loopback(public))


def risks_of(settings: Settings, url: str) -> list[str]:
    """What anyone on the network can do or nobody can, a sentence each, and what to do; on loopback validity alone."""
    found = []
    host = urlsplit(url).hostname or ""
    said = _objection(settings, host) or ""
    if "has expired" in said or "not yet valid" in said:
        when = "has run out" if "expired" in said else "begins later than now"
        found.append(f"the certificate {when}, so devices will refuse it: give one that holds, or set this clock")
    if is_loopback(settings.host):
        return found
    if said and not found and not settings.public_url:
        found.append(
            f"the certificate is not for {host}, so devices will refuse it: give --public-url with a name that it has"
        )
    if not settings.dashboard_token:
        found.append(
            "everyone who reaches this address sees the dashboard and /metrics, and nobody gets the global model over "
            "HTTP: set EDGESTILL_DASHBOARD_TOKEN"
        )
    if settings.tls_cert is None and not settings.public_url.startswith("https://"):
        found.append(
            "without TLS, codes, tokens and uploads cross the network in clear: give --tls-cert and --tls-key, or put "
            "a proxy in front and give its https address as --public-url (docs/operations.md)"
        )
    return found


def objection(certificate: Path, key: Path, name: str) -> str | None:
    """Why a client that trusts the certificate does not take it for that host, in OpenSSL's words, by a handshake with
    ourselves; None where it does.

    Errors: SSLError, OSError for files that cannot be used.
    """
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key, password=_no_password)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.load_verify_locations(certificate)
    client_side.hostname_checks_common_name = False  # no browser looks there
    client_side.verify_flags |= (
        ssl.VERIFY_X509_PARTIAL_CHAIN
    )  # the certificate itself is trusted, whoever signed it
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(8):  # a handshake takes two rounds
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
            if side is client:
                return None
    return "the handshake did not end"


def _objection(settings: Settings, name: str) -> str | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return objection(settings.tls_cert, settings.tls_key, name)
    except (ssl.SSLError, OSError, EncryptedKey, ValueError):
        return None  # a key with a password, which uvicorn asks for


class EncryptedKey(Exception):
    """A private key that needs a password."""


def _no_password() -> str:
    raise EncryptedKey
