"""Whether a device should train now: battery, heat, memory and network, as far as the operating system says.

Sources: kernel.org, "Linux power supply class" and "Generic Thermal Sysfs driver"; NetworkManager's D-Bus
property `Metered`; Termux:API, `termux-battery-status`.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgestill.runtime.errors import UsageError
from edgestill.runtime.limits import memory_limits

_COMMAND_TIMEOUT_S = 5.0
_PLAUSIBLE_C = (-40.0, 150.0)  # drivers report sentinels such as -273 for a sensor that is switched off
_MEBIBYTE = 2**20
_NETWORK_MANAGER = "org.freedesktop.NetworkManager"
_ASK_METERED = [
    "busctl",
    "--system",
    "get-property",
    _NETWORK_MANAGER,
    "/" + _NETWORK_MANAGER.replace(".", "/"),
    _NETWORK_MANAGER,
    "Metered",
]
_METERED = {"1": True, "2": False, "3": True, "4": False}  # yes, no, guessed yes, guessed no; 0 is unknown

RunCommand = Callable[[list[str]], str | None]
"""Runs a command and returns its standard output; None where it is missing, fails or takes too long."""


@dataclass(frozen=True)
class Conditions:
    """What must hold for a device to train.

    Errors: UsageError for a value that no status could be compared with.
    """

    minimum_battery: float = 0.3
    """Share of the charge, 0 to 1; asked for only while the device does not charge."""
    maximum_temperature_c: float = 80.0
    """Of the hottest sensor but the battery's."""
    maximum_battery_temperature_c: float = 43.0
    minimum_memory_bytes: int = 256 * _MEBIBYTE
    """Free memory."""
    allow_metered: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.minimum_battery <= 1:
            raise UsageError(
                f"minimum battery {self.minimum_battery} is not a share from 0 to 1", "0.3 is 30 %"
            )
        for name in ("maximum_temperature_c", "maximum_battery_temperature_c", "minimum_memory_bytes"):
            if math.isnan(getattr(self, name)):
                raise UsageError(f"{name.replace('_', ' ')} is not a number")


def unmet(conditions: Conditions, status: Mapping[str, object]) -> list[str]:
    """The reasons not to train, for people; empty when it may start. What is unknown (None) never stands against it.

    `status`: as `read_status` returns it.
    """
    reasons: list[str] = []
    battery = _number(status.get("battery"))
    if battery is not None and battery < conditions.minimum_battery and status.get("charging") is not True:
        reasons.append(
            f"the battery is at {battery:.0%}, below {conditions.minimum_battery:.0%}, and not charging"
        )
    for key, what, limit in (
        ("temperature_c", "the device", conditions.maximum_temperature_c),
        ("battery_temperature_c", "the battery", conditions.maximum_battery_temperature_c),
    ):
        temperature_c = _number(status.get(key))
        if temperature_c is not None and temperature_c > limit:
            reasons.append(f"{what} is at {temperature_c:.0f} °C, above {limit:.0f} °C")
    free_bytes = _number(status.get("memory_free_bytes"))
    if free_bytes is not None and free_bytes < conditions.minimum_memory_bytes:
        needed = conditions.minimum_memory_bytes / _MEBIBYTE
        reasons.append(f"{free_bytes / _MEBIBYTE:.0f} MiB of memory are free, below {needed:.0f} MiB")
    if status.get("metered") is True and not conditions.allow_metered:
        reasons.append("the network is metered")
    return reasons


def read_status(root: Path = Path("/"), run_command: RunCommand | None = None) -> dict[str, object]:
    """What the operating system says now; None for what it does not.

    Keys: battery (share), charging, temperature_c (hottest sensor), battery_temperature_c, memory_free_bytes,
    metered. `root` and `run_command` stand in for the file system and for programs. Never raises.
    """
    run_command = run_command or _run
    supplies = [_read_supply(folder) for folder in _folders(root / "sys/class/power_supply", "*")]
    batteries = [supply for supply in supplies if supply["type"] == "Battery" and _is_of_the_system(supply)]
    shares = [share for supply in batteries if (share := _scaled(supply["capacity"], 100)) is not None]
    battery_c, device_c = _read_temperatures(root)
    battery_c += [value for supply in batteries if (value := _scaled(supply["temp"], 10)) is not None]
    battery_c = [value for value in battery_c if _is_plausible(value)]
    status: dict[str, object] = {
        "battery": min(1.0, max(0.0, sum(shares) / len(shares))) if shares else None,
        "charging": _is_charging(supplies, batteries),
        "temperature_c": max(device_c, default=None),
        "battery_temperature_c": max(battery_c, default=None),
        "memory_free_bytes": _read_free_memory(root),
        "metered": _read_metered(run_command),
    }
    # Android hides the battery's files from programs; Termux has a command for them.
    if status["battery"] is None:
        status |= _read_termux_battery(run_command)
    return status


def _read_supply(folder: Path) -> dict[str, str | None]:
    names = ("type", "scope", "present", "capacity", "status", "online", "temp")
    return {name: _read_text(folder / name) for name in names}


def _is_of_the_system(supply: Mapping[str, str | None]) -> bool:
    # A mouse or a stylus has a battery too, with the scope "Device".
    return supply["scope"] != "Device" and supply["present"] != "0"


def _is_charging(
    supplies: Iterable[Mapping[str, str | None]], batteries: Iterable[Mapping[str, str | None]]
) -> bool | None:
    """Whether the battery does not feed the device: a full one on the mains counts as charging."""
    if any(
        supply["online"] not in (None, "0")
        for supply in supplies
        if supply["type"] in ("Mains", "USB", "Wireless")
    ):
        return True
    states = {supply["status"] for supply in batteries} - {None, "Unknown"}
    if "Discharging" in states:
        return False
    return True if states else None


def _read_temperatures(root: Path) -> tuple[list[float], list[float]]:
    """Degrees Celsius of the battery's thermal zones and of all others."""
    battery_c: list[float] = []
    device_c: list[float] = []
    for folder in _folders(root / "sys/class/thermal", "thermal_zone*"):
        value = _scaled(_read_text(folder / "temp"), 1000)
        if value is not None and _is_plausible(value):
            kind = _read_text(folder / "type") or ""
            (battery_c if "batt" in kind.lower() else device_c).append(value)
    return battery_c, device_c


def _read_free_memory(root: Path) -> int | None:
    """What the machine has, or what the limits of this process and of its control groups leave, if that is less."""
    free = [int(max(0, limit.amount - limit.used)) for limit in memory_limits(root)]
    for line in (_read_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            kibibytes = _scaled(line.split(":", 1)[1].removesuffix("kB").strip(), 1)
            free += [] if kibibytes is None else [int(kibibytes) * 1024]
    return min(free, default=None)


def _read_metered(run_command: RunCommand) -> bool | None:
    answer = (run_command(_ASK_METERED) or "").split()  # for example "u 4"
    return _METERED.get(answer[1]) if len(answer) == 2 else None


def _read_termux_battery(run_command: RunCommand) -> dict[str, object]:
    text = run_command(["termux-battery-status"])
    try:
        answer = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(answer, dict):
        return {}
    found: dict[str, object] = {}
    percentage, temperature_c = _number(answer.get("percentage")), _number(answer.get("temperature"))
    if percentage is not None and 0 <= percentage <= 100:
        found["battery"] = percentage / 100
    if temperature_c is not None and _is_plausible(temperature_c):
        found["battery_temperature_c"] = temperature_c
    if isinstance(answer.get("plugged"), str):
        found["charging"] = answer["plugged"] != "UNPLUGGED"
    return found


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _folders(parent: Path, pattern: str) -> list[Path]:
    try:
        return sorted(parent.glob(pattern))
    except OSError:
        return []


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # also a driver that has no value now: ENODATA, EAGAIN
        return None


def _scaled(text: str | None, divisor: int) -> float | None:
    try:
        return None if text is None else int(text) / divisor
    except (ValueError, OverflowError):
        return None


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _is_plausible(temperature_c: float) -> bool:
    return _PLAUSIBLE_C[0] <= temperature_c <= _PLAUSIBLE_C[1]
