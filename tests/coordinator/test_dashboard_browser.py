"""The dashboard over HTTP: events resume, and a real browser shows the pages well and lets a keyboard through."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from edgestill.coordinator.dashboard import routes
from edgestill.coordinator.dashboard.routes import make_dashboard_router
from edgestill.coordinator.settings import Settings
from tests.support.chromium import EXECUTABLE, chromium
from tests.support.dashboard_service import DashboardService, device_name


@contextlib.contextmanager
def serving(service, token="", **settings):
    """The dashboard on a free port of this machine."""
    app = FastAPI(docs_url=None)
    app.include_router(make_dashboard_router(service, Settings(dashboard_token=token, **settings)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.contract
def test_events_over_http_resume_by_last_event_id():
    service = DashboardService()
    with serving(service) as url, httpx2.Client(timeout=30) as client:
        service.advance()
        with client.stream("GET", f"{url}/events?since=2", headers={"Last-Event-ID": "1"}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            assert next(lines) == "retry: 2000"
            assert [next(lines) for _ in range(4)] == ["", "id: 2", "event: change", 'data: {"tasks": []}']
            service.note("upload")
            assert [next(lines) for _ in range(4)] == [
                "",
                "id: 3",
                "event: change",
                'data: {"tasks": ["birds"]}',
            ]


def test_a_page_is_never_older_than_what_its_browser_was_told(monkeypatch):
    """Though pages are kept for ever here: the announcement alone must make them new."""
    monkeypatch.setattr(routes, "PAGE_AGE_S", 1e9)
    service = DashboardService()
    with serving(service) as url, httpx2.Client(timeout=30) as client:
        with client.stream("GET", f"{url}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "retry: 2000"
            assert "round 5 collecting" in client.get(url).text
            service.advance()
            assert [next(lines) for _ in range(2)] == ["", "id: 2"]
            assert "round 6 collecting" in client.get(url).text


needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium on this machine")
NAMES = ("raspberry-pi-5", "W" * 80, "Anna's phone")
TEXT_CONTRASTS = """(() => {
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const parts = (c) => c.match(/[\\d.]+/g).map(Number);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  let least = 99;
  for (const e of document.querySelectorAll("main *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.closest("title, desc")) continue; // tooltips, drawn by the browser
    const style = getComputedStyle(e);
    const color = parts(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(color.slice(0, 3)), light(ground(e).slice(0, 3))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least; })()"""


CUT_TABLES = """[...document.querySelectorAll(".card.scroll")].filter(
  (one) => one.scrollWidth > one.clientWidth).length"""


@pytest.mark.contract
@needs_chromium
def test_in_a_browser_pages_fit_read_well_and_follow_changes(tmp_path):
    service = DashboardService(names=NAMES)
    with serving(service, "s3cret") as url, chromium() as browser:
        browser.open(f"{url}/", 360, 800)
        browser.evaluate("document.getElementById('token').value = 's3cret'; document.forms[0].submit()")
        browser.wait_for("document.querySelector('.tasks') !== null")
        browser.messages.clear()  # that the form came with 401 is as it should be
        for width, height in ((360, 800), (1280, 900)):
            for dark in (False, True):
                for path in ("/", "/tasks/birds", f"/tasks/birds/devices/{device_name(1)}"):
                    browser.open(url + path, width, height, dark)
                    assert browser.evaluate("document.documentElement.scrollWidth") <= width
                    assert browser.evaluate(CUT_TABLES) == 0, "a table runs off its card"
                    assert browser.evaluate(TEXT_CONTRASTS) >= 4.5, (width, dark, path)
                    browser.screenshot(tmp_path / "page.png")
                    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        browser.open(f"{url}/tasks/birds", 1280, 900)
        browser.wait_for("document.getElementById('connection').dataset.state === 'live'")
        browser.evaluate("document.querySelector('#curves details').open = true")
        service.advance()
        browser.wait_for("document.querySelector('#state .lead').textContent.includes('Round 6 of 12')")
        browser.wait_for("document.getElementById('news').textContent.includes('round 6 collecting')")
        assert browser.evaluate("document.querySelector('#curves details').open")
        assert browser.evaluate("document.querySelectorAll('#rounds tbody tr').length") == 6
        assert browser.evaluate("document.querySelector('[data-deadline]').textContent").endswith("left")
        last_seen = "#devices td[data-label='Last seen'] time"
        seen = browser.evaluate(f'[...document.querySelectorAll("{last_seen}")].map((e) => e.textContent)')
        # the script's words are the server's
        assert [re.sub(r"[0-9]+", "N", text) for text in seen[2:]] == ["N min ago", "N h ago", "N d ago"]
        assert browser.messages == []


@pytest.mark.contract
@needs_chromium
def test_in_a_browser_the_keyboard_reaches_the_content_first():
    with serving(DashboardService()) as url, chromium() as browser:
        browser.open(f"{url}/tasks/birds", 1280, 900)
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.className") == "skip"
        assert browser.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        browser.press("Enter")
        browser.wait_for("document.activeElement.id === 'content'")
