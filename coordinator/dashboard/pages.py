"""The dashboard's pages as HTML text, from the service's records: reads and renders, knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgestill.coordinator.dashboard import views
from edgestill.coordinator.service import Service

_HERE = Path(__file__).parent
STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "icon.svg": "image/svg+xml"}
ROUNDS_SHOWN, DEVICES_A_PAGE = 50, 100


@dataclass(frozen=True)
class Page:
    """A whole document, and the status it is answered with."""

    html: str
    status: int = 200


@dataclass(frozen=True)
class StaticFile:
    """A file of the style and its mark, which changes with it."""

    data: bytes
    media_type: str
    mark: str


class Pages:
    """Draws pages; blocking, to be called in a thread.

    `root` is the path that a proxy puts before ours, without a slash at its end. `since` is the change number that was
    the newest before the page was read: events after it are news for the page.
    """

    def __init__(self, service: Service, clock: Callable[[], float] = time.time) -> None:
        self._service, self._clock = service, clock
        self.files = {name: _read_static(name, media_type) for name, media_type in STATIC.items()}
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters.update(
            percent=views.format_percent, bytes=views.format_bytes, milliseconds=views.format_milliseconds,
            ago=views.format_ago, left=views.format_left, iso=views.format_moment,
            slug=lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"), drawing=Markup,
        )  # fmt: skip

    def tasks(self, root: str, since: int) -> Page:
        """All tasks and how they stand, the newest first."""
        records = sorted(self._service.tasks(), key=lambda one: (-one.created_s, one.name))
        tasks = [self._view(record) for record in records]
        news = " ".join(views.summarise(task) for task in tasks[:3])
        return self._live("tasks.html", root, since, task_name="", tasks=tasks, news=news)

    def task(self, root: str, since: int, name: str, page: int) -> Page:
        """One task; `page` of its devices, from 1. Status 404 when there is no such task."""
        record = next((one for one in self._service.tasks() if one.name == name), None)
        if record is None:
            return self.message(root, 404, "Not found", f"There is no task named {name[:60]}.")
        task = self._view(record)
        pages = max(1, math.ceil(len(task.devices) / DEVICES_A_PAGE))
        page = min(max(page, 1), pages)
        return self._live(
            "task.html", root, since, task_name=name, task=task, news=views.summarise(task),
            charts=views.draw_curves(task), distribution=views.draw_classes(task),
            rounds_shown=task.rounds[: -ROUNDS_SHOWN - 1 : -1],
            devices_shown=task.devices[(page - 1) * DEVICES_A_PAGE : page * DEVICES_A_PAGE],
            page=page, pages=pages,
        )  # fmt: skip

    def message(self, root: str, status: int, heading: str, text: str, form_for: str | None = None) -> Page:
        """A page that only says something; with `form_for` it asks for the token and leads to that path."""
        html = self._render("message.html", root, live=False, heading=heading, text=text, form_for=form_for)
        return Page(html, status)

    def _view(self, record: Any) -> views.TaskView:
        name = record.name
        return views.view_task(
            record, self._service.rounds(name), self._service.devices(name), self._service.refusals(name)
        )

    def _live(self, template: str, root: str, since: int, **values: Any) -> Page:
        return Page(self._render(template, root, live=True, since=since, now_s=self._clock(), **values))

    def _render(self, template: str, root: str, **values: Any) -> str:
        def static(name: str) -> str:
            return f"{root}/static/{name}?v={self.files[name].mark}"

        return self._templates.get_template(template).render(home=f"{root}/", static=static, **values)


def _read_static(name: str, media_type: str) -> StaticFile:
    data = (_HERE / "static" / name).read_bytes()
    return StaticFile(data, media_type, hashlib.sha256(data).hexdigest()[:16])
