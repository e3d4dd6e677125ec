"""`edgestill bench step` as its users call it, on engines that need no export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from edgestill.benchmarks import cli, machine
from edgestill.benchmarks.plot import plot_results
from edgestill.benchmarks.report import format_table
from edgestill.runtime.errors import UsageError
from edgestill.simulation.bundles import (
    BundleRequest,
    ExportFailed,
    code_digest,
    prepare_bundle,
    read_complaint,
    run_export,
)
from tests.support.handmade_bundle import write_handmade_bundle

QUICK, SLOW, ABSENT = (f"tests.support.bench_fakes:{name}" for name in ("quick", "slow", "absent"))


def bench(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["bench", "step", *words])
    return arguments.run(arguments)


def line(engine: str, student: str = "cnn3", **figures: float | None) -> dict[str, object]:
    return {
        "engine": engine, "student": student, "batch": 32, "threads": 1, "p50_ms": 50.0, "p90_ms": 60.0,
        "p99_ms": 70.0, "ratio_to_eager": 1.0, "peak_rss_bytes": 3.6e8, "rss_ratio_to_eager": 1.0,
        "cold_start_s": 3.0, "fraction_of_peak": 0.4, **figures,
    }  # fmt: skip


LINES = [
    line("torch-eager"),
    line("torch-eager-channels-last", ratio_to_eager=0.77, p50_ms=38.5),
    line("onnxruntime", ratio_to_eager=0.98, p50_ms=49.0, peak_rss_bytes=1.5e8, rss_ratio_to_eager=0.42),
    {"engine": "executorch", "student": "cnn3", "batch": 32, "threads": 1, "error": "not installed",
     "hint": "pip install executorch"},
    line("torch-eager", "resnet8", p50_ms=90.0),
    line("onnxruntime", "resnet8", ratio_to_eager=1.2, peak_rss_bytes=None, rss_ratio_to_eager=None),
]  # fmt: skip


@pytest.mark.parametrize("words", [
    ["--engines", "onnxrutnime"], ["--engines", ""], ["--threads", "0"], ["--steps", "many"],
    ["--objective", "mse"], ["--batches", "32,-1"],
], ids=" ".join)  # fmt: skip
def test_wrong_words_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(*words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_an_unknown_engine_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("--engines", "onnx")
    assert "onnxruntime-training" in capsys.readouterr().err


def test_plot_to_a_folder_that_is_not_there_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder that exists"):
        bench("--plot", str(tmp_path / "missing" / "step.png"))


def test_engines_are_measured_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_handmade_bundle(tmp_path / "bundle")
    counts = ["--steps", "6", "--rounds", "3", "--warmup", "2", "--cold-starts", "1"]
    words = ["--bundle", str(bundle), "--engines", f"onnxruntime,{QUICK},{ABSENT}", *counts, "--json"]
    words += ["--output", str(tmp_path / "results")]
    assert bench(*words) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    by_engine = {line["engine"]: line for line in lines}
    assert list(by_engine) == ["torch-eager", "torch-eager-channels-last", "onnxruntime", QUICK, ABSENT]
    # the handmade student is no PyTorch module, so there is no eager step to compare with
    assert "error" in by_engine["torch-eager"] and "absent_engine" in by_engine[ABSENT]["error"]
    measured = by_engine["onnxruntime"]
    assert measured["steps"] == 6 and measured["threads"] == 1 and measured["batch"] == 8
    assert 0 < measured["p50_ms"] <= measured["p90_ms"] <= measured["p99_ms"]
    assert 20e6 < measured["peak_rss_bytes"] < 300e6 and 0 < measured["cold_start_s"] < 60
    assert measured["ratio_to_eager"] is None and measured["rss_ratio_to_eager"] is None
    assert {"machine", "commit", "versions", "date", "seed", "flops_per_step"} <= set(measured)
    (kept,) = (tmp_path / "results").glob("step-*.jsonl")
    assert [json.loads(text) for text in kept.read_text().splitlines()] == lines


def test_nothing_measured_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_handmade_bundle(tmp_path / "bundle")
    assert bench("--bundle", str(bundle), "--engines", ABSENT, "--cold-starts", "0") == 1
    assert "not measured" in capsys.readouterr().out


def test_table_has_every_engine_and_says_why_one_is_missing() -> None:
    table = format_table(LINES)
    assert (
        table.count("cnn3, batch 32, 1 thread\n") == 1 and table.count("resnet8, batch 32, 1 thread\n") == 1
    )
    row = next(text for text in table.splitlines() if text.startswith("onnxruntime"))
    assert row.split() == ["onnxruntime", "49.0", "60.0", "70.0", "0.98", "150", "42", "%", "3.00", "40", "%"]
    assert "executorch: not measured: not installed" in table and "hint: pip install executorch" in table
    assert len({len(text) for text in table.splitlines() if text.startswith(("torch", "engine"))}) == 2


def test_table_warns_of_a_busy_machine() -> None:
    assert "don't trust" in format_table([line("torch-eager", busy_share=0.4)])
    assert "don't trust" not in format_table([line("torch-eager", busy_share=0.01)])


def test_plot_is_drawn_with_and_without_eager(tmp_path: Path) -> None:
    from PIL import Image

    plot_results(LINES, tmp_path / "two.png")
    plot_results([line("onnxruntime", ratio_to_eager=None, rss_ratio_to_eager=None)], tmp_path / "one.png")
    two, one = (Image.open(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.height > one.height > 100 and two.width == one.width
    with pytest.raises(ValueError, match="nothing was measured"):
        plot_results([LINES[3]], tmp_path / "none.png")


def test_machine_record_agrees_with_psutil() -> None:
    import psutil

    record = machine.machine_record()
    assert record["memory_bytes"] == psutil.virtual_memory().total
    assert record["cores"] == len(psutil.Process().cpu_affinity())
    assert record["cpu"]


def test_results_file_is_named_after_machine_and_date() -> None:
    record = {"cpu": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "architecture": "x86_64", "cores": 2}
    name = machine.results_file_name(record, "2026-11-22T10:00:00+00:00")
    assert name == "step-intel-xeon-gold-6338-x86-64-2-core-2026-11-22.jsonl"


def test_commit_record_of_a_folder_outside_any_checkout_is_empty(tmp_path: Path) -> None:
    assert machine.commit_record(tmp_path) == {"hash": None, "dirty": None}


def test_code_digest_changes_with_the_exporter(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text("a = 1\n")
    before = code_digest([tmp_path])
    (tmp_path / "step.py").write_text("a = 2\n")
    assert code_digest([tmp_path]) != before


class FakeExporter:
    """Stands for `edgestill export`: writes a manifest, refuses some engines."""

    def __init__(self, refused: set[str]) -> None:
        self.refused = refused
        self.calls: list[str] = []

    def __call__(self, words: list[str]) -> None:
        engines = words[words.index("--engines") + 1]
        self.calls.append(engines)
        if self.refused & set(engines.split(",")):
            raise ExportFailed(f"cannot lower for {engines}")
        folder = Path(words[words.index("--output") + 1])
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"engines": engines}))


def test_bundles_are_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = FakeExporter(set())
    monkeypatch.setattr("edgestill.simulation.bundles.run_export", exporter)
    first = prepare_bundle(BundleRequest("cnn3", 32), ["onnxruntime"], tmp_path, lambda text: None)
    again = prepare_bundle(BundleRequest("cnn3", 32), ["onnxruntime"], tmp_path, lambda text: None)
    other = prepare_bundle(BundleRequest("cnn3", 64), ["onnxruntime"], tmp_path, lambda text: None)
    assert first == again and other != first and len(exporter.calls) == 2
    assert not list(tmp_path.glob("*.part"))


def test_a_student_of_ones_own_is_exported_again_when_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgestill.simulation.bundles.run_export", FakeExporter(set()))
    monkeypatch.chdir(tmp_path)
    found = []
    Path("nets").mkdir()
    for text in ("a = 1", "a = 1", "a = 2"):
        Path("nets/mine.py").write_text(text)
        request = BundleRequest("nets/mine.py:net", 32)
        found.append(prepare_bundle(request, ["onnxruntime"], tmp_path / "cache", lambda line: None)[0])
    assert all(folder.parent == tmp_path / "cache" for folder in found)
    assert found[0] == found[1] != found[2]


def test_an_engine_that_cannot_be_exported_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgestill.simulation.bundles.run_export", FakeExporter({"executorch"}))
    request, engines = BundleRequest("cnn3", 32), ["onnxruntime", "executorch"]
    folder, failed = prepare_bundle(request, engines, tmp_path, lambda text: None)
    assert json.loads((folder / "manifest.json").read_text()) == {"engines": "onnxruntime"}
    assert list(failed) == ["executorch"] and "cannot lower" in failed["executorch"].message
    with pytest.raises(ExportFailed):
        prepare_bundle(request, ["executorch"], tmp_path, lambda text: None)


def test_what_the_exporter_refuses_is_passed_on_with_its_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cnn99") as refused:
        run_export(BundleRequest("cnn99", 32).words(["onnxruntime"], tmp_path / "bundle"))
    assert refused.value.hint and "cnn3" in refused.value.hint


def test_a_traceback_is_cut_to_its_last_lines() -> None:
    assert read_complaint("Traceback\n" * 20 + "ValueError: 3")[0].splitlines()[-1] == "ValueError: 3"
    assert read_complaint("edgestill: error: no room\nhint: remove files\n") == ("no room", "remove files")
