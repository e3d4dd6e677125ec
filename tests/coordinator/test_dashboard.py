"""The dashboard: what its pages say and are built of, and who may see them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from edgestill.coordinator.dashboard import curves, formats, routes, views
from edgestill.coordinator.dashboard.events import RETRY_MS, SUBSCRIBERS_AT_MOST
from edgestill.coordinator.dashboard.pages import DEVICES_A_PAGE, ROUNDS_SHOWN
from edgestill.coordinator.dashboard.routes import make_dashboard_router
from edgestill.coordinator.http.app import make_app
from edgestill.coordinator.liveness import Liveness
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.records import RefusalCount
from edgestill.runtime.device.outputs import pack
from tests.support.coordinator_round import add_task, enrol, run_due, submit
from tests.support.dashboard_service import DashboardService, device_name, make_task

VOID = {"meta", "link", "input", "br", "hr", "img"}
NOW = Liveness(time.time(), 110.0)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00"


class Document(HTMLParser):
    """The elements of a page in order, as (tag, attributes, text below); refuses unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        texts: list[str] = []
        self.elements.append((tag, dict(attributes), texts))
        if tag not in VOID:
            self._open.append((tag, texts))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag

    def handle_data(self, data):
        for _, texts in self._open:
            texts.append(data)

    def all(self, tag, **attributes):
        return [
            one for one in self.elements
            if one[0] == tag and all(one[1].get(k.replace("_", "-").strip("-")) == v for k, v in attributes.items())
        ]  # fmt: skip

    def text(self, tag, **attributes):
        (found,) = self.all(tag, **attributes)
        return " ".join("".join(found[2]).split())


def make_client(service=None, token=""):
    app = FastAPI(docs_url=None)
    app.include_router(make_dashboard_router(service or DashboardService(), Settings(dashboard_token=token)))
    return TestClient(app, follow_redirects=False)


@pytest.fixture(scope="module")
def client():
    with make_client() as one:
        yield one


@pytest.mark.parametrize(
    "path",
    ["/", "/tasks/birds", "/tasks/empty", "/tasks/none-such", f"/tasks/birds/devices/{device_name(0)}",
     "/tasks/birds/devices/none-such", "/tasks/none-such/devices/d-a"],
)  # fmt: skip
def test_pages_are_built_for_keyboards_and_screen_readers(client, path):
    page = Document(client.get(path).text)
    names = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(names) == len(set(names))
    assert page.elements[0][:2] == ("html", {"lang": "en"})
    for landmark in ("header", "main", "h1"):
        assert len(page.all(landmark)) == 1
    assert page.all("nav", aria_label="Main") and page.all("title")[0][2]
    assert page.all("a")[0][1]["href"] == "#content" and "content" in names
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    for tag, attributes, _ in page.elements:
        for reference in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(reference) or "").split()) <= set(names)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img"
    for tag, attributes, texts in page.all("script") + page.all("style"):
        assert tag == "script" and attributes["src"] and not texts


def test_the_task_page_shows_what_the_store_holds(client):
    page = Document(client.get("/tasks/birds").text)
    said = " ".join("".join(page.all("main")[0][2]).split())
    for words in (
        "Round 5 of 12: 1 1 of 4 accepted, 5 selected", "1 accepted at the deadline, at least 2 are needed",
        "both, fp16", "4, at least 1", "raspberry-pi-5", device_name(0), "onnxruntime", "67.7 % 39.8 %",
        "The round no longer collects outputs", "565 kB / 2.08 MB", "Together − alone, pointsT_priv +2.6, T_uni +6.1",
        "Time leftabout 33 min", "training", "silent since 2 h ago",
    ):  # fmt: skip
        assert words in said, words
    titles = ["".join(e[2]) for e in page.all("h3")]
    assert titles == ["Accuracy on T_uni", "Accuracy on T_priv", "Loss", "Bytes a round",
                      "Class distribution of each device"]  # fmt: skip
    assert len(page.all("svg", class_="chart")) == len(titles)


def test_the_curves_tables_hold_the_means_of_the_reports():
    service = DashboardService(rounds=2, devices=3)
    first = service.round_records[0]
    reports = {name: {**report, "after": {"t_uni": share, "loss": 1.0}}
               for (name, report), share in zip(first.reports.items(), (0.2, 0.4, 0.9), strict=True)}  # fmt: skip
    service.round_records[0] = dataclasses.replace(first, reports=reports)
    task = views.view_task(service.tasks()[0], service.rounds("birds"), service.devices("birds"), [], NOW)
    assert task.rounds[0].after == views.Means(None, pytest.approx(0.5), 1.0)
    assert task.rounds[0].bytes_down == 3 * 413_000
    (uniform, *_) = curves.draw_task(task)
    assert uniform.columns == ("round", "global model", "devices before", "devices after", "devices alone")
    assert uniform.rows[0][3] == "50 %" and uniform.rows[1] == ("2", "–", "–", "–", "–")


def test_what_devices_say_is_shown_as_text_only():
    service = DashboardService(names=(HOSTILE,))
    service.round_records[-1] = dataclasses.replace(service.round_records[-1], reason=HOSTILE)
    with make_client(service) as client:
        text = client.get("/tasks/birds").text
        page = Document(text)
        assert client.get(f"/tasks/birds/devices/{device_name(0)}").text.count("&lt;script&gt;alert(1)") > 3
    assert len(page.all("script")) == 1 and not page.all("img")
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5
    assert "".join(page.all("bdi")[0][2]).startswith("<script>alert(1)")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1, 1e308, 10**400, "7", None, [], {}, True, 5e-324]
)
def test_made_up_figures_of_a_device_break_no_page(value):
    service = DashboardService()
    lies = {"engine": value, "step_ms": value, "peak_rss_bytes": value, "bytes_down": value, "samples": value,
            "class_counts": [value, value], "before": value,
            "after": {"t_uni": value, "t_priv": value, "loss": value}, "alone": value, "bytes_up": value,
            "epsilon": value}  # fmt: skip
    service.round_records = [dataclasses.replace(one, reports=dict.fromkeys(one.selected, lies))
                             for one in service.round_records]  # fmt: skip
    service.device_records = [
        dataclasses.replace(one, info={"name": value, "memory_bytes": value},
                            status={"battery": value, "charging": value, "memory_free_bytes": value})
        for one in service.device_records
    ]  # fmt: skip
    with make_client(service) as client:
        for path in ("/tasks/birds", f"/tasks/birds/devices/{device_name(0)}", "/tasks/birds/devices.csv"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert device_name(0) in answer.text and not re.search(r"\b(nan|inf)\b", answer.text)


def test_a_limit_of_memory_is_not_shown_as_the_machines():
    service = DashboardService(rounds=2, devices=1)
    service.device_records[0] = dataclasses.replace(
        service.device_records[0],
        info={"memory_bytes": 7_000_000},
        status={"memory_free_bytes": 21_800_000_000},
    )
    (task, _) = service.tasks()
    (device,) = views.view_task(task, service.rounds("birds"), service.devices("birds"), (), NOW).devices
    assert device.memory_text == "210 MB used, 7 MB offered, 21.8 GB free on the machine"


def test_many_devices_come_in_pages_and_many_rounds_are_cut():
    with make_client(DashboardService(rounds=250, devices=230, planned=300)) as client:
        first, last = (Document(client.get(f"/tasks/birds?page={n}").text) for n in (1, 99))
    assert len(first.all("bdi")) == 100 and len(last.all("bdi")) == 30
    assert first.all("a", rel="next")[0][1]["href"] == "?page=2#devices"
    assert not last.all("a", rel="next")
    said = "".join(first.all("main")[0][2])
    assert "The last 50 of 250 rounds" in said and "200 rounds." in said


def test_pages_load_nothing_from_elsewhere_and_forbid_inline_script(client):
    answer = client.get("/tasks/birds")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert answer.headers["cache-control"] == "no-store"
    page = Document(answer.text)
    links = [a.get("href") or a.get("src") for t, a, _ in page.elements if t in ("link", "script")]
    assert len(links) == 3
    for link in links:
        assert link.startswith("/static/")
        file = client.get(link)
        assert file.status_code == 200 and "immutable" in file.headers["cache-control"]
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", file.content)
        again = client.get(link, headers={"If-None-Match": file.headers["etag"]})
        assert again.status_code == 304 and not again.content
    assert client.get("/static/dashboard.py").status_code == 404
    assert client.get("/tasks/none-such").status_code == 404


def test_a_token_guards_pages_and_events_and_leaves_the_address():
    with make_client(token="s3cret-ü;") as client:
        for path in ("/", "/tasks/birds", "/events", "/?token=wrong", "/tasks/birds/rounds.csv",
                     "/tasks/birds/devices.csv", f"/tasks/birds/devices/{device_name(0)}"):  # fmt: skip
            assert client.get(path).status_code == 401, path
            assert "raspberry" not in client.get(path).text
        entered = client.get("/tasks/birds", params={"page": "2", "token": "s3cret-ü;"})
        assert entered.status_code == 303 and entered.headers["location"] == "/tasks/birds?page=2"
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
        answer = client.get("/tasks/birds")
        assert answer.status_code == 200 and "s3cret" not in answer.text


@pytest.mark.parametrize(
    "target", ["https://evil.example", "//evil.example", "/\\evil", "/tasks/birds\r\nX: y", ""]
)
def test_the_form_lets_in_and_never_leads_away(target):
    with make_client(token="s3cret") as client:
        form = Document(client.get("/tasks/birds").text)
        assert form.all("form")[0][1]["action"] == "/token"
        assert form.all("input", type="hidden")[0][1]["value"] == "/tasks/birds"
        assert client.post("/token", data={"token": "wrong"}).status_code == 401
        answer = client.post("/token", data={"token": "s3cret", "next": target})
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        assert client.get("/").status_code == 200
        good = client.post("/token", data={"token": "s3cret", "next": "/tasks/birds"})
        assert good.headers["location"] == "/tasks/birds"
        for path in ("/tasks/birds/devices/d-abc", "/tasks/birds/devices.csv?device=d-abc", "/tasks/b?page=2"):
            assert client.post("/token", data={"token": "s3cret", "next": path}).headers["location"] == path
        assert client.post("/token", content=b"x" * 5000).status_code == 413


def test_the_cookie_is_secure_over_tls():
    app = FastAPI()
    app.include_router(make_dashboard_router(DashboardService(), Settings(dashboard_token="s3cret")))
    client = TestClient(app, base_url="https://testserver", follow_redirects=False)
    assert "secure" in client.get("/?token=s3cret").headers["set-cookie"].lower()


def test_behind_a_proxy_every_address_keeps_its_prefix():
    app = FastAPI()
    app.include_router(make_dashboard_router(DashboardService(), Settings(dashboard_token="s3cret")))
    client = TestClient(app, root_path="/edge", follow_redirects=False)
    entered = client.get("/edge/tasks/birds?token=s3cret")
    assert (
        entered.headers["location"] == "/edge/tasks/birds" and "Path=/edge" in entered.headers["set-cookie"]
    )
    page = Document(client.get("/edge/tasks/birds").text)
    links = [a.get("href") or a.get("src") for t, a, _ in page.elements if t in ("link", "script", "a")]
    assert all(link.startswith(("/edge/", "#", "?")) for link in links)
    assert page.all("body")[0][1]["data-events"] == "/edge/events"


def test_browsers_that_ask_together_share_one_reading(monkeypatch):
    service = DashboardService()
    with make_client(service) as client:
        first = client.get("/").text
        assert client.get("/").text == first and service.reads == 1
        monkeypatch.setattr(routes, "PAGE_AGE_S", -1.0)
        service.advance()
        assert "round 6 collecting" in client.get("/").text
        assert service.reads == 2


def test_the_real_service_fills_the_page_and_no_secret_is_on_it(tmp_path):
    service = Service(Store(), FileBlobs(tmp_path))
    (tmp_path / "blob").write_bytes(b"a bundle and a transfer set")
    digest, size_bytes = service.add_blob(tmp_path / "blob"), 27
    made = make_task("real", rounds=2, goal=2)
    student = dataclasses.replace(made.students[0], bundle=digest, size_bytes=size_bytes)
    transfer = dataclasses.replace(made.transfer, blob=digest, size_bytes=size_bytes, samples=3)
    service.create_task(
        dataclasses.replace(made, students=(student,), transfer=transfer, exchange="latents", mode="consensus",
                            global_student=None, test=None, precision="fp32")
    )  # fmt: skip
    code = service.issue_code("real")
    enrolled = service.enrol(code, {"name": "pi <1>", "engines": ["onnxruntime"], "memory_bytes": 10**9})
    device = service.authenticate(enrolled["token"])
    service.assignment(device)
    work = service.ask(device, {"battery": 0.5, "charging": True})
    packed = pack({"latents": np.ones((3, made.latent_size), np.float32)}, "fp32", {"samples": "70"})
    sent = hashlib.sha256(packed.body).hexdigest()
    service.submit(device, work["round"], device.name, packed.body, sent, packed.content_encoding)
    with pytest.raises(Problem):
        service.submit(device, work["round"], device.name, b"other", hashlib.sha256(b"other").hexdigest())
    report = {"engine": "onnxruntime", "step_ms": 12.5, "class_counts": [60, 10], "after": {"t_uni": 0.25}}
    service.report(device, work["round"], device.name, report)
    with make_client(service) as client:
        text = client.get("/tasks/real").text
        assert 0 < int(Document(text).all("body")[0][1]["data-since"]) <= service.last_change()
        home = client.get("/").text + client.get(f"/tasks/real/devices/{device.name}").text
        assert "12.5 ms" in home and "50 %, charging" in home
    said = " ".join("".join(Document(text).all("main")[0][2]).split())
    for words in ("Round 1 of 2: 1 1 of 2 accepted, 1 selected", "pi <1>", device.name, "uploaded", "25 %",
                  "strongest: 86 %", "The device has already uploaded other outputs"):  # fmt: skip
        assert words in said, words
    for secret in (enrolled["token"], code, hashlib.sha256(enrolled["token"].encode()).hexdigest()):
        assert secret not in text + home


def test_a_refusal_of_a_kind_that_is_not_in_the_catalog_is_still_counted():
    service = DashboardService()
    counts = [RefusalCount(1, "late", 2), RefusalCount(2, "late", 3), RefusalCount(0, "from-the-future", 9)]
    task = views.view_task(service.tasks()[0], service.rounds("birds"), [], counts, NOW)
    assert [(one.kind, one.count) for one in task.refusals] == [("from-the-future", 9), ("late", 5)]
    assert [one.refused for one in task.rounds] == [2, 3, 0, 0, 0]
    assert task.refused == 14


def test_the_limits_in_the_documentation_are_those_of_the_code():
    text = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text(encoding="utf-8")
    assert (
        f"Curves show the last {curves.ROUNDS_CHARTED} rounds, bars the last {curves.BARS_CHARTED}, "
        f"the table of rounds the last {ROUNDS_SHOWN}; devices come in pages of {DEVICES_A_PAGE}"
    ) in " ".join(text.split())
    assert f"class distributions show {curves.DEVICES_CHARTED} of them" in text
    assert f"at most {SUBSCRIBERS_AT_MOST} a replica" in text and f"retry: {RETRY_MS}" in text


@pytest.mark.parametrize(
    ("write", "pairs"),
    [
        (formats.format_bytes, {None: "–", 0: "0 B", 999: "999 B", 1000: "1 kB", 999_499: "999 kB", 999_500: "1 MB",
                              12_345_678: "12.3 MB", 3e18: "3000000 TB"}),
        (formats.format_percent, {None: "–", 0.0: "0 %", 0.4956: "49.6 %", 1.0: "100 %"}),
        (formats.format_milliseconds, {None: "–", 18.44: "18.4 ms", 113.0: "113 ms", 1500.0: "1.5 s"}),
        (lambda s: formats.format_ago(0, s), {-3: "just now", 5: "5 s ago", 61: "1 min ago", 7300: "2 h ago",
                                            200_000: "2 d ago"}),
        (lambda s: formats.format_left(s, 0), {-1: "deadline reached", 0.2: "1 s left", 81: "1 min 21 s left",
                                             7300: "2 h 1 min left"}),
    ],
)  # fmt: skip
def test_figures_read_well(write, pairs):
    assert {value: write(value) for value in pairs} == pairs


def test_a_page_of_a_device_shows_its_own_figures(client):
    page = Document(client.get(f"/tasks/birds/devices/{device_name(1)}").text)
    said = " ".join("".join(page.all("main")[0][2]).split())
    for words in ("Device Anna's phone", "Rounds uploaded3", "Studentcnn4", "Engineexecutorch", "42.1 ms", "44 %",
                  "220 MB used, 8 GB offered, 1.9 GB free on the machine", "aarch64", "67.7 %alone 65.1 %",
                  "58.4 % / 67.7 %"):  # fmt: skip
        assert words in said, words
    titles = ["".join(e[2]) for e in page.all("h3")]
    assert titles == ["Accuracy on T_uni", "Accuracy on T_priv", "Loss", "Time of a step", "Samples of each class"]
    links = [a["href"] for _, a, _ in page.all("a")]
    assert "/tasks/birds" in links and f"/tasks/birds/devices.csv?device={device_name(1)}" in links


def test_a_device_is_compared_with_itself_alone_and_only_those_that_told_both_count():
    service = DashboardService(rounds=2, devices=3)
    first = service.round_records[0]
    (one, two, three) = first.selected
    service.round_records[0] = dataclasses.replace(first, reports={
        one: {"after": {"t_priv": 0.75, "t_uni": 0.5}, "alone": {"t_priv": 0.5, "t_uni": 0.25}},
        two: {"after": {"t_priv": 0.5, "t_uni": 0.5}, "alone": {"t_uni": 0.375}},
        three: {"after": {"t_priv": 0.9, "t_uni": 0.9}},
    })  # fmt: skip
    task = views.view_task(service.tasks()[0], service.rounds("birds"), service.devices("birds"), [], NOW)
    assert (task.gain.t_priv, task.gain.t_uni) == (0.25, (0.25 + 0.125) / 2)
    # what was trained alone for one round is not compared with what was trained together for two
    service.round_records[1] = dataclasses.replace(service.round_records[1], reports={
        one: {"after": {"t_priv": 0.9, "t_uni": 0.9}, "alone": None}, two: {"samples": 3},
    })  # fmt: skip
    task = views.view_task(service.tasks()[0], service.rounds("birds"), service.devices("birds"), [], NOW)
    assert (task.gain.t_priv, task.gain.t_uni) == (None, None)
    assert {device.device: device.after.t_uni for device in task.devices} == {one: 0.9, two: 0.5, three: 0.9}


def test_the_time_that_is_left_is_that_of_the_last_rounds():
    service = DashboardService(rounds=5, planned=12)  # four ended, which took 280 s each; the fifth is 40 s old
    opened_s = service.round_records[-1].opened_s
    devices = [dataclasses.replace(one, seen_s=opened_s + 39) for one in service.device_records]

    def left_s(after_s, **changed):
        now, record = Liveness(opened_s + after_s, 110.0), dataclasses.replace(service.tasks()[0], **changed)
        return views.view_task(record, service.rounds("birds"), devices, [], now).seconds_left

    assert left_s(40) == pytest.approx(8 * 280 - 40)
    assert left_s(280 + 50) == pytest.approx(7 * 280), "a round that is late takes no time from the next"
    assert left_s(5000) is None, "every device is silent"
    assert left_s(40, finished=True) is None
    assert views.view_task(service.tasks()[1], [], [], [], NOW).seconds_left is None


@pytest.mark.parametrize(
    ("seen_ago_s", "selected", "accepted", "arriving", "ended", "state"),
    [
        (1, False, False, False, False, "waiting"),
        (111, False, False, False, False, "silent"),
        (40, True, False, False, False, "training"),
        (200, True, False, False, False, "silent"),  # before the round opened, so another of its name was selected
        (100, True, True, False, False, "uploaded"),
        (111, True, True, False, False, "silent"),
        (111, True, False, True, False, "uploading"),
        (9000, False, False, False, True, "done"),
    ],
)
def test_what_a_device_is_at(seen_ago_s, selected, accepted, arriving, ended, state):
    service = DashboardService(rounds=1, devices=1)
    (device,), (present,) = service.device_records, service.round_records
    now_s = present.opened_s + 100.0
    device = dataclasses.replace(device, seen_s=now_s - seen_ago_s)
    present = dataclasses.replace(present, deadline_s=now_s + 1, selected=(device.name,) * selected,
                                  accepted=(device.name,) * accepted)  # fmt: skip
    now = Liveness(now_s, 110.0, {device.name} if arriving else ())
    assert now.state_of(device, present, ended) == state
    if state == "training":
        late = dataclasses.replace(now, now_s=now_s + 1)
        assert late.state_of(device, present, ended) == "waiting", "its deadline has passed"


def test_a_task_without_test_images_shows_its_validation_accuracy():
    service = DashboardService()
    with make_client(service) as client:
        assert "Global T_uni" in client.get("/").text
        assert "global model on validation images" not in client.get("/tasks/birds").text
        for number, one in enumerate(service.round_records):
            measured = {k: v for k, v in one.metrics.items() if k != "t_uni"} | {"validation_accuracy": 0.722}
            service.round_records[number] = dataclasses.replace(one, metrics=measured)
    with make_client(service) as client:
        listed, page = client.get("/").text, client.get("/tasks/birds").text
    for shown in (listed, page):
        assert "Global model, validation</abbr></dt><dd>72.2%" in shown.replace(" %", "%")
    assert "validation</td>" in page or "</abbr> validation" in page
    assert "global model on validation images" in page, "no curve"


def test_tables_are_for_spreadsheets_and_start_no_formula():
    service = DashboardService(names=("=cmd|' /C calc'!A0", 'say "x", y'))
    chosen = service.round_records[1]
    measured = {**chosen.metrics, "validation_accuracy": 0.625}
    service.round_records[1] = dataclasses.replace(chosen, best=True, metrics=measured)
    with make_client(service) as client:
        answer = client.get("/tasks/birds/rounds.csv")
        assert answer.headers["content-type"].startswith("text/csv")
        assert answer.headers["content-disposition"] == 'attachment; filename="birds-rounds.csv"'
        rounds = list(csv.DictReader(io.StringIO(answer.text)))
        devices = list(csv.DictReader(io.StringIO(client.get("/tasks/birds/devices.csv").text)))
        one = f"/tasks/birds/devices.csv?device={device_name(1)}"
        own = list(csv.DictReader(io.StringIO(client.get(one).text)))
        assert client.get("/tasks/none-such/rounds.csv").status_code == 404
        assert client.get("/tasks/birds/devices.csv?device=d-x").status_code == 404
    first = service.round_records[0]
    assert [row["phase"] for row in rounds] == [one.phase for one in service.round_records]
    assert float(rounds[0]["global_t_uni"]) == first.metrics["t_uni"] and rounds[2]["global_t_uni"] == ""
    assert [row["round"] for row in rounds if row["best"] == "True"] == ["2"]
    assert [row["validation_accuracy"] for row in rounds[:3]] == ["", "0.625", ""]
    assert rounds[2]["reason"] == "1 accepted at the deadline, at least 2 are needed"
    assert len(devices) == 25 and [row for row in devices if row["device"] == device_name(1)] == own
    assert {row["name"] for row in devices} == {"'=cmd|' /C calc'!A0", 'say "x", y'}
    assert float(own[0]["after_t_priv"]) == first.reports[device_name(1)]["after"]["t_priv"]


def test_every_word_is_explained_where_it_stands_and_below(client):
    for path in ("/", "/tasks/birds", f"/tasks/birds/devices/{device_name(0)}"):
        page = Document(client.get(path).text)
        hinted = {"".join(texts): a["title"] for _, a, texts in page.all("abbr")}
        assert any("T_uni" in name and "all classes alike" in title for name, title in hinted.items()), path
        (below,) = [e for e in page.elements if e[0] == "section" and e[1].get("id") == "words"]
        assert "drawn like the device’s own classes" in "".join(below[2])
        links = [a["href"] for _, a, _ in page.all("a")]
        assert links[-2:] == ["/docs", "/metrics"]


def test_the_commands_on_a_page_say_nothing_of_the_server(tmp_path):
    app = FastAPI(docs_url=None)
    settings = Settings(data_dir=tmp_path / "a folder", database="postgresql://me:s3cret@db/x")
    app.include_router(make_dashboard_router(DashboardService(), settings))
    with TestClient(app, base_url="http://192.0.2.7:8000") as client:
        text = client.get("/tasks/empty").text
    assert "s3cret" not in text and str(tmp_path) not in text and "with the <code>--data-dir</code>" in text
    (shown,) = Document(text).all("pre")
    assert "".join(shown[2]).splitlines() == [
        "edgestill enrol --task empty",
        "edgestill join http://192.0.2.7:8000 --code CODE --data PATH",
    ]


def test_names_of_classes_stand_on_the_axes():
    names = ("plum", "a very long name of a class", "pear")
    service = DashboardService(rounds=2, devices=1)
    task = views.view_task(service.tasks()[0], service.rounds("birds"), service.devices("birds"), [], NOW)
    drawn = curves.draw_classes(dataclasses.replace(task, class_names=names))
    assert drawn.columns[2:6] == (*names, "class 3")
    assert ">plum<" in drawn.svg and ">a very…class<" in drawn.svg and "plum: 130 of" in drawn.svg
    (history,) = views.view_devices(service.tasks()[0], service.rounds("birds"), service.device_records[:1], NOW)
    own = curves.draw_class_counts(history, names)
    assert own.rows[0] == ("plum", "130") and ">plum<" in own.svg
    assert curves.draw_class_counts(history, ()).rows[0] == ("0", "130")


def test_the_page_leads_to_the_model_and_its_bundle(tmp_path, monkeypatch):
    """Downloads as a browser makes them: with the dashboard's cookie and nothing else."""
    monkeypatch.setattr(routes, "PAGE_AGE_S", -1.0)
    service = Service(Store(), FileBlobs(tmp_path / "blobs"))
    task = add_task(service, tmp_path, global_student=True, exchange="both", goal=1)
    device = enrol(service)
    with TestClient(make_app(service, Settings(dashboard_token="s3cret"), loop=False)) as client:
        assert client.get("/?token=s3cret").status_code == 200

        def downloads():
            links = Document(client.get("/tasks/birds").text).all("a")
            return [a["href"] for _, a, _ in links if "download" in a]

        assert not [link for link in downloads() if "/v1/" in link], "there is no model yet"
        service.ask(device, {})
        submit(service, task, device, "birds.1")
        run_due(service, tmp_path)
        found = downloads()
        assert [link for link in found if "/v1/" in link] == ["/v1/tasks/birds/model", "/v1/tasks/birds/bundle"]
        for link in found:
            answer = client.get(link)
            assert answer.status_code == 200 and "attachment" in answer.headers["content-disposition"], link
        client.cookies.clear()
        assert {client.get(link).status_code for link in found} == {401}
