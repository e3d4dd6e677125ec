"""`edgestill serve`: runs the coordinator."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import ssl
import sys
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import segno
import uvicorn

from edgestill.coordinator.http.address import EncryptedKey, is_loopback, objection, risks_of, url_of
from edgestill.coordinator.http.announcement import announce
from edgestill.coordinator.http.app import make_app
from edgestill.coordinator.http.context import Context
from edgestill.coordinator.opening import open_service, start_logging, task_creation
from edgestill.coordinator.settings import Settings, add_flags, place_words, settings_from
from edgestill.runtime.console import add_json_option
from edgestill.runtime.errors import EdgestillError, UsageError

_GRACE_S = 5
_BACKLOG = 2048
_MAX_HEAD_BYTES = 32 << 10


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve", help="run the coordinator", description=__doc__, allow_abbrev=False
    )
    add_flags(parser)
    add_json_option(parser, "one JSON object, when it listens,")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal; says where once it listens."""
    settings = settings_from(arguments)
    start_logging(settings)
    with ExitStack() as stack:
        listener = stack.enter_context(listen(settings))
        service = open_service(settings)
        url = url_of(settings, listener.getsockname()[1])
        if settings.mdns:
            stack.enter_context(announce(url, settings.host, listener.getsockname()[1]))
        for risk in risks_of(settings, url):
            print(f"edgestill: warning: {risk}", file=sys.stderr)
        if not service.tasks():
            creation = task_creation(place_words(vars(arguments)))
            print(f"edgestill: no tasks here yet; make one with {creation}", file=sys.stderr)
        app = make_app(service, settings)
        on_ready = partial(say, url, arguments.json, not is_loopback(settings.host))
        server = Server(server_config(app, settings), app.state.context, on_ready)
        asyncio.run(server.serve(sockets=[listener]))
    return 0


def server_config(app: Any, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs: no access log (addresses may hold a token), small heads, and an end that comes."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        http="h11",  # httptools is quicker, but reads heads of any size
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACE_S,
        proxy_headers=True,
        forwarded_allow_ips=settings.trusted_proxies,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


class Server(uvicorn.Server):
    """Says when it is ready, and lets go of waiting devices as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, context: Context, on_ready: Any) -> None:
        super().__init__(config)
        self._context, self._on_ready = context, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        # uvicorn itself takes SIGINT and SIGTERM; a terminal that is closed ends it no less orderly
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._loop.add_signal_handler(signal.SIGHUP, self.handle_exit, signal.SIGHUP, None)
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._context.stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._context.waiting.wake_all)
        super().handle_exit(sig, frame)


def listen(settings: Settings) -> socket.socket:
    """A socket that is bound before anything else is opened. Errors: UsageError, EdgestillError."""
    if settings.tls_cert is not None and settings.tls_key is not None:
        check_tls(settings.tls_cert, settings.tls_key)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(
            f"host {settings.host!r}: {error.strerror}", "give an address of this machine"
        ) from error
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise EdgestillError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            "stop what listens there, or give another --port (0: any free one)",
        ) from error
    return listener


def check_tls(certificate: Path, key: Path) -> None:
    """Errors: UsageError naming the file that is no certificate, no key, or the key of another certificate."""
    for path in (certificate, key):
        if not path.is_file():
            raise UsageError(f"{path}: no such file", "give PEM files with --tls-cert and --tls-key")
    try:
        ssl.create_default_context().load_verify_locations(certificate)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(
            f"--tls-cert {certificate}: no certificate", "give the PEM file of the certificate chain"
        ) from error
    try:
        objection(certificate, key, "localhost")  # whatever it says, both could be read
    except EncryptedKey:
        return  # uvicorn asks for the password
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            message = f"--tls-key {key}: the private key does not belong to {certificate}"
        else:
            message = f"--tls-key {key}: no private key"
        raise UsageError(message, f"give the PEM file of the private key of {certificate}") from error


def say(url: str, as_json: bool, shows_code: bool) -> None:
    """Tells where the coordinator is; with `shows_code` a terminal gets it as a QR code, too."""
    if as_json:
        print(json.dumps({"url": url}), flush=True)
    print(
        f"edgestill: coordinator on {url} (dashboard there, API at {url}/docs)", file=sys.stderr, flush=True
    )
    if shows_code and sys.stderr.isatty():
        print("edgestill: the dashboard for a phone's camera:", file=sys.stderr)
        segno.make(url, micro=False).terminal(sys.stderr, compact=True)
