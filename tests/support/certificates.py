"""Certificates that nobody vouches for."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ADDRESS = ipaddress.ip_address("127.0.0.1")


def write_authority(authority: Path | str, certificate: Path | str, key: Path | str) -> None:
    """Writes an authority's certificate, and one of 127.0.0.1 that it has signed with its key, as PEM files."""
    root, private = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority of our own")])
    now = datetime.datetime.now(datetime.UTC)

    def build(subject: x509.Name, public: ec.EllipticCurvePublicKey, ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )

    names = x509.SubjectAlternativeName([x509.IPAddress(ADDRESS)])
    server = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "coordinator")])
    signed = build(server, private.public_key(), False).add_extension(names, critical=False).sign(root, hashes.SHA256())
    own = build(issuer, root.public_key(), True).sign(root, hashes.SHA256())
    for path, one in ((authority, own), (certificate, signed)):
        Path(path).write_bytes(one.public_bytes(serialization.Encoding.PEM))
    Path(key).write_bytes(_as_pem(private))


def write_certificate(certificate: Path | str, key: Path | str) -> None:
    """Writes a new key and its own certificate for 127.0.0.1, valid for a day, as PEM files."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ADDRESS)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    Path(certificate).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    Path(key).write_bytes(_as_pem(private))


def _as_pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
