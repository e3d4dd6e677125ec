"""The conditions gate on made-up sysfs trees and programs, and on this machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.runtime.device.conditions import Conditions, read_status, unmet
from edgestill.runtime.errors import UsageError

KEYS = {"battery", "charging", "temperature_c", "battery_temperature_c", "memory_free_bytes", "metered"}
MEMINFO = "MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    2048000 kB\n"


class Programs:
    """Answers of programs by their name; the others are not installed."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, command: list[str]) -> str | None:
        self.asked.append(command[0])
        return self.answers.get(command[0].replace("-", "_"))


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def supply(name: str, **values: object) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": str(value) for key, value in values.items()}


def zone(number: int, kind: str, millidegrees: object) -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{number}"
    return {f"{folder}/type": kind, f"{folder}/temp": str(millidegrees)}


def status_of(root: Path, files: dict[str, str], **answers: str) -> dict[str, object]:
    status = read_status(write_tree(root, files), Programs(**answers))
    assert status.keys() == KEYS
    return status


def test_a_laptop_on_battery(tmp_path: Path) -> None:
    status = status_of(
        tmp_path,
        supply("AC", type="Mains", online=0)
        | supply("BAT0", type="Battery", present=1, capacity=62, status="Discharging", temp=311)
        | supply("hidpp_battery_0", type="Battery", scope="Device", capacity=5, status="Discharging")
        | zone(0, "x86_pkg_temp", 61000)
        | zone(1, "acpitz", 27800)
        | {"proc/meminfo": MEMINFO},
        busctl="u 4\n",
    )
    assert status == {
        "battery": 0.62,
        "charging": False,
        "temperature_c": 61.0,
        "battery_temperature_c": 31.1,
        "memory_free_bytes": 2048000 * 1024,
        "metered": False,
    }


def test_a_board_without_a_battery(tmp_path: Path) -> None:
    status = status_of(tmp_path, zone(0, "cpu-thermal", 48312) | {"proc/meminfo": MEMINFO})
    assert (status["battery"], status["charging"], status["metered"]) == (None, None, None)
    assert (status["temperature_c"], status["battery_temperature_c"]) == (48.312, None)


@pytest.mark.parametrize(
    ("files", "charging"),
    [
        (supply("B", type="Battery", capacity=50, status="Charging"), True),
        (supply("B", type="Battery", capacity=99, status="Full"), True),
        (supply("B", type="Battery", capacity=80, status="Not charging"), True),
        (supply("B", type="Battery", capacity=50, status="Discharging"), False),
        (supply("B", type="Battery", capacity=50, status="Unknown"), None),
        (supply("B", type="Battery", capacity=50), None),
        (
            supply("B", type="Battery", capacity=50, status="Unknown") | supply("usb", type="USB", online=1),
            True,
        ),
        (
            supply("B", type="Battery", capacity=50, status="Discharging")
            | supply("AC", type="Mains", online=1),
            True,
        ),
    ],
)
def test_charging(tmp_path: Path, files: dict[str, str], charging: bool | None) -> None:
    assert status_of(tmp_path, files)["charging"] is charging


def test_two_batteries_are_one_share_and_an_empty_bay_is_none(tmp_path: Path) -> None:
    files = (
        supply("BAT0", type="Battery", present=1, capacity=100, status="Full")
        | supply("BAT1", type="Battery", present=1, capacity=20, status="Discharging")
        | supply("BAT2", type="Battery", present=0, capacity=0)
    )
    status = status_of(tmp_path, files)
    assert (status["battery"], status["charging"]) == (0.6, False)


def test_sensors_that_are_off_or_absurd_are_left_out(tmp_path: Path) -> None:
    files = zone(0, "modem", -273000) | zone(1, "gpu", 999999) | zone(2, "wifi", "") | zone(3, "soc", 30500)
    files |= {
        "sys/class/thermal/cooling_device0/type": "fan",
        "sys/class/thermal/thermal_zone4/type": "no temp",
    }
    files |= supply("B", type="Battery", capacity="?", temp="-2730")
    status = status_of(tmp_path, files)
    assert (status["temperature_c"], status["battery_temperature_c"], status["battery"]) == (30.5, None, None)


def test_a_battery_among_the_thermal_zones_is_the_battery(tmp_path: Path) -> None:
    status = status_of(tmp_path, zone(0, "battery", 36000) | zone(1, "cpu0", 52000))
    assert (status["temperature_c"], status["battery_temperature_c"]) == (52.0, 36.0)


def test_a_phone_with_termux_hides_its_files_and_has_a_command(tmp_path: Path) -> None:
    answer = {"percentage": 85, "plugged": "UNPLUGGED", "status": "DISCHARGING", "temperature": 29.3}
    status = status_of(tmp_path, {}, termux_battery_status=json.dumps(answer))
    assert (status["battery"], status["charging"], status["battery_temperature_c"]) == (0.85, False, 29.3)
    answer["plugged"] = "PLUGGED_USB"
    assert status_of(tmp_path, {}, termux_battery_status=json.dumps(answer))["charging"] is True


def test_the_command_of_termux_is_only_asked_where_the_files_say_nothing(tmp_path: Path) -> None:
    programs = Programs()
    read_status(write_tree(tmp_path, supply("B", type="Battery", capacity=5)), programs)
    assert programs.asked == ["busctl"]


@pytest.mark.parametrize(
    ("answer", "metered"),
    [("u 0", None), ("u 1", True), ("u 2", False), ("u 3", True), ("u 4", False), ("u 9", None), ("", None)],
)
def test_metered_is_networkmanagers_answer(tmp_path: Path, answer: str, metered: bool | None) -> None:
    assert status_of(tmp_path, {}, busctl=answer)["metered"] is metered


@given(
    st.text(max_size=30) | st.sampled_from(["[" * 50_000, '{"percentage": 1e999}', '{"plugged": 1}', "u 1 2"])
)
@settings(max_examples=100, deadline=None)
def test_whatever_programs_and_files_say_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    root = tmp_path_factory.mktemp("root")
    path = root / "proc/meminfo"
    path.parent.mkdir()
    path.write_text("MemAvailable:" + text, errors="replace")
    status = read_status(root, lambda command: text)
    assert status.keys() == KEYS
    assert all(isinstance(reason, str) for reason in unmet(Conditions(), status))


def test_numbers_beyond_all_reason_are_unknown(tmp_path: Path) -> None:
    digits = "9" * 400
    answer = f'{{"percentage": {digits}, "temperature": {digits}}}'
    status = status_of(tmp_path, {}, termux_battery_status=answer)
    assert (status["battery"], status["battery_temperature_c"]) == (None, None)


def test_this_machine_agrees_with_psutil() -> None:
    status = read_status()
    assert status.keys() == KEYS
    if status["memory_free_bytes"] is not None:
        assert status["memory_free_bytes"] == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    assert (status["battery"] is None) or battery is not None


GOOD = {
    "battery": 0.9,
    "charging": False,
    "temperature_c": 50.0,
    "battery_temperature_c": 30.0,
    "memory_free_bytes": 2**31,
    "metered": False,
}


def test_what_is_good_or_unknown_never_blocks() -> None:
    assert unmet(Conditions(), GOOD) == []
    assert unmet(Conditions(), {}) == []
    assert unmet(Conditions(), dict.fromkeys(KEYS)) == []
    assert unmet(Conditions(), dict.fromkeys(KEYS, math.nan)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"battery": 0.29}, ["29%", "30%", "not charging"]),
        ({"battery": 0.1, "charging": None}, ["10%"]),
        ({"temperature_c": 81}, ["device", "81 °C", "80 °C"]),
        ({"battery_temperature_c": 44.0}, ["battery", "44 °C", "43 °C"]),
        ({"memory_free_bytes": 100 * 2**20}, ["100 MiB", "256 MiB"]),
        ({"metered": True}, ["metered"]),
    ],
)
def test_each_condition_gives_a_reason_that_a_person_understands(change: dict, words: list[str]) -> None:
    (reason,) = unmet(Conditions(), {**GOOD, **change})
    assert all(word in reason for word in words)


def test_charging_excuses_a_low_battery_but_not_a_hot_one() -> None:
    assert unmet(Conditions(), {**GOOD, "battery": 0.01, "charging": True}) == []
    assert len(unmet(Conditions(), {**GOOD, "battery_temperature_c": 50.0, "charging": True})) == 1


def test_every_reason_is_listed_and_every_condition_can_be_switched_off() -> None:
    bad = {
        "battery": 0.0,
        "charging": False,
        "temperature_c": 120.0,
        "battery_temperature_c": 90.0,
        "memory_free_bytes": 0,
        "metered": True,
    }
    assert len(unmet(Conditions(), bad)) == 5
    off = Conditions(
        minimum_battery=0,
        maximum_temperature_c=math.inf,
        maximum_battery_temperature_c=math.inf,
        minimum_memory_bytes=0,
        allow_metered=True,
    )
    assert unmet(off, bad) == []


@pytest.mark.parametrize(
    "values", [{"minimum_battery": 30}, {"minimum_battery": -0.1}, {"maximum_temperature_c": math.nan}]
)
def test_conditions_that_cannot_be_meant_are_refused(values: dict) -> None:
    with pytest.raises(UsageError):
        Conditions(**values)
