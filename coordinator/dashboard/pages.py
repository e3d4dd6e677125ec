"""The dashboard's pages as HTML text, from the service's records: reads and renders, knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgestill.coordinator.dashboard import curves, formats, tables, views
from edgestill.coordinator.dashboard.words import MODES, STATES, WORDS
from edgestill.coordinator.http.address import is_private
from edgestill.coordinator.liveness import Liveness
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.records import TaskRecord
from edgestill.runtime.console import describe_time

_HERE = Path(__file__).parent
STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "icon.svg": "image/svg+xml"}
ROUNDS_SHOWN, DEVICES_A_PAGE = 50, 100


@dataclass(frozen=True)
class Page:
    """A whole document, the status it is answered with, and the name of the file where it is to be kept as one."""

    text: str
    status: int = 200
    media_type: str = "text/html"
    file_name: str = ""


@dataclass(frozen=True)
class StaticFile:
    """A file of the style and its mark, which changes with it."""

    data: bytes
    media_type: str
    mark: str


class Pages:
    """Draws pages; blocking, to be called in a thread.

    `root` is the path that a proxy puts before ours, without a slash at its end. `since` is the change number that was
    the newest before the page was read: events after it are news for the page. `origin` is the address that the browser
    has for the coordinator. `arriving` names the devices whose uploads are on their way.
    """

    def __init__(
        self,
        service: Service,
        settings: Settings,
        arriving: Callable[[], Collection[str]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._service, self._settings, self._arriving, self._clock = service, settings, arriving, clock
        self._gives_models = bool(settings.dashboard_token) or is_private(settings)
        self.files = {name: _read_static(name, media_type) for name, media_type in STATIC.items()}
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.globals.update(words=WORDS, modes=MODES, states=STATES)
        self._templates.filters.update(
            percent=formats.format_percent, bytes=formats.format_bytes, milliseconds=formats.format_milliseconds,
            ago=formats.format_ago, left=formats.format_left, iso=formats.format_moment, points=formats.format_points,
            about=describe_time,
            slug=lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"), drawing=Markup,
        )  # fmt: skip

    def tasks(self, root: str, since: int) -> Page:
        """All tasks and how they stand, the newest first."""
        records = sorted(self._service.tasks(), key=lambda one: (-one.created_s, one.name))
        tasks = [self._view(record) for record in records]
        news = " ".join(views.summarise(task) for task in tasks[:3])
        return self._live("tasks.html", root, since, task_name="", tasks=tasks, news=news)

    def task(self, root: str, since: int, origin: str, name: str, page: int) -> Page:
        """One task; `page` of its devices, from 1. Status 404 when there is no such task."""
        if (record := self._record(name)) is None:
            return self._no_task(root, name)
        task = self._view(record)
        pages = max(1, math.ceil(len(task.devices) / DEVICES_A_PAGE))
        page = min(max(page, 1), pages)
        return self._live(
            "task.html", root, since, task_name=name, task=task, news=views.summarise(task),
            charts=curves.draw_task(task), distribution=curves.draw_classes(task), origin=origin,
            rounds_shown=task.rounds[: -ROUNDS_SHOWN - 1 : -1],
            devices_shown=task.devices[(page - 1) * DEVICES_A_PAGE : page * DEVICES_A_PAGE],
            page=page, pages=pages, gives_models=self._gives_models,
        )  # fmt: skip

    def device(self, root: str, since: int, name: str, device: str) -> Page:
        """One device of a task. Status 404 when there is no such device."""
        if (record := self._record(name)) is None:
            return self._no_task(root, name)
        found = [one for one in self._service.devices(name) if one.name == device]
        if not found:
            return self.message(root, 404, "Not found", f"Task {name} has no device {device[:60]}.")
        rounds = self._service.rounds(name)
        (history,) = views.view_devices(record, rounds, found, self._liveness())
        return self._live(
            "device.html", root, since, task_name=name, history=history, device=history.view,
            news=f"{history.view.label}: {history.view.state}.",
            charts=curves.draw_device(history), distribution=curves.draw_class_counts(history, record.task.class_names),
            parts_shown=history.parts[: -ROUNDS_SHOWN - 1 : -1],
        )  # fmt: skip

    def rounds_csv(self, root: str, name: str) -> Page:
        """The rounds of a task as a file. Status 404 when there is no such task."""
        if (record := self._record(name)) is None:
            return self._no_task(root, name)
        return Page(tables.rounds_csv(self._view(record)), 200, "text/csv", f"{name}-rounds.csv")

    def reports_csv(self, root: str, name: str, device: str | None = None) -> Page:
        """What devices reported, all of them or one, as a file. Status 404 when there is no such task or device."""
        if (record := self._record(name)) is None:
            return self._no_task(root, name)
        devices = [one for one in self._service.devices(name) if device in (None, one.name)]
        if device is not None and not devices:
            return self.message(root, 404, "Not found", f"Task {name} has no device {device[:60]}.")
        rounds, liveness = self._service.rounds(name), self._liveness()
        text = tables.reports_csv(views.view_devices(record, rounds, devices, liveness))
        return Page(text, 200, "text/csv", f"{name}-{device or 'devices'}.csv")

    def message(self, root: str, status: int, heading: str, text: str, form_for: str | None = None) -> Page:
        """A page that only says something; with `form_for` it asks for the token and leads to that path."""
        html = self._render("message.html", root, live=False, heading=heading, text=text, form_for=form_for)
        return Page(html, status)

    def _record(self, name: str) -> TaskRecord | None:
        return next((one for one in self._service.tasks() if one.name == name), None)

    def _no_task(self, root: str, name: str) -> Page:
        return self.message(root, 404, "Not found", f"There is no task named {name[:60]}.")

    def _liveness(self) -> Liveness:
        return Liveness.at(self._clock(), self._settings.long_poll_s, self._arriving())

    def _view(self, record: TaskRecord) -> views.TaskView:
        name = record.name
        return views.view_task(
            record, self._service.rounds(name), self._service.devices(name), self._service.refusals(name),
            self._liveness(),
        )  # fmt: skip

    def _live(self, template: str, root: str, since: int, **values: Any) -> Page:
        return Page(self._render(template, root, live=True, since=since, now_s=self._clock(), **values))

    def _render(self, template: str, root: str, **values: Any) -> str:
        def static(name: str) -> str:
            return f"{root}/static/{name}?v={self.files[name].mark}"

        return self._templates.get_template(template).render(home=f"{root}/", static=static, **values)


def _read_static(name: str, media_type: str) -> StaticFile:
    data = (_HERE / "static" / name).read_bytes()
    return StaticFile(data, media_type, hashlib.sha256(data).hexdigest()[:16])
