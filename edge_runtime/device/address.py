"""A coordinator's address: its form, the certificates that are trusted there, and what to try when nobody answers."""

from __future__ import annotations

import ssl
from pathlib import Path

from edgestill.runtime.errors import UsageError

_HANG_UPS = ("disconnected without", "reset by peer", "invalid HTTP")
"""What a server that speaks TLS does when it is spoken to without."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")


def check_url(url: str) -> str:
    """The coordinator's address without a trailing slash. Errors: UsageError."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https") or not rest.strip("/") or "@" in rest or "?" in rest or "#" in rest:
        raise UsageError(f"{url!r} is no coordinator's address", "give http://HOST:PORT or https://HOST:PORT")
    return url.rstrip("/")


def tls_context(ca_cert: Path | None) -> ssl.SSLContext | bool:
    """What httpx2 verifies with: the system's certificates, or those of the file alone. Errors: UsageError."""
    if ca_cert is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_cert))
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--ca-cert {ca_cert}: {error}", "give a PEM file of certificates") from error


def hint_unreachable(url: str, reason: str) -> str:
    """What to look at when requests to an address fail for that reason."""
    scheme, _, rest = url.partition("://")
    if scheme == "https" and any(sign in reason.upper().replace(" ", "_") for sign in _NO_TLS):
        return f"nothing there speaks TLS, it seems: try http://{rest}"
    if "CERTIFICATE" in reason:
        return "for a certificate of your own, give --ca-cert"
    hint = "check the address, the network, and that `edgestill serve` runs there"
    if scheme == "http" and any(sign in reason for sign in _HANG_UPS):
        return f"if it serves TLS, try https://{rest}; else {hint}"
    return hint
