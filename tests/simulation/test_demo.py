"""The demo's commands, its board of events and its page; the whole of it, small, in the long tier."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.cli import main
from edgestill.simulation import demo, demo_bundles, demo_commands
from edgestill.simulation.demo import (
    ENGINE,
    STUDENTS,
    DemoSettings,
    claim,
    join_words,
    lay_bundles,
    next_commands,
    start_coordinator,
    task_words,
)
from edgestill.simulation.demo_board import DEVICES, Seen, note
from edgestill.simulation.demo_commands import Commands, DemoFailed
from edgestill.simulation.demo_page import _STYLE, gains, page_html, summary_table, write_page
from edgestill.simulation.demo_pictures import spread
from edgestill.simulation.demo_results import DeviceResult, Results, RoundResult
from edgestill.simulation.federation import describe_task
from edgestill.simulation.pool import ONE_THREAD
from edgestill.simulation.seeds import settings_of
from tests.support.demo_bundles import exported

# Stands for `edgestill`: says its words on stderr, more than a pipe holds, and answers as the real one does.
FAKE = """
import json, sys, time
words = sys.argv[1:]
print("said on stderr " * 10000, file=sys.stderr)
if words[0] == "enrol":
    print(json.dumps({"codes": words}))
elif words[0] == "serve":
    print(json.dumps({"url": "http://127.0.0.1:1"}), flush=True)
    time.sleep(60)
else:
    print("edgestill: error: no such student", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def commands(screen: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    script = tmp_path / "fake edgestill.py"
    script.write_text(FAKE)
    monkeypatch.setattr(demo_commands, "edgestill_program", lambda: [sys.executable, str(script)])
    return Commands(screen)


def test_a_command_is_shown_as_one_would_type_it(commands: Commands, screen: io.StringIO) -> None:
    assert json.loads(commands.run("enrol", "--count", 4))["codes"] == ["enrol", "--count", "4"]
    assert "fake edgestill.py' enrol --count 4" in screen.getvalue(), "a path with a space must be quoted"


def test_a_failing_command_ends_the_demo_with_what_it_said(commands: Commands, screen: io.StringIO) -> None:
    with pytest.raises(DemoFailed, match="exit code 2"):
        commands.run("export", "--student", "cnn99")
    assert "no such student" in screen.getvalue()


def test_of_commands_side_by_side_a_failing_one_is_noticed(commands: Commands, screen: io.StringIO) -> None:
    commands.run_beside([["enrol", str(number)] for number in range(3)])
    with pytest.raises(DemoFailed, match="export"):
        commands.run_beside([["enrol"], ["export"]])
    assert "no such student" in screen.getvalue()


def test_the_coordinator_is_up_when_it_says_where(commands: Commands, tmp_path: Path) -> None:
    server, url = start_coordinator(commands, tmp_path, 0)
    assert url == "http://127.0.0.1:1" and server.poll() is None
    server.stop()
    assert server.poll() is not None


def test_a_coordinator_that_ends_at_once_fails_the_demo(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_program", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DemoFailed, match="exit code 3"):
        start_coordinator(commands, tmp_path, 0)


def test_the_commands_are_ones_that_edgestill_takes() -> None:
    import argparse

    from edgestill.coordinator.commands import task
    from edgestill.runtime.commands import join

    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    task.add_parser(subparsers)
    join.add_parser(subparsers)
    settings = DemoSettings()
    words = list(map(str, task_words(settings, Path("data"))))
    parsed = parser.parse_args(["task", "create", *words])
    assert len(parsed.bundle) == len(set(STUDENTS)) == 3
    for number, device in enumerate(DEVICES):
        words = list(map(str, join_words(settings, number)))
        parsed = parser.parse_args(["join", "http://127.0.0.1:1", "--code", "X", *words])
        assert parsed.share == f"{number + 1}/4" and parsed.engine == ENGINE
        assert parsed.memory == device.memory_mb and parsed.seed == settings.seed


@pytest.mark.contract
def test_the_task_is_that_of_the_recorded_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: io.StringIO
) -> None:
    """What is typed makes the task that `make demo-seeds` simulates, but for its name and the time that rounds have."""
    import argparse

    from edgestill.coordinator.commands import task
    from edgestill.coordinator.store.blobs import FileBlobs
    from edgestill.coordinator.task.creation import make_task

    demo_bundles_into(tmp_path, monkeypatch, screen)
    parser = argparse.ArgumentParser()
    task.add_parser(parser.add_subparsers())
    settings = DemoSettings(output=tmp_path, seed=3)
    words = list(map(str, task_words(settings, tmp_path / "data")))
    typed = task.describe(parser.parse_args(["task", "create", *words]))
    bundles = [tmp_path / student for student in STUDENTS]
    simulated = describe_task(settings_of(3, labelled=True), bundles, bundles[-1])
    blobs = FileBlobs(tmp_path / "blobs")
    mine, theirs = (make_task(one, blobs.put_file, tell=lambda _: None).as_json() for one in (typed, simulated))
    for name in ("name", "deadline_s"):
        assert mine.pop(name) != theirs.pop(name)
    assert mine == theirs and mine["common_head"] and mine["transfer"]["labels"]

def demo_bundles_into(folder: Path, monkeypatch: pytest.MonkeyPatch, screen: io.StringIO) -> None:
    """Lays the bundles that a wheel carries into a folder."""
    monkeypatch.setattr(demo_bundles, "FOLDER", exported())
    lay_bundles(Commands(screen), DemoSettings(output=folder))


@pytest.mark.contract
def test_what_a_wheel_carries_serves_every_device_and_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: io.StringIO
) -> None:
    bundles = exported()
    assert sum(path.stat().st_size for path in bundles.iterdir()) < 5_000_000
    demo_bundles_into(tmp_path, monkeypatch, screen)
    assert "edgestill export" not in screen.getvalue()
    needed = {}
    for student in STUDENTS:
        with Bundle.open(tmp_path / student) as bundle:
            assert bundle.engines == ("native",)
            needed[student] = bundle.training_memory_bytes / 1e6
    got = [max((mb, name) for name, mb in needed.items() if mb <= (one.memory_mb or 1e9))[1] for one in DEVICES]
    assert got == ["cnn3", "cnn4", "cnn5", "cnn3"]


def test_a_folder_that_no_demo_made_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `--output .` where the sources of the coordinator lie."""
    (tmp_path / "coordinator").mkdir()
    (tmp_path / "coordinator/app.py").write_text("mine")
    (tmp_path / "cnn3").write_text("mine, too")
    monkeypatch.chdir(tmp_path)
    for output, hint in ((".", "--output demo"), ("cnn3", "new or empty")):
        assert main(["demo", "--output", output]) == 2
        said = capsys.readouterr().err
        assert "no demo made it" in said and hint in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["app.py", "cnn3", "coordinator"]
    for _ in range(2):  # the second time it holds what the first has written
        (claim(Path("demo")) / "coordinator").mkdir(exist_ok=True)
    (tmp_path / "empty").mkdir()
    claim(Path("empty"))


def test_without_bundles_and_pytorch_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: io.StringIO
) -> None:
    monkeypatch.setattr(demo_bundles, "FOLDER", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DemoFailed, match="PyTorch is not installed") as caught:
        lay_bundles(Commands(screen), DemoSettings(output=tmp_path))
    assert "edgestill[export]" in caught.value.hint


def test_without_bundles_it_exports(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, screen: io.StringIO
) -> None:
    monkeypatch.setattr(demo_bundles, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(demo, "_is_installed", lambda package: True)
    with pytest.raises(DemoFailed, match="export"):  # what stands for edgestill cannot
        lay_bundles(commands, DemoSettings(output=tmp_path))
    assert screen.getvalue().count(" export --student cnn") >= 1


def test_the_next_commands_can_be_typed(tmp_path: Path) -> None:
    from tests.test_docs import PARSERS

    for words, what in next_commands(DemoSettings(output=tmp_path)):
        PARSERS[""].parse_args([str(word) for word in words])
        assert len(what) > 20


SCORES = {"t_priv": 0.2, "t_uni": 0.1, "loss": 2.3}


def settled(number: int, accuracy: float) -> dict:
    report = {"before": SCORES, "after": {**SCORES, "t_priv": accuracy}, "bytes_up": 64000}
    return {"event": "settled", "round": f"demo.{number}", "report": report}


def test_events_become_news_and_reports() -> None:
    seen = Seen()
    for event in (
        {"event": "assigned", "device": "d-x", "student": "cnn3", "engine": "executorch", "samples": 600},
        {"event": "round", "round": "demo.1", "number": 1, "seconds_left": 10},
        {"event": "step", "step": 3, "loss": 1.0},
        settled(1, 0.5),
        {"event": "given up", "round": "demo.2", "reason": "its deadline passed"},
        {"event": "finished"},
        {"summary": {}},
    ):
        note(seen, event)
    assert (seen.device, seen.student, list(seen.settled)) == ("d-x", "cnn3", [1])
    assert seen.news[1] == "round 1: T_priv 20.0% to 50.0%, T_uni 10.0% to 10.0%, 64 kB up"
    assert "its deadline passed" in seen.news[2] and seen.doing == "finished"


def results(recorded: bool | None = None) -> Results:
    def device(name: str, after: float, alone: float) -> DeviceResult:
        return DeviceResult(
            name=name, student="cnn3", engine="onnxruntime", samples=600, class_counts=(1, 2, 3), before=SCORES,
            after=[SCORES, {**SCORES, "t_priv": after, "t_uni": 0.3}],
            alone={**SCORES, "t_priv": alone, "t_uni": 0.25},
            alone_steps={**SCORES, "t_priv": alone + 0.02, "t_uni": 0.26},
            unlabelled=None if recorded is None else {"t_priv": 0.45, "t_uni": 0.28},
            step_ms=12.34, bytes_up=[60000, 64000], bytes_down=[900000, 128000], peak_rss_bytes=10**8,
        )  # fmt: skip

    devices = (device("phone", 0.6, 0.5), device("<watch>", 0.5, 0.6))
    rounds = (RoundResult(1, "completed", 0.35, 0.3, False), RoundResult(2, "completed", 0.33, 0.31, True))
    rows = () if recorded is None else (("seed", "labels − epochs"), ("0", "+3.0 / +9.0"), ("mean", "+3.0 / +9.0"))
    return Results(0.5, 2, "cnn5", 600, 400, devices, rounds, 7, recorded, "abcdef1", rows)


def test_the_tables_have_devices_means_and_gains_over_both_ways_alone() -> None:
    table = summary_table(results())
    rows = [line.split() for line in table.splitlines()]
    assert ["phone", "cnn3", "50.0%", "52.0%", "–", "60.0%", "25.0%", "26.0%", "–", "30.0%"] in rows
    assert ["mean", "55.0%", "57.0%", "–", "55.0%", "25.0%", "26.0%", "–", "30.0%"] in rows
    assert ["phone", "cnn3", "onnxruntime", "600", "62", "128", "12.3", "100"] in rows
    assert gains(results()) == pytest.approx({"t_priv": 0.0, "t_uni": 0.05})
    assert gains(results(), steps=True) == pytest.approx({"t_priv": -0.02, "t_uni": 0.04})
    assert "alone for as many epochs: T_priv +0.0 points, T_uni +5.0 points" in table
    assert "alone for as many steps: T_priv -2.0 points, T_uni +4.0 points" in table
    assert "of round 2, the best on validation images: T_uni 33.0%" in table


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (None, "not recorded for these settings and this seed"),
        (True, "every figure of this run is the recorded one of seed 7"),
        (False, "the figures of this run are not the recorded ones of seed 7"),
    ],
)
def test_what_is_recorded_and_who_knows_which_classes_is_said(recorded: bool | None, said: str) -> None:
    shown = results(recorded)
    table, page = summary_table(shown), page_html(shown, [])
    assert said in table and said in page
    for text in (table, page):
        assert "600 transfer images" in text and "devices get the images without classes" in text
        assert "400 validation images" in text
    assert ("<h2>Ten seeds</h2>" in page) == (recorded is not None)
    assert ("45.0%" in page) == (recorded is not None)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict] = []
        self.sources: list[dict] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "source":
            self.sources.append(dict(attrs))


def test_the_page_has_the_table_and_pictures_with_words(tmp_path: Path) -> None:
    path = write_page(results(), tmp_path)
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.tags.count("table") == 2 and page.tags.count("tr") == 4 + 3 and len(page.images) == 2
    for image in page.images:
        assert len(image["alt"]) > 20 and (tmp_path / image["src"]).read_bytes().startswith(b"\x89PNG")
    for source in page.sources:
        height, width = png_size(tmp_path / source["srcset"])
        assert height > 1.5 * width, "on a phone the panels of a picture stand below each other"
        assert source["media"] in _STYLE, "pictures and table rows are stacked at the same width"
    assert len(page.sources) == 2
    text = page_html(results(), [])
    assert "&lt;watch&gt;" in text and "<watch>" not in text


def png_size(path: Path) -> tuple[int, int]:
    """Height and width of a PNG, from its header."""
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[4:]), int.from_bytes(header[:4])


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.1, 20))
def test_labels_of_curves_stand_apart_and_in_order(values: list[float], gap: float) -> None:
    values.sort()
    places = spread(values, gap)
    assert np.all(np.diff(places) >= gap - 1e-9)
    assert np.mean(places) == pytest.approx(np.mean(values))
    if len(values) == 1 or min(np.diff(values)) > gap + 1e-9:
        assert places == pytest.approx(values)


# The command where the package has the bundles in another folder, argument 1.
DEMO = """
import pathlib, sys
from edgestill.simulation import demo_bundles
demo_bundles.FOLDER = pathlib.Path(sys.argv.pop(1))
from edgestill.runtime.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.contract
@pytest.mark.parametrize("export", [False, pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
def test_the_whole_demo(tmp_path: Path, export: bool) -> None:
    """From the bundles that a wheel carries; and exported here, twice: processes race, figures are the same."""
    first = whole_demo(tmp_path / "first", export)
    if export:
        assert whole_demo(tmp_path / "second", export) == first


def whole_demo(folder: Path, export: bool) -> tuple[str, str]:
    """The accuracies that a small demo prints, and what it says below its tables."""
    words = [
        "--output",
        str(folder),
        "--rounds",
        "2" if export else "1",
        "--local-epochs",
        "1",
        "--distil-epochs",
        "1",
        "--transfer-count",
        "64",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", DEMO, str(exported()), "demo", *words, *["--export"] * export],
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "together − alone" in ran.stdout and "dashboard: http://" in ran.stderr
    assert (folder / "index.html").stat().st_size > 1000
    assert ran.stdout.count("native") == len(DEVICES)
    accuracies, _, rest = ran.stdout.partition("\n\n")
    return accuracies, rest.partition("together − alone")[2]
