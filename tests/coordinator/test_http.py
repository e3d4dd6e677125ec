"""The API from outside: a whole round, every refusal, ranges, waiting, and what is never logged."""

from __future__ import annotations

import asyncio
import gzip
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.coordinator.http import figures as figures_module
from edgestill.coordinator.http.routes.bodies import MAX_JSON_BYTES, sha256_of_content_digest
from edgestill.runtime.device.outputs import unpack
from tests.support.coordinator_site import (
    INFO,
    LATENT_SIZE,
    SAMPLES,
    Site,
    content_digest,
    finish_job,
    make_site,
    outputs,
    problem_of,
    start_round,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def test_two_rounds_over_http(site: Site) -> None:
    one, two = start_round(site)
    assigned = one.get("/v1/assignment").json()
    assert "students" not in assigned["task"] and assigned["student"]["student"] == "cnn3"
    work = one.work().json()
    assert work["number"] == 1 and work["global_outputs"] is None and 0 < work["deadline_s"] <= 60
    assert work == one.work().json(), "asked again, the answer is the same"
    assert one.get(f"/v1/blobs/{assigned['student']['bundle']}").content == site.bundle

    assert one.upload("birds.1", outputs(1)).status_code == 201
    assert one.work().status_code == 204, "it has uploaded"
    assert one.upload("birds.1", outputs(1)).status_code == 200
    assert problem_of(one.upload("birds.1", outputs(3))) == "other_digest"
    path = f"/v1/rounds/birds.1/devices/{one.name}/report"
    report = {"step_ms": 3.5, "samples": 10, "before": {"t_uni": 0.1}, "unheard_of": 1}
    assert site.client.put(path, json=report, headers=one.headers).status_code == 204
    assert two.upload("birds.1", outputs(2)).status_code == 201
    finish_job(site)

    work = two.work().json()
    assert work["round"] == "birds.2" and work["size_bytes"] > 0
    blob = two.get(f"/v1/blobs/{work['global_outputs']}").content
    assert len(blob) == work["size_bytes"]
    assert problem_of(two.upload("birds.1", outputs(2) + b"x")) in ("other_digest", "late")
    three = site.enrol()
    assert problem_of(three.upload("birds.1", outputs(5))) in ("late", "not_selected")
    for device, seed in ((one, 4), (two, 5)):
        assert device.work().status_code == 200
        assert device.upload("birds.2", outputs(seed)).status_code == 201
    finish_job(site)
    assert problem_of(one.work()) == "task_finished"
    reports = [one_round.reports for one_round in site.service.rounds("birds") if one_round.number == 1]
    assert reports[0][one.name]["step_ms"] == 3.5 and "unheard_of" not in reports[0][one.name]


def test_published_outputs_are_the_mean_of_what_was_accepted(site: Site) -> None:
    one, two = start_round(site)
    arrays = [np.full((SAMPLES, LATENT_SIZE), value, np.float32) for value in (1.0, 4.0)]
    assert one.upload("birds.1", outputs(samples=10, latents=arrays[0])).status_code == 201
    assert two.upload("birds.1", outputs(samples=20, latents=arrays[1])).status_code == 201
    finish_job(site)
    work = one.work().json()
    blob = one.get(f"/v1/blobs/{work['global_outputs']}").content
    found, _ = unpack(
        blob, "identity" if blob[:4] != b"\x28\xb5\x2f\xfd" else "zstd", {"latents": (SAMPLES, LATENT_SIZE)}
    )
    np.testing.assert_allclose(found["latents"], 3.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"authorization": None}, 401, "unauthorised"),
        ({"authorization": "Bearer est_" + "x" * 43}, 401, "unauthorised"),
        ({"authorization": "Basic dTpw"}, 401, "unauthorised"),
        ({"authorization": "Bearer \xff\xfe"}, 401, "unauthorised"),
        ({"content-length": None}, 411, "length_required"),
        ({"content-length": "999999999"}, 413, "too_large"),
        ({"content-length": "9" * 40}, 400, "malformed"),
        ({"content-length": "-1"}, 400, "malformed"),
        ({"content-digest": None}, 400, "malformed"),
        ({"content-digest": "sha-256=:short:"}, 400, "malformed"),
        ({"content-digest": "md5=:1B2M2Y8AsgTpgAmY7PhCfg==:"}, 400, "malformed"),
        ({"content-encoding": "gzip"}, 415, "encoding"),
        ({"path": "/v1/rounds/birds.1/devices/OTHER/outputs"}, 403, "foreign_device"),
        ({"path": "/v1/rounds/birds.9/devices/MINE/outputs"}, 404, "no_such_round"),
        ({"path": "/v1/rounds/crows.1/devices/MINE/outputs"}, 404, "no_such_round"),
        ({"path": "/v1/rounds/birds.1\x00/devices/MINE/outputs"}, 404, "no_such_round"),
        ({"path": "/v1/rounds/birds.99999999999999999999/devices/MINE/outputs"}, 404, "no_such_round"),
    ],
)  # fmt: skip
def test_what_can_be_refused_on_its_head_is(
    site: Site, change: dict[str, Any], status: int, kind: str
) -> None:
    """The body is never asked for."""
    one, two = start_round(site)
    body = outputs()
    headers = {
        "authorization": f"Bearer {one.token}",
        "content-length": str(len(body)),
        "content-digest": content_digest(body),
    }
    path = change.pop("path", "/v1/rounds/birds.1/devices/MINE/outputs")
    headers = {name: value for name, value in (headers | change).items() if value is not None}
    path = path.replace("MINE", one.name).replace("OTHER", two.name)
    sent = asyncio.run(call_asgi(site, "PUT", path, headers))
    assert sent[0]["status"] == status, sent
    assert f'"urn:edgestill:problem:{kind}"'.encode() in sent[1]["body"]
    if status == 401:
        assert any(name == b"www-authenticate" for name, _ in sent[0]["headers"])


async def call_asgi(
    site: Site, method: str, path: str, headers: dict[str, str], messages: list[Any] = ()
) -> list[Any]:
    """What the app sends; to be asked for more messages than there are is a failure."""
    left, sent = list(messages), []

    async def receive() -> Any:
        assert left, "the body was asked for"
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": raw, "scheme": "http",
        "server": ("testserver", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await site.app(scope, receive, send)
    return sent


def test_a_body_that_is_longer_than_announced_is_not_read_on(site: Site) -> None:
    one, _ = start_round(site)
    body = outputs()
    headers = {
        "authorization": f"Bearer {one.token}",
        "content-length": str(len(body)),
        "content-digest": content_digest(body),
    }
    more = {"type": "http.request", "body": body, "more_body": True}
    path = f"/v1/rounds/birds.1/devices/{one.name}/outputs"
    sent = asyncio.run(call_asgi(site, "PUT", path, headers, [more, more]))
    assert sent[0]["status"] == 413
    cut = [{"type": "http.request", "body": body[:9], "more_body": True}, {"type": "http.disconnect"}]
    asyncio.run(call_asgi(site, "PUT", path, headers, cut))
    assert site.app.state.context.upload_memory.used_bytes == 0
    assert one.upload("birds.1", body).status_code == 201


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda body: body[:-1], "malformed"),
        (lambda _: b"", "malformed"),
        (lambda _: b"\xff" * 100, "malformed"),
        (lambda _: outputs(logits=np.zeros((SAMPLES, 3), np.float32)), "wrong_outputs"),
        (lambda _: outputs(latents=np.zeros((SAMPLES, LATENT_SIZE + 1), np.float32)), "wrong_outputs"),
        (lambda _: outputs(latents=np.zeros((SAMPLES - 1, LATENT_SIZE), np.float32)), "wrong_outputs"),
    ],
)
def test_bodies_that_are_not_the_outputs(site: Site, make: Any, kind: str) -> None:
    one, _ = start_round(site)
    assert problem_of(one.upload("birds.1", make(outputs()))) == kind
    assert one.upload("birds.1", outputs()).status_code == 201


def test_nan_is_refused_and_a_wrong_digest_too(site: Site) -> None:
    one, _ = start_round(site)
    body = bytearray(outputs(latents=np.ones((SAMPLES, LATENT_SIZE), np.float32)))
    body[-4:] = np.float32("nan").tobytes()
    assert problem_of(one.upload("birds.1", bytes(body))) == "wrong_outputs"
    refused = one.upload("birds.1", outputs(1), **{"Content-Digest": content_digest(outputs(2))})
    assert problem_of(refused) == "digest_mismatch"


def test_uploads_that_do_not_fit_in_memory_wait(tmp_path: Path) -> None:
    site = make_site(tmp_path, upload_memory_bytes=100)
    one, _ = start_round(site)
    memory = site.app.state.context.upload_memory
    with memory.taken("d-other", 90):
        refused = one.upload("birds.1", outputs())
        assert problem_of(refused) == "unavailable" and int(refused.headers["Retry-After"]) >= 5
    assert one.upload("birds.1", outputs()).status_code == 201


def test_a_device_that_dribbles_keeps_no_other_out(site: Site) -> None:
    one, two = start_round(site)
    memory = site.app.state.context.upload_memory
    with memory.taken(one.name, 1), memory.taken(one.name, 1):
        refused = one.upload("birds.1", outputs())
        assert problem_of(refused) == "unavailable" and int(refused.headers["Retry-After"]) >= 5
        assert two.upload("birds.1", outputs(1)).status_code == 201
    assert memory.used_bytes == 0
    assert one.upload("birds.1", outputs()).status_code == 201


def test_a_token_neither_reads_nor_writes_for_another(site: Site, tmp_path: Path) -> None:
    one, two = start_round(site)
    assert problem_of(one.upload("birds.1", outputs(), device=two.name)) == "foreign_device"
    path = f"/v1/rounds/birds.1/devices/{two.name}/report"
    assert problem_of(site.client.put(path, json={}, headers=one.headers)) == "foreign_device"
    (tmp_path / "secret").write_bytes(b"another task's")
    foreign = site.service.add_blob(tmp_path / "secret")
    assert problem_of(one.get(f"/v1/blobs/{foreign}")) == "not_found"
    assert one.upload("birds.1", outputs()).status_code == 201
    uploaded = sha256_of_content_digest(content_digest(outputs()))
    assert problem_of(two.get(f"/v1/blobs/{uploaded}")) == "not_found", "uploads are nobody else's business"


def test_a_code_works_once(site: Site) -> None:
    device = site.enrol()
    again = site.client.post("/v1/enrol", json={"code": device.code, "device": INFO})
    assert problem_of(again) == "code_refused" and again.status_code == 403
    unknown = site.client.post("/v1/enrol", json={"code": "AAAAA-AAAAA-AAAAA-AAAAA", "device": INFO})
    assert problem_of(unknown) == "code_refused"


# bodies in JSON


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"[" * 30_000, "malformed"),
        (b'"\xff"', "malformed"),
        (b"[]", "invalid"),
        (b'{"battery": 2}', "invalid"),
        (b'{"battery": NaN}', None),
        (b'{"temperature_c": 1e999}', "invalid"),
        (b'{"memory_free_bytes": 1' + b"0" * 400 + b"}", "invalid"),
        (b'{"charging": {}}', "invalid"),
        (b" " * (MAX_JSON_BYTES + 1), "too_large"),
    ],
)
def test_json_that_makes_no_sense(site: Site, body: bytes, kind: str | None) -> None:
    device = site.enrol()
    answer = site.client.post("/v1/work", content=body, headers=device.headers)
    assert problem_of(answer) == (kind or problem_of(answer)) and 400 <= answer.status_code < 500


@pytest.mark.parametrize("text", ["\\u0000", "\\ud800", "a\\u001b[31m", "x" * 201])
def test_text_that_would_hurt_the_database_or_the_log(site: Site, text: str) -> None:
    code = site.service.issue_code("birds")
    body = f'{{"code": "{code}", "device": {{"name": "{text}", "engines": ["onnxruntime"]}}}}'
    answer = site.client.post("/v1/enrol", content=body.encode())
    assert problem_of(answer) in ("invalid", "malformed") and code not in answer.text
    assert site.enrol().name, "the code was not used up"


@pytest.mark.parametrize("wait_s", ["-1", "nan", "inf", "1e9", "x"])
def test_a_wait_that_makes_no_sense(site: Site, wait_s: str) -> None:
    device = site.enrol()
    assert problem_of(device.work(wait_s)) == "invalid"


def test_every_error_is_a_problem(site: Site) -> None:
    device = site.enrol()
    assert problem_of(site.client.get("/v1/nothing")) == "not_found"
    refused = site.client.delete("/v1/work")
    assert problem_of(refused) == "method_not_allowed" and "POST" in refused.headers["allow"]
    assert problem_of(device.get("/v1/blobs/../../etc/passwd")) == "not_found"
    assert problem_of(device.get("/v1/blobs/" + "A" * 64)) == "not_found"


def test_a_bug_is_answered_without_its_text(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    device = site.enrol()

    def fail(*_: object) -> None:
        raise RuntimeError("inner workings")

    monkeypatch.setattr(site.service, "assignment", fail)
    answer = device.get("/v1/assignment")
    assert problem_of(answer) == "internal" and "inner workings" not in answer.text


# figures, secrets, and the description


def test_figures(tmp_path: Path) -> None:
    site = make_site(tmp_path, dashboard_token="dashboard-secret")
    one, _ = start_round(site)
    one.upload("birds.1", outputs())
    one.upload("birds.7", outputs())
    assert problem_of(site.client.get("/metrics")) == "unauthorised"
    assert problem_of(site.client.get("/metrics", headers=one.headers)) == "unauthorised"
    text = site.client.get("/metrics", headers={"Authorization": "Bearer dashboard-secret"}).text
    route = "/v1/rounds/{round}/devices/{device}/outputs"
    assert f'edgestill_requests_total{{method="PUT",route="{route}",status="201"}} 1.0' in text
    assert 'edgestill_uploads_total{result="created"} 1.0' in text
    assert 'edgestill_refusals_total{kind="no_such_round"} 1.0' in text
    assert 'edgestill_rounds{phase="collecting",task="birds"} 1.0' in text
    assert 'edgestill_rounds{phase="abandoned",task="birds"} 0.0' in text, "or its first is no increase"
    assert '"pi"' not in text and one.token not in text, "no device is called as it calls itself"
    assert site.client.get("/healthz").json() == {"status": "ok"}


def test_figures_of_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(tmp_path)
    one, two = start_round(site)
    one.upload("birds.1", outputs())
    for device, t_uni in ((one, 0.25), (two, 0.75)):
        report = {"after": {"t_uni": t_uni}, "alone": {"t_uni": 0.125}}
        path = f"/v1/rounds/birds.1/devices/{device.name}/report"
        assert site.client.put(path, json=report, headers=device.headers).status_code == 204

    def figures() -> dict[str, float]:
        lines = site.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (one.rsplit(" ", 1) for one in lines if one[:1] != "#")}

    found = figures()
    states = {"training": 1, "uploaded": 1, "silent": 0, "waiting": 0, "uploading": 0, "done": 0}
    for state, count in states.items():
        assert found[f'edgestill_devices{{state="{state}",task="birds"}}'] == count
    assert found[f'edgestill_device_seen_seconds{{device="{one.name}",task="birds"}}'] == site.clock.now_s
    assert found['edgestill_round_deadline_seconds{task="birds"}'] == site.clock.now_s + 60
    assert found[f'edgestill_device_t_uni{{device="{two.name}",task="birds"}}'] == 0.75
    assert found['edgestill_devices_t_uni{task="birds"}'] == 0.5
    assert found['edgestill_devices_alone_t_uni{task="birds"}'] == 0.125
    assert found['edgestill_devices_gain_t_uni{task="birds"}'] == (0.125 + 0.625) / 2
    assert found['edgestill_task_running{task="birds"}'] == 1 and found["edgestill_blobs_free_bytes"] > 0
    monkeypatch.setattr(figures_module, "DEVICES_NAMED", 1)
    assert not [name for name in figures() if one.name in name or two.name in name]
    site.clock.now_s += 111
    assert figures()['edgestill_devices{state="silent",task="birds"}'] == 2
    site.service.stop_task("birds")
    after = figures()
    assert after['edgestill_task_running{task="birds"}'] == 0
    assert not [name for name in after if name.startswith(("edgestill_devices{", "edgestill_device_"))]


def test_tokens_and_codes_are_neither_logged_nor_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    database = tmp_path / "coordinator.db"
    site = make_site(tmp_path, f"sqlite:///{database}", log_level="debug")
    one, two = start_round(site)
    one.upload("birds.1", outputs())
    one.upload("birds.1", b"damaged")
    two.get("/v1/blobs/" + "0" * 64)
    site.client.post("/v1/enrol", json={"code": two.code, "device": INFO})
    site.client.get("/v1/assignment", headers={"Authorization": f"Bearer {one.token}x"})

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(site.service, "assignment", fail)
    one.get("/v1/assignment")
    assert "a bug" in caplog.text, "the log was looked at"
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (one.token, two.token, one.code, two.code, one.code.replace("-", "")):
        assert secret not in caplog.text
        assert secret.encode() not in stored


def test_an_answer_is_not_compressed_and_an_upload_not_unpacked_by_the_server(site: Site) -> None:
    """A body in gzip is refused, not inflated."""
    one, _ = start_round(site)
    body = gzip.compress(outputs())
    assert problem_of(one.upload("birds.1", body, **{"Content-Encoding": "gzip"})) == "encoding"
    assert "content-encoding" not in one.get("/v1/assignment", **{"Accept-Encoding": "gzip"}).headers


def test_the_committed_description_is_the_app_s(site: Site) -> None:
    from edgestill.coordinator.http.openapi import DESCRIPTION_PATH, describe

    described = DESCRIPTION_PATH.read_text(encoding="utf-8")
    assert described == describe(), "run: python -m edgestill.coordinator.http.openapi"


def test_the_page_of_the_api_is_whole_and_needs_no_other_site(site: Site) -> None:
    answer = site.client.get("/docs")
    for path, operations in site.app.openapi()["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in answer.text
    assert "<script" not in answer.text and "//" not in answer.text.replace("<!doctype", "")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_description_names_every_problem_that_the_contract_does(site: Site) -> None:
    contract = (Path(__file__).resolve().parents[2] / "docs/federation.md").read_text(encoding="utf-8")
    paths = site.app.openapi()["paths"]
    for line in contract.splitlines():
        if not line.startswith(("| `GET /v1", "| `POST /v1", "| `PUT /v1")):
            continue
        method, _, path = line.split("`")[1].partition(" ")
        path = path.split(" ")[0].split("?")[0].replace("{sha256}", "{digest}")
        documented = paths[path][method.lower()]["responses"]
        for status in {
            word.strip(" .;,/`") for word in line.replace("/", " ").split() if word.strip(" .;,/`").isdigit()
        }:
            if len(status) == 3:
                assert status in documented, (path, status)
