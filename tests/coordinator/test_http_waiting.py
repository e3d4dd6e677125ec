"""Devices that wait for work: five hundred at once, those that hang up, and the loop that wakes them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.coordinator_site import finish_job, make_site, outputs, start_round

pytestmark = pytest.mark.unit


def test_five_hundred_wait_without_threads_and_are_woken(tmp_path: Path) -> None:
    site = make_site(tmp_path, long_poll_s=60, threads=4)
    device, other = start_round(site)
    assert device.upload("birds.1", outputs()).status_code == 201
    assert other.upload("birds.1", outputs(1)).status_code == 201
    context = site.app.state.context

    async def session() -> list[int]:
        transport = httpx2.ASGITransport(app=site.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://c", timeout=60) as client:

            async def ask() -> int:
                answer = await client.post("/v1/work", params={"wait_s": 60}, json={}, headers=device.headers)
                return answer.status_code

            before = threading.active_count()
            asking = [asyncio.create_task(ask()) for _ in range(500)]
            while context.metrics.waiting._value.get() < 500:
                await asyncio.sleep(0.01)
            assert threading.active_count() - before <= 4 + 1
            await context.call(finish_job, site)  # opens the next round
            context.waiting.wake("crows")  # another task's news wakes nobody
            await asyncio.sleep(0.05)
            assert not any(one.done() for one in asking)
            context.waiting.wake("birds")
            return await asyncio.gather(*asking)

    assert asyncio.run(session()) == [200] * 500


def test_who_hangs_up_is_not_selected(tmp_path: Path) -> None:
    site = make_site(tmp_path, long_poll_s=60)
    device, other = start_round(site)
    assert device.upload("birds.1", outputs()).status_code == 201
    context = site.app.state.context

    async def session() -> list[Any]:
        sent: list[Any] = []
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/work",
            "raw_path": b"/v1/work", "query_string": b"wait_s=60", "root_path": "", "scheme": "http",
            "headers": [(b"authorization", device.headers["Authorization"].encode())], "server": ("t", 80),
        }  # fmt: skip
        asking = asyncio.create_task(site.app(scope, receive, send))
        while not context.metrics.waiting._value.get():
            await asyncio.sleep(0.01)
        gone.set()
        await asking
        return sent

    asyncio.run(session())
    assert other.upload("birds.1", outputs(1)).status_code == 201
    finish_job(site)
    context.waiting.wake("birds")
    assert site.service.rounds("birds")[-1].selected == ()
    assert context.metrics.waiting._value.get() == 0


def test_the_loop_opens_rounds_and_wakes_who_waits(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from edgestill.coordinator.http.app import make_app

    site = make_site(tmp_path, tick_s=0.02, long_poll_s=30)
    device = site.enrol()
    with TestClient(make_app(site.service, site.settings)) as client:
        answer = client.post("/v1/work", params={"wait_s": 30}, json={}, headers=device.headers)
        assert answer.status_code == 200
        assert device.upload("birds.1", outputs()).status_code == 201
        site.clock.now_s += 61  # the deadline passes with one upload, which is enough
        answer = client.post("/v1/work", params={"wait_s": 30}, json={}, headers=device.headers)
        assert answer.json()["round"] == "birds.2" and answer.json()["global_outputs"]
