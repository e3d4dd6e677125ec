"""A certificate authority of one's own, which a device comes to trust by the fingerprint that its code carries.

The coordinator hands the certificate out to anyone. Nobody is believed for it: the device takes what has the
fingerprint, over a connection that it does not trust and on which it says nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from typing import Any

from edgestill.runtime.device.client import Refused, Unreachable, import_httpx2
from edgestill.runtime.errors import EdgestillError, UsageError

FINGERPRINT_LETTERS = 20
"""Of A-Z2-7, 100 bits: nobody finds another certificate for them."""
MOST_BYTES = 64 * 2**10
_GROUP = 5
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----\n.*?\n-----END CERTIFICATE-----\n?", re.DOTALL)


def only_certificate(text: str) -> str:
    """The one certificate in a PEM file. Errors: ValueError for none, several, or what cannot be one."""
    found = _CERTIFICATE.findall(text.replace("\r\n", "\n"))
    if len(found) != 1:
        raise ValueError(f"{len(found)} certificates, not one")
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found[0])
    return found[0].rstrip("\n") + "\n"


def fingerprint(certificate: str) -> str:
    """Of a certificate in PEM: the first letters of the SHA-256 of its DER form, in base32."""
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).digest()
    return base64.b32encode(digest).decode()[:FINGERPRINT_LETTERS]


def with_fingerprint(code: str, certificate: str) -> str:
    """An enrolment code that also carries an authority's fingerprint, in the same groups."""
    letters = fingerprint(certificate)
    groups = (letters[start : start + _GROUP] for start in range(0, FINGERPRINT_LETTERS, _GROUP))
    return "-".join((code, *groups))


def fetch_authority(url: str, wanted: str, transport: Any = None) -> str:
    """The certificate with this fingerprint, from whoever answers at a coordinator's address.

    `transport`: for tests. Errors: UsageError for an address without TLS; Unreachable; EdgestillError for a
    certificate of another fingerprint.
    """
    if not url.startswith("https://"):
        raise UsageError(
            f"the code carries the fingerprint of a certificate, and {url} does not use TLS",
            f"give the address that begins with https://, as `edgestill serve` says it; not {url}",
        )
    httpx2 = import_httpx2()
    try:
        with httpx2.Client(verify=False, timeout=30.0, transport=transport, follow_redirects=False) as client:
            with client.stream("GET", f"{url}/v1/authorities/{wanted}") as answer:
                body = b""
                for piece in answer.iter_raw():
                    body += piece
                    if len(body) > MOST_BYTES:
                        raise Refused(f"{url}: a certificate of more than {MOST_BYTES} bytes")
    except httpx2.TransportError as error:
        raise Unreachable(
            f"{url} does not answer: {str(error) or type(error).__name__}",
            "check the address, the network, and that `edgestill serve` runs there",
        ) from error
    try:
        certificate = only_certificate(body.decode("ascii"))
    except (ValueError, ssl.SSLError):
        certificate = None
    if certificate is None or fingerprint(certificate) != wanted:
        raise EdgestillError(
            f"{url} does not have the certificate that the code names: nothing was sent to it",
            "check the address and the code with whoever runs the coordinator; somebody may stand in between",
        )
    return certificate
