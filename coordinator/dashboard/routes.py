"""The dashboard over HTTP: pages of tasks and rounds, live by server-sent events, behind a token where one is set.

Pages are whole documents; the script fetches the same page again when something changed and swaps the sections that
differ, so that a page without script is only less lively. Nothing is loaded from anywhere else.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlencode

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from edgestill.coordinator.dashboard.events import ChangeFeed, News, news_of
from edgestill.coordinator.dashboard.pages import Page, Pages
from edgestill.coordinator.http.auth import DASHBOARD_COOKIE, cookie_of, is_operator
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings

COOKIE_AGE_S = 30 * 86400
PAGE_AGE_S = 1.0
FORM_BYTES = 4096
_PAGES_KEPT = 64
_PAGES = re.compile(
    r"/(tasks/[a-z0-9-]+(/devices/[a-z0-9-]+|/(rounds|devices)\.csv)?)?(\?(page=[0-9]+|device=[a-z0-9-]+))?"
)
_THREADS = 2  # pages must not take the devices' threads

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Result = TypeVar("Result")


def make_dashboard_router(
    service: Service, settings: Settings, arriving: Callable[[], Collection[str]] = tuple
) -> APIRouter:
    """Routes `/`, `/tasks/{task}` with its devices and tables, `/events`, `/token` and `/static/{name}`, for browsers.

    With `settings.dashboard_token` all but `/static` need it: `?token=…` once, or the form; then a cookie. `arriving`
    names the devices whose uploads are on their way.
    """
    pages, reader = Pages(service, settings, arriving), _Reader(service)
    door, feed = _Door(settings.dashboard_token, pages), reader.feed
    router = APIRouter(include_in_schema=False)

    @router.get("/", response_class=HTMLResponse)
    async def tasks(request: Request) -> Response:
        root = _root(request)
        return door.refuse(request) or await reader.page(("/", root), lambda since: pages.tasks(root, since))

    @router.get("/tasks/{task}", response_class=HTMLResponse)
    async def one_task(request: Request, task: str) -> Response:
        root, number = _root(request), _whole(request.query_params.get("page"), 6) or 1
        origin = settings.public_url.rstrip("/") or f"{request.url.scheme}://{request.url.netloc}{root}"
        key = ("/tasks", origin, task, number)
        return door.refuse(request) or await reader.page(
            key, lambda since: pages.task(root, since, origin, task, number)
        )

    @router.get("/tasks/{task}/devices/{device}", response_class=HTMLResponse)
    async def one_device(request: Request, task: str, device: str) -> Response:
        root = _root(request)
        return door.refuse(request) or await reader.page(
            ("/devices", root, task, device), lambda since: pages.device(root, since, task, device)
        )

    @router.get("/tasks/{task}/rounds.csv", response_class=Response)
    async def rounds_table(request: Request, task: str) -> Response:
        root = _root(request)
        return door.refuse(request) or await reader.page(
            ("/rounds.csv", root, task), lambda since: pages.rounds_csv(root, task)
        )

    @router.get("/tasks/{task}/devices.csv", response_class=Response)
    async def reports_table(request: Request, task: str) -> Response:
        root, device = _root(request), request.query_params.get("device")
        return door.refuse(request) or await reader.page(
            ("/devices.csv", root, task, device), lambda since: pages.reports_csv(root, task, device)
        )

    @router.get("/events", response_class=StreamingResponse)
    async def events(request: Request) -> Response:
        if not door.admits(request):
            return Response("The dashboard's token is needed.", 401, HEADERS, "text/plain")
        if feed.full:
            return Response("Too many open dashboards.", 503, HEADERS | {"Retry-After": "30"}, "text/plain")
        since = request.headers.get("last-event-id") or request.query_params.get("since")
        # the last header is for nginx, which would hold the events back
        headers = HEADERS | {"X-Accel-Buffering": "no"}
        return StreamingResponse(feed.stream(_whole(since, 18)), 200, headers, "text/event-stream")

    @router.post("/token", response_class=HTMLResponse)
    async def token(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > FORM_BYTES:
                return _answer(pages.message(_root(request), 413, "Too large", "The form holds one token."))
        try:
            form = parse_qs(body.decode(), max_num_fields=8)
        except ValueError:
            return _answer(pages.message(_root(request), 400, "Not a form", "Go back and try again."))
        return door.let_in(request, form.get("token", [""])[0], form.get("next", [""])[0])

    @router.get("/static/{name}")
    async def static(request: Request, name: str) -> Response:
        if (file := pages.files.get(name)) is None:
            return _answer(pages.message(_root(request), 404, "Not found", "There is no such file."))
        named = request.query_params.get("v") == file.mark  # the address changes with the file
        caching = "public, max-age=31536000, immutable" if named else "no-cache"
        headers = HEADERS | {"ETag": f'"{file.mark}"', "Cache-Control": caching}
        if f'"{file.mark}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.data, 200, headers, file.media_type)

    return router


class _Door:
    """Who may look: everyone where no token is set, else whoever showed it."""

    def __init__(self, token: str, pages: Pages) -> None:
        self._token, self._pages = token, pages

    def admits(self, request: Request) -> bool:
        return is_operator(cookie_of(request), self._token)

    def refuse(self, request: Request) -> Response | None:
        """What to answer instead of the page; None for whoever may see it."""
        root = _root(request)
        path = request.url.path.removeprefix(root)
        if self._token and (given := request.query_params.get("token")) is not None:
            rest = [(key, value) for key, value in request.query_params.multi_items() if key != "token"]
            # the token leaves the address at once: addresses are kept in histories, and shared
            return self.let_in(request, given, path + (f"?{urlencode(rest)}" if rest else ""))
        if self.admits(request):
            return None
        text = "This dashboard needs the token that it was started with."
        return _answer(self._pages.message(root, 401, "Who is there?", text, form_for=path))

    def let_in(self, request: Request, given: str, target: str) -> Response:
        """Sets the cookie and leads to `target`, or asks again."""
        root = _root(request)
        if not re.fullmatch(_PAGES, target):
            target = "/"  # never to another site
        if not is_operator(given, self._token):
            text = "That is not the dashboard's token."
            return _answer(self._pages.message(root, 401, "Who is there?", text, form_for=target))
        answer = RedirectResponse(root + target, 303, HEADERS)
        if self._token:
            # Lax, not Strict: a link in a mail must open the dashboard, and no page here changes anything
            answer.set_cookie(
                DASHBOARD_COOKIE, quote(self._token, safe=""), max_age=COOKIE_AGE_S, path=root or "/",
                httponly=True, samesite="lax", secure=request.url.scheme == "https",
            )  # fmt: skip
        return answer


@dataclass(frozen=True)
class _Kept:
    announced: int
    asked_s: float
    drawing: asyncio.Task[Page]


class _Reader:
    """Reads the service in threads of its own, and each page once for all who ask at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._limiter: anyio.CapacityLimiter | None = None
        self.feed = ChangeFeed(self._news, self._latest)

    async def _latest(self) -> int:
        return await self._call(self._service.last_change)

    async def _news(self, since: int) -> News | None:
        changes = await self._call(self._service.changes, since)
        return news_of((change.sequence, change.task) for change in changes)

    async def page(self, key: tuple[Any, ...], draw: Callable[[int], Page]) -> Response:
        """The page, at most a second old and never older than what any browser was told of."""
        announced, now_s = self.feed.announced, time.monotonic()
        kept = self._kept.get(key)
        if kept is None or kept.announced != announced or now_s - kept.asked_s > PAGE_AGE_S:
            self._kept.pop(key, None)
            if len(self._kept) >= _PAGES_KEPT:
                self._kept.pop(next(iter(self._kept)))
            kept = _Kept(announced, now_s, asyncio.create_task(self._draw(draw)))
            self._kept[key] = kept
        # shielded: when one browser leaves, the others still want the page
        return _answer(await asyncio.shield(kept.drawing))

    async def _draw(self, draw: Callable[[int], Page]) -> Page:
        # the number first: what changes while the page is read is news for it
        return await self._call(draw, await self._latest())

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        if self._limiter is None:  # made late: a limiter belongs to a running event loop
            self._limiter = anyio.CapacityLimiter(_THREADS)
        return await run_sync(function, *arguments, limiter=self._limiter)


def _answer(page: Page) -> Response:
    kept_as = f'attachment; filename="{page.file_name}"'
    headers = HEADERS | ({"Content-Disposition": kept_as} if page.file_name else {})
    return Response(page.text, page.status, headers, page.media_type)


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


def _whole(text: str | None, digits: int) -> int | None:
    return int(text) if text and re.fullmatch(rf"[0-9]{{1,{digits}}}", text) else None
