"""A coordinator's address: its form, the certificates that are trusted there, and what to try when nobody answers."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

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


def hint_unreachable(url: str, reason: str, ca_cert: Path | None = None) -> str:
    """What to look at when requests to an address fail for that reason; `ca_cert`: what is trusted there alone."""
    scheme, _, rest = url.partition("://")
    if scheme == "https" and any(sign in reason.upper().replace(" ", "_") for sign in _NO_TLS):
        return f"nothing there speaks TLS, it seems: try http://{rest}"
    if "certificate verify failed" in reason.lower():
        return _hint_untrusted(urlsplit(url).hostname, reason.lower(), ca_cert)
    if "CERTIFICATE" in reason:
        return "for a certificate of your own, give --ca-cert"
    hint = "check the address, the network, and that `edgestill serve` runs there"
    if scheme == "http" and any(sign in reason for sign in _HANG_UPS):
        return f"if it serves TLS, try https://{rest}; else {hint}"
    return hint


def _hint_untrusted(host: str | None, reason: str, ca_cert: Path | None) -> str:
    """Whose fault it is that a certificate is not trusted, by what OpenSSL says (X509_verify_cert_error_string(3))."""
    clock = f"this device's clock says {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    if "has expired" in reason:
        return (
            f"the coordinator's certificate has run out: whoever runs it must renew it, and start `edgestill serve` "
            f"anew; or the clock is wrong: {clock}"
        )
    if "not yet valid" in reason:
        return f"the coordinator's certificate begins later: {clock}; set it if that is wrong"
    if "mismatch" in reason:
        return (
            f"the certificate is not for {host}: give the name or address that it is for, or let the coordinator have "
            f"one for {host}"
        )
    if "revoked" in reason:
        return "the coordinator's certificate was revoked: whoever runs it must get a new one"
    if "key identifier" in reason or "key usage" in reason:
        return (
            "since 3.13, Python wants certificates with key identifiers and an authority with key usage: whoever runs "
            "the coordinator must make them anew; `openssl req -x509 -addext keyUsage=critical,keyCertSign` writes them"
        )
    if ca_cert is not None:
        return f"{ca_cert} does not vouch for the coordinator's certificate: give the one that signed it with --ca-cert"
    if "self-signed certificate in certificate chain" in reason or "self signed certificate in" in reason:
        return "its certificate is signed by a private authority: give that authority's with --ca-cert, as a PEM file"
    if "self-signed" in reason or "self signed" in reason:
        return "the coordinator made its certificate itself: give that certificate with --ca-cert, as a PEM file"
    if "unable to get" in reason:
        return (
            "nobody whom this device trusts vouches for the certificate: for a private authority give its certificate "
            "with --ca-cert; for a public one the coordinator's --tls-cert must hold the whole chain"
        )
    return "the coordinator's certificate cannot be trusted; for one of your own, give --ca-cert"
