"""Names, codes, tokens: made from random bytes, and kept only as SHA-256. Seeds: made from names."""

from __future__ import annotations

import base64
import hashlib

DEVICE_BYTES = 10
CODE_BYTES = 13
TOKEN_BYTES = 32
_GROUP = 5
_CODE_LENGTH = 20


def device_name(random: bytes) -> str:
    """`d-` and 16 of a-z2-7, from 10 bytes."""
    return "d-" + base64.b32encode(random[:DEVICE_BYTES]).decode().lower()


def enrolment_code(random: bytes) -> str:
    """20 of A-Z2-7 (100 bits) in groups of 5, from 13 bytes."""
    letters = base64.b32encode(random[:CODE_BYTES]).decode()[:_CODE_LENGTH]
    return "-".join(letters[start : start + _GROUP] for start in range(0, _CODE_LENGTH, _GROUP))


def access_token(random: bytes) -> str:
    """`est_` and 43 base64url characters, from 32 bytes."""
    return "est_" + base64.urlsafe_b64encode(random[:TOKEN_BYTES]).decode().rstrip("=")


def hash_code(code: str) -> str:
    """What is stored of a code; case, spaces and dashes do not count, for people type it."""
    letters = "".join(letter for letter in code.upper() if letter.isalnum())
    return _sha256(letters)


def hash_token(token: str) -> str:
    """What is stored of a token.

    Plain SHA-256 is enough for 256 random bits, which nobody can guess; a slow hash is for passwords.
    """
    return _sha256(token)


def derive_seed(task_seed: int, round_number: int, who: str) -> int:
    """A seed of 48 bits for what `who` draws in a round; the same arguments always give the same seed."""
    return int(_sha256(f"{task_seed}.{round_number}/{who}")[:12], 16)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
