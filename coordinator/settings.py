"""What the coordinator is run with: flags over environment over a TOML file over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from edgestill.coordinator.store.place import without_secrets
from edgestill.runtime.errors import UsageError

LOG_LEVELS = ("debug", "info", "warning", "error")
PREFIX = "EDGESTILL_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Settings:
    """All settings of `edgestill serve`; each is a flag, an environment variable and a key of the TOML file."""

    data_dir: Path = _setting(Path("edgestill-data"), "folder of the database and the blobs")
    database: str = _setting("", "SQLAlchemy URL; empty: SQLite in the data folder")
    blobs: str = _setting("", "s3://BUCKET/PREFIX or a folder; empty: a folder in the data folder")
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for the whole network")
    port: int = _setting(8000, "port to listen on; 0 for any free one", low=0, high=65535)
    tls_cert: Path | None = _setting(None, "PEM file of the certificate chain; with a key: HTTPS")
    tls_key: Path | None = _setting(None, "PEM file of the certificate's private key")
    dashboard_token: str = _setting(
        "", "what a browser needs for the dashboard, /metrics and the global model; empty: open to all, the model "
        "only to this machine", secret=True
    )  # fmt: skip
    public_url: str = _setting("", "address that devices are told, where it is not http(s)://HOST:PORT")
    allowed_hosts: str = _setting(
        "", "further names without port, comma-separated, that requests may ask for (Host)"
    )
    trusted_proxies: str = _setting("127.0.0.1", "addresses whose X-Forwarded-For and -Proto are believed")
    quota_bytes: int = _setting(1 << 30, "bytes of uploads that one device may store in a task", low=1)
    max_body_bytes: int = _setting(256 << 20, "largest upload, whatever the task allows", low=1)
    upload_memory_bytes: int = _setting(1 << 30, "bytes of uploads held in memory at once", low=1)
    upload_timeout_s: float = _setting(300.0, "seconds in which an upload must arrive", low=1)
    long_poll_s: float = _setting(
        25.0, "seconds a device's request for work is held at most", low=0, high=300
    )
    tick_s: float = _setting(0.5, "seconds between two looks at deadlines", low=0.01, high=60)
    threads: int = _setting(8, "threads for the store and the blobs", low=1, high=256)
    distil_threads: int = _setting(0, "threads of the engine that distils; 0: its own choice", low=0)
    log_level: str = _setting("info", "debug, info, warning or error", choices=LOG_LEVELS)
    mdns: bool = _setting(False, "announce the coordinator on the local network as _edgestill._tcp")

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("tls_cert and tls_key belong together", "give both, or neither")
        _check_hosts(self.allowed_hosts)
        for one in dataclasses.fields(self):
            _check_range(one, getattr(self, one.name))

    @property
    def database_url(self) -> str:
        """The database to open; by default a file in the data folder."""
        return self.database or f"sqlite:///{(self.data_dir / 'coordinator.db').resolve()}"

    @property
    def blobs_location(self) -> str:
        """Where blobs lie; by default a folder in the data folder."""
        return self.blobs or str((self.data_dir / "blobs").resolve())

    def as_json(self, secrets: bool = False) -> dict[str, Any]:
        """Plain values; what is secret is left out unless asked for."""
        return {
            one.name: str(value) if isinstance(value, Path) else value
            for one in dataclasses.fields(self)
            if secrets or not one.metadata.get("secret")
            for value in (getattr(self, one.name),)
        }


FIELDS = {one.name: one for one in dataclasses.fields(Settings)}
_TYPES = get_type_hints(Settings)
STORE_SETTINGS = ("data_dir", "database", "blobs")
"""What a command needs that works on the store without serving."""


def add_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] = tuple(FIELDS)) -> None:
    """Adds `--config` and a flag for each of the settings; their values are text until `load_settings`."""
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings as TOML")
    for name in names:
        help_text = FIELDS[name].metadata["help"].replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if _TYPES[name] is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            default = FIELDS[name].default
            shown = f"{help_text} ({default})" if default not in ("", None) else help_text
            parser.add_argument(flag, dest=name, metavar=_metavar(name), help=shown)


def settings_from(arguments: argparse.Namespace, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of a parsed command line. Errors: UsageError naming the flag, variable or key."""
    given = {name: value for name in FIELDS if (value := getattr(arguments, name, None)) is not None}
    return load_settings(given, os.environ if environment is None else environment, arguments.config)


def place_words(given: Mapping[str, Any]) -> str:
    """The flags among these values that say where database and blobs are, for a next command: ` --data-dir DIR`.

    Empty where none is given. A password in a URL is not repeated: `***` stands for it.
    """
    words = []
    for name in ("config", *STORE_SETTINGS):
        if value := given.get(name):
            words += [f"--{name.replace('_', '-')}", without_secrets(str(value))]
    return "".join(f" {shlex.quote(word)}" for word in words)


def load_settings(
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> Settings:
    """Merges the sources; a later one of file, environment, flags wins.

    Other variables that start with EDGESTILL_ are left alone. Errors: UsageError.
    """
    values: dict[str, Any] = {}
    environment = environment or {}
    if config is None and environment.get(f"{PREFIX}CONFIG"):
        config = Path(environment[f"{PREFIX}CONFIG"])
    if config is not None:
        values |= _read_toml(config)
    for name in FIELDS:
        variable = PREFIX + name.upper()
        if variable in environment:
            values[name] = _convert(name, environment[variable], variable)
    for name, value in (flags or {}).items():
        values[name] = _convert(name, value, f"--{name.replace('_', '-')}")
    return Settings(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}", "see docs/coordinator.md for an example") from error
    for name in table:
        if name not in FIELDS:
            raise UsageError(f"{path}: no setting {name!r}", f"one of {', '.join(FIELDS)}")
    return {name: _convert(name, value, f"{path}: {name}") for name, value in table.items()}


def _convert(name: str, value: Any, where: str) -> Any:
    """A value of the field's type from text or from TOML. Errors: UsageError."""
    kind = _TYPES[name]
    try:
        if kind is bool:
            return _to_bool(value)
        if kind in (int, float):
            if isinstance(value, bool):
                raise ValueError
            number = kind(value)
            if isinstance(value, float) and number != value:
                raise ValueError
            return number
        if not isinstance(value, str | Path):
            raise ValueError
        if kind is str:
            return str(value)
        if str(value) == "":
            if kind is Path:
                raise ValueError
            return None
        return Path(value).expanduser()
    except (ValueError, OverflowError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise UsageError(f"{where} is {_shown(name, value)}", f"give {wanted.get(kind, 'a path')}") from error


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise ValueError(value)


def _check_hosts(text: str) -> None:
    """Refuses what no Host header without its port can be, and which would therefore never match."""
    for name in filter(None, map(str.strip, text.split(","))):
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
                raise UsageError(
                    f"allowed_hosts: {name!r} is no name or address",
                    "leave scheme, port, path and brackets out, such as edge.example or 192.168.1.5",
                ) from None


def _check_range(one: dataclasses.Field[Any], value: Any) -> None:
    low, high = one.metadata.get("low"), one.metadata.get("high")
    choices = one.metadata.get("choices")
    if choices is not None and value not in choices:
        raise UsageError(f"{one.name} is {value!r}", f"give one of {', '.join(choices)}")
    # written so that a NaN, which compares with nothing, is refused
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        span = f"{low} or more" if high is None else f"{low} to {high}"
        raise UsageError(f"{one.name} is {value}", f"give {span}")


def _shown(name: str, value: Any) -> str:
    return "not usable" if FIELDS[name].metadata.get("secret") else repr(value)


def _metavar(name: str) -> str:
    if _TYPES[name] is Path:
        return "DIR"
    if "FILE" in FIELDS[name].metadata["help"] or name.startswith("tls_"):
        return "FILE"
    if name in ("database", "blobs", "public_url"):
        return "URL"
    return {int: "N", float: "X"}.get(_TYPES[name], "TEXT")
