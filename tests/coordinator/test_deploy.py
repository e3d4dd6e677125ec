"""The files of `deploy/`: what they name exists, and the programs that read them take them."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from edgestill.coordinator.settings import load_settings
from tests.coordinator.test_dashboard_browser import serving as serving_dashboard
from tests.support.certificates import write_certificate
from tests.support.coordinator_site import finish_job, make_site, outputs, problem_of
from tests.support.dashboard_service import DashboardService
from tests.test_docs import PARSERS, ROOT

pytestmark = pytest.mark.unit
DEPLOY = ROOT / "deploy"
GRAFANAS = {"$__rate_interval": "5m", "$__range": "1h", "$task": ".*"}
OTHERS = {"up"}  # Prometheus' own


def grafana() -> dict:
    return json.loads((DEPLOY / "grafana.json").read_text())


def alerts() -> list[dict]:
    (group,) = yaml.safe_load((DEPLOY / "edgestill-alerts.yml").read_text())["groups"]
    return group["rules"]


def queries() -> Iterator[tuple[str, str, set[str]]]:
    """Where a query stands, the query, and the labels that the text beside it shows."""
    for panel in grafana()["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in GRAFANAS.items():
                query = query.replace(name, value)
            yield panel["title"], query, set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    for rule in alerts():
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        yield rule["alert"], rule["expr"], shown


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series of a coordinator that has seen everything once: its name and the labels that it has."""
    site = make_site(tmp_path_factory.mktemp("site"))
    devices = [site.enrol() for _ in range(2)]
    for number, device in enumerate(devices):
        assert device.work().status_code == 200
        assert device.upload("birds.1", outputs(number)).status_code == 201
    assert problem_of(devices[0].upload("birds.9", outputs())) == "no_such_round"
    report = {"after": {"t_priv": 0.5, "t_uni": 0.25}, "alone": {"t_priv": 0.5, "t_uni": 0.25}}
    path = f"/v1/rounds/birds.1/devices/{devices[0].name}/report"
    assert site.client.put(path, json=report, headers=devices[0].headers).status_code == 204
    finish_job(site)
    with site.service.store.write() as transaction:  # the task has no test set
        head = transaction.round_head("birds", 1)
        transaction.save_round("birds", head.round, head.version, metrics={"t_uni": 0.5})
    assert devices[0].work().json()["round"] == "birds.2"
    site.app.state.context.metrics.steps.labels("failed").inc()  # a step 5 is a process of its own
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(site.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_is_promql_and_asks_for_what_there_is(served: dict[str, set[str]]) -> None:
    found = list(queries())
    assert len(found) > 30
    named = set()
    for where, query, shown in found:
        promql_parser.parse(query)
        metrics = set(re.findall(r"\bedgestill_\w+", query))
        named |= metrics
        assert metrics <= served.keys(), f"{where}: {metrics - served.keys()}"
        selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        grouped = {label.strip() for one in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in one.split(",")}
        labels = {label for metric in metrics for label in served[metric]} | {"instance", "job"}
        assert selected | grouped | shown <= labels, where
        if grouped and "on (" not in query:  # what is summed away can be shown no more
            assert shown <= grouped, where
    assert {one for one in served if not one.endswith(("_created", "_count", "_sum"))} <= named, "each is watched"


def test_panels_and_rules_are_named_once_and_fit_their_programs() -> None:
    panels = grafana()["panels"]
    assert len({one["id"] for one in panels}) == len(panels) == len({one["title"] for one in panels})
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
        assert len({one["refId"] for one in panel["targets"]}) == len(panel["targets"])
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
    page = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"`(Edgestill\w+)`", page)) == {rule["alert"] for rule in rules}, "what to do about each"


def commands_of(unit: Path) -> list[list[str]]:
    lines = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_a_unit_runs_a_command_that_there_is_and_is_shut_off(unit: Path, tmp_path: Path) -> None:
    ((program, *words),) = commands_of(unit)
    assert program.endswith("/edgestill")
    PARSERS[""].parse_args(words)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    text = unit.read_text().replace(program, sys.executable)
    (tmp_path / unit.name).write_text(text)
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", tmp_path / unit.name],
                              capture_output=True, text=True)  # fmt: skip
    complaints = [line for line in verified.stderr.splitlines() if unit.name in line]
    assert complaints == [], verified.stderr
    asked = ["systemd-analyze", "security", "--offline=yes", "--json=short", tmp_path / unit.name]
    rated = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert len(rated) > 50
    exposed = sum(float(one["exposure"] or 0) for one in rated)
    assert exposed < 3.0, [(one["name"], one["exposure"]) for one in rated if one["exposure"]]


def test_the_timer_starts_the_backup() -> None:
    timer = configparser.ConfigParser()
    timer.read(DEPLOY / "edgestill-backup.timer")
    assert timer["Timer"]["OnCalendar"] and (DEPLOY / "edgestill-backup.service").is_file()


def test_the_settings_are_settings() -> None:
    found = load_settings(config=DEPLOY / "coordinator.toml")
    assert found.public_url == "https://edge.example.org" and found.data_dir == Path("/var/lib/edgestill")


def test_the_container_serves_with_extras_that_there_are() -> None:
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    steps = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith(("#", " "))]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"\[([a-z0-9,]+)\]", text)
    assert set(named.split(",")) <= extras.keys() and "coordinator" in named
    last = dict(steps)
    words = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    parsed = PARSERS[""].parse_args(words[1:])
    assert words[0] == "edgestill" and parsed.host == "0.0.0.0"
    assert last["USER"].isdecimal() and last["USER"] != "0"
    for line in [value for name, value in steps if name == "COPY" and "--from" not in value]:
        assert (ROOT / line.split()[0]).exists(), line


def test_the_container_is_built_of_what_a_wheel_needs_and_of_no_more() -> None:
    lines = (ROOT / ".containerignore").read_text().splitlines()
    assert [line for line in lines if line[:1] not in "#!"][0] == "*", "nothing else is seen"
    seen = {line.removeprefix("!/") for line in lines if line.startswith("!/")}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    needed = {Path(folder).parts[0] for folder in setuptools["package-dir"].values()}
    needed |= {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"}
    assert seen == needed and all((ROOT / name).exists() for name in seen)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.contract
@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx on this machine")
def test_nginx_passes_everything_on_and_speaks_tls(tmp_path: Path) -> None:
    """The file as it is, but for its ports, its certificate and its name; live events come while they happen."""
    write_certificate(tmp_path / "fullchain.pem", tmp_path / "privkey.pem")
    service, plain, tls = DashboardService(), free_port(), free_port()
    with serving_dashboard(service, "s3cret", public_url="https://127.0.0.1") as url:
        text = (DEPLOY / "nginx.conf").read_text()
        for old, new in (
            ("127.0.0.1:8000", url.removeprefix("http://")), ("listen 80;", f"listen 127.0.0.1:{plain};"),
            ("listen 443 ", f"listen 127.0.0.1:{tls} "), ("/etc/edgestill/tls", str(tmp_path)),
            ("edge.example.org", "127.0.0.1"),
        ):  # fmt: skip
            assert old in text
            text = text.replace(old, new)
        text = re.sub(r" *listen \[::\].*\n", "", text)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr warn; events {{}}\nhttp {{ access_log off;\n"
            + "".join(f"{one}_temp_path {tmp_path}/{one};\n"
                      for one in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
            + text + "}\n"
        )  # fmt: skip
        nginx = subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf"], stderr=subprocess.PIPE, text=True)
        try:
            context = ssl.create_default_context(cafile=str(tmp_path / "fullchain.pem"))
            with httpx2.Client(verify=context, timeout=30, follow_redirects=False) as client:
                for _ in range(200):
                    try:
                        moved = client.get(f"http://127.0.0.1:{plain}/tasks/birds")
                        break
                    except httpx2.TransportError:
                        assert nginx.poll() is None, nginx.stderr.read()
                        time.sleep(0.05)
                assert moved.status_code == 308 and moved.headers["location"].startswith("https://")
                base = f"https://127.0.0.1:{tls}"
                entered = client.get(f"{base}/tasks/birds?token=s3cret")
                assert entered.status_code == 303 and "secure" in entered.headers["set-cookie"].lower()
                assert entered.headers["strict-transport-security"].startswith("max-age")
                page = client.get(f"{base}/tasks/birds").text
                assert "Task birds" in page
                with client.stream("GET", f"{base}/events") as events:
                    lines = events.iter_lines()
                    assert next(lines) == "retry: 2000"
                    service.note("round")
                    assert [next(lines) for _ in range(4)][2] == "event: change"
        finally:
            nginx.terminate()
            nginx.wait(10)
