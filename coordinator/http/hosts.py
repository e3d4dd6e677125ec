"""Which names a coordinator answers to, so that no page elsewhere reaches it through a name of its own (DNS rebinding).

A browser that was led from `http://trap.example` to 127.0.0.1 takes what it finds there for a part of that site. It
still says which site it believes to talk to, in the Host header.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from edgestill.coordinator.http.address import is_loopback
from edgestill.coordinator.http.metrics import Metrics
from edgestill.coordinator.http.problem_responses import ProblemResponse
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.settings import Settings

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def known_hosts(settings: Settings) -> frozenset[str] | None:
    """The names to answer to, in lower case and without ports; None for any.

    They are checked where `allowed_hosts` names some, and where only this machine is meant to look: the coordinator
    listens on loopback and has no dashboard token.
    """
    named = frozenset(name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip())
    if not named and (settings.dashboard_token or not is_loopback(settings.host)):
        return None
    public = urlsplit(settings.public_url).hostname
    return LOOPBACK | named | {settings.host.lower()} | ({public} if public else frozenset())


def host_of(header: str) -> str:
    """The name in a Host header, in lower case and without port, brackets and the root's dot."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


class KnownHosts:
    """ASGI middleware that answers 421 to a request for any other name; no browser leaves the name out."""

    def __init__(self, app: ASGIApp, known: frozenset[str], metrics: Metrics) -> None:
        self._app, self._known, self._metrics = app, known, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [value for name, value in scope.get("headers", ()) if name == b"host"]
        if all(host_of(name.decode("latin-1")) in self._known for name in names):
            await self._app(scope, receive, send)
            return
        self._metrics.refusals.labels("misdirected").inc()
        await ProblemResponse(Problem("misdirected"))(scope, receive, send)
