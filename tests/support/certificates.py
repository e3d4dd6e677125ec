"""Certificates that nobody vouches for."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ADDRESS = ipaddress.ip_address("127.0.0.1")


def write_certificate(
    certificate: Path | str,
    key: Path | str,
    *,
    days: tuple[float, float] = (-1 / 24, 1),
    address: str = str(ADDRESS),
    signed_by: tuple[Path, Path] | None = None,
) -> None:
    """Writes a new key and its certificate for an address as PEM files: its own, or signed by another's files.

    `days`: from now, of its validity.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost" if signed_by is None else "leaf")])
    issuer, signer = name, private
    if signed_by is not None:
        issuer = x509.load_pem_x509_certificate(signed_by[0].read_bytes()).subject
        signer = serialization.load_pem_private_key(signed_by[1].read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
        .add_extension(_usage(signs=signed_by is None), critical=True)
        # who checks strictly, as Python 3.13 does, wants to be told which key signed, and what it is for
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    Path(certificate).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    Path(key).write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs, crl_sign=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
