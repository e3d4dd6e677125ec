"""Figures for Prometheus: requests, uploads, refusals, long-polls and bytes of this replica, and what the store holds
(`figures.py`) when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """A registry of its own, so that several apps in one process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "edgestill_requests", "requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "edgestill_request_seconds",
            "from the request's head to the end of the answer, waiting for work included",
            ["route"], buckets=BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.uploads = Counter(
            "edgestill_uploads", "uploads acknowledged", ["result"], registry=self.registry
        )
        self.refusals = Counter(
            "edgestill_refusals", "problems answered, by kind", ["kind"], registry=self.registry
        )
        self.waiting = Gauge("edgestill_long_polls", "devices waiting for work", registry=self.registry)
        self.received = Counter("edgestill_received_bytes", "bytes of bodies read", registry=self.registry)
        self.sent = Counter("edgestill_sent_bytes", "bytes of answers' bodies sent", registry=self.registry)
        self.steps = Counter(
            "edgestill_steps",
            "workers for step 5 on this replica: came to an end, or failed",
            ["result"],
            registry=self.registry,
        )

    def render(self, families: Iterable[GaugeMetricFamily] = ()) -> bytes:
        """The text format of these figures, and of families that were read just now."""
        once = CollectorRegistry()
        once.register(_Read(tuple(families)))
        return generate_latest(self.registry) + generate_latest(once)


class _Read:
    def __init__(self, families: tuple[GaugeMetricFamily, ...]) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families


class Measured:
    """ASGI middleware that counts every request under its route's template, never under a raw path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, status = time.perf_counter(), 500

        async def counted_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._metrics.received.inc(len(message.get("body", b"")))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                self._metrics.sent.inc(len(message.get("body", b"")))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - start_s)


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
