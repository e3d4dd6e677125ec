"""Settings: which source wins, what is refused, and that the documentation lists them all."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from edgestill.coordinator.settings import FIELDS, PREFIX, Settings, add_flags, load_settings, settings_from
from edgestill.runtime.errors import UsageError

pytestmark = pytest.mark.unit
DOCS = Path(__file__).resolve().parents[2] / "docs/coordinator.md"


def parsed(*words: str, environment: dict[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return settings_from(parser.parse_args(words), environment or {})


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text('port = 1\nhost = "h1"\nthreads = 11\n')
    environment = {"EDGESTILL_PORT": "2", "EDGESTILL_HOST": "h2"}
    settings = parsed("--config", str(config), "--port", "3", environment=environment)
    assert (settings.port, settings.host, settings.threads) == (3, "h2", 11)
    assert settings.tick_s == Settings().tick_s


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text("mdns = true\nlong_poll_s = 3\n")
    settings = parsed(environment={"EDGESTILL_CONFIG": str(config)})
    assert settings.mdns is True and settings.long_poll_s == 3.0


def test_every_setting_has_flag_variable_and_key_with_one_meaning(tmp_path: Path) -> None:
    samples = {int: "7", float: "7.5", bool: "true", str: "x"}
    for name, one in FIELDS.items():
        text = {"log_level": "debug"}.get(name, samples.get(type(one.default), "some-path"))
        more = {}
        if name.startswith("tls_"):
            more = {"tls_cert": "some-path", "tls_key": "some-path"}
        flags = {name: text} | more
        by_flag = load_settings(flags)
        by_variable = load_settings(environment={PREFIX + key.upper(): value for key, value in flags.items()})
        config = tmp_path / f"{name}.toml"
        numeric = isinstance(one.default, bool | int | float)
        config.write_text(
            "\n".join(f"{key} = {value if numeric else repr(value)}" for key, value in flags.items())
        )
        assert by_flag == by_variable == load_settings(config=config), name
        assert getattr(by_flag, name) != one.default, name


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"EDGESTILL_PORT": "many"}, "EDGESTILL_PORT is 'many'"),
        ({"EDGESTILL_PORT": "65536"}, "port is 65536"),
        ({"EDGESTILL_PORT": "-1"}, "port is -1"),
        ({"EDGESTILL_TICK_S": "nan"}, "tick_s is nan"),
        ({"EDGESTILL_TICK_S": "0"}, "tick_s is 0"),
        ({"EDGESTILL_LOG_LEVEL": "loud"}, "log_level is 'loud'"),
        ({"EDGESTILL_MDNS": "perhaps"}, "EDGESTILL_MDNS is 'perhaps'"),
        ({"EDGESTILL_TLS_CERT": "cert.pem"}, "tls_cert and tls_key"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(environment=variables)
    assert complaint in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ports = 1", "no setting 'ports'"),
        ("port = 1.5", "port is 1.5"),
        ("port = true", "port is True"),
        ("host = 3", "host is 3"),
        ("port = ", "not TOML"),
        ("dashboard_token = 3", "dashboard_token is not usable"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings(config=config)
    assert complaint in caught.value.message and str(config) in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent.toml"):
        load_settings(config=tmp_path / "absent.toml")


def test_settings_travel_as_json_and_secrets_stay_behind(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, dashboard_token="dashboard-secret", port=5)
    plain = settings.as_json()
    assert "dashboard-secret" not in str(plain) and set(FIELDS) - set(plain) == {"dashboard_token"}
    whole = {name: value for name, value in settings.as_json(secrets=True).items() if value is not None}
    assert load_settings(whole) == settings


def test_the_documentation_lists_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: default.strip().strip("`") for name, default in rows}
    assert list(documented) == list(FIELDS)
    for name, one in FIELDS.items():
        default = one.default
        expected = {"": "", "None": "", "True": "true", "False": "false"}.get(str(default), str(default))
        if isinstance(default, float):
            expected = f"{default:g}"
        assert documented[name] == expected, name
