"""How `edgestill join` turns a code into a device, and what it tells the coordinator of this machine."""

from __future__ import annotations

import argparse
import platform
import re
import secrets
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from edgestill.runtime.data.dataset import find_source
from edgestill.runtime.data.shares import parse_share
from edgestill.runtime.device.authority import FINGERPRINT_LETTERS
from edgestill.runtime.device.client import Coordinator
from edgestill.runtime.device.journal import WorkFolder
from edgestill.runtime.engines.registry import EngineStatus, available_engines
from edgestill.runtime.errors import EngineError, UsageError
from edgestill.runtime.machine import processor, training_memory_bytes

LONGEST_NAME = 80
_MEGABYTE = 10**6
_MOST_MEGABYTES = 1e9
_CODE_LETTERS = 20
_CODE = re.compile(f"[A-Z2-7]{{{_CODE_LETTERS}}}([A-Z2-7]{{{FINGERPRINT_LETTERS}}})?")


def enrol(
    arguments: argparse.Namespace, url: str, coordinator: Coordinator, keep: WorkFolder
) -> dict[str, str]:
    """Trades --code for the device's identity and keeps that. Errors: UsageError, EngineError, Refused, Unreachable."""
    if arguments.code is None:
        raise UsageError(
            f"{arguments.work_dir} holds no enrolled device",
            "give --code from `edgestill enrol`, or the --work-dir of an enrolled device",
        )
    code, _ = check_code(arguments.code)
    # A code works once: what is already wrong here must not cost it.
    for source in filter(None, (arguments.data, arguments.test)):
        find_source(source)
    if arguments.share is not None:
        parse_share(arguments.share)
    info = device_info(arguments)
    enrolled = coordinator.enrol(code, info)
    identity = {name: str(enrolled[name]) for name in ("device", "token", "task")}
    identity |= {"url": url, "name": info["name"]}
    keep.write_identity(identity)
    return identity


def check_code(code: str) -> tuple[str, str | None]:
    """The code as it is sent, and the fingerprint of the authority to trust where it carries one; nobody needs to be
    asked about what cannot be a code. Errors: UsageError."""
    letters = "".join(letter for letter in code.upper() if letter.isalnum())
    if not _CODE.fullmatch(letters):
        raise UsageError(
            f"--code {code.strip()[:40]!r} is no enrolment code" if code.strip() else "--code is empty",
            "give what `edgestill enrol` prints: 20 or 40 letters A to Z and digits 2 to 7, as AAAAA-BBBBB-CCCCC-DDDDD",
        )
    groups = (letters[start : start + 5] for start in range(0, _CODE_LETTERS, 5))
    return "-".join(groups), letters[_CODE_LETTERS:] or None


def device_name(given: str | None) -> str:
    """What a person calls the device; many have their host's name, so chance tells them apart.

    Errors: UsageError.
    """
    if given is None:
        return f"{platform.node()[: LONGEST_NAME - 5] or 'device'}-{secrets.token_hex(2)}"
    if not (1 <= len(given) <= LONGEST_NAME and given.isprintable()):
        raise UsageError(
            f"--name {given!r} is no device's name",
            f"give 1 to {LONGEST_NAME} characters that can be printed",
        )
    return given


def device_info(arguments: argparse.Namespace, name: str | None = None) -> dict[str, Any]:
    """INFO of docs/federation.md, of a device that is called `name` already or gets its name now.

    Errors: UsageError; EngineError where no engine works.
    """
    if arguments.memory is not None and not 0 < arguments.memory < _MOST_MEGABYTES:
        raise UsageError(f"--memory {arguments.memory:g}", "give megabytes, more than 0, such as 512 or 6.3")
    statuses = available_engines()
    if arguments.engine is not None:
        statuses = [status for status in statuses if status.name == arguments.engine]
    usable = [status.name for status in statuses if status.usable]
    if not usable:
        reasons = "; ".join(f"{status.name}: {status.reason}" for status in statuses)
        raise EngineError(
            f"no engine for training works on this device ({reasons})", installation_hint(statuses)
        )
    try:
        version = metadata.version("edgestill")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "name": device_name(arguments.name) if name is None else name,
        "engines": usable,
        "memory_bytes": training_memory_bytes() if arguments.memory is None else round(arguments.memory * _MEGABYTE),
        "processor": processor(),
        "version": version,
    }


def installation_hint(statuses: Iterable[EngineStatus]) -> str:
    """How to make engines work that do not."""
    hints = [f"for {status.name}: {status.hint}" for status in statuses if status.hint is not None]
    return "; or ".join(hints) or "run `edgestill doctor` to see what to install"
