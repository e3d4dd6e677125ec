"""`edgestill reproduce`: stages, files, resuming, summaries; the four experiments on one device from end to end with
runs that cost nothing, and one real run in miniature."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgestill.benchmarks.experiments import EXPERIMENTS, grid, heterogeneity, latent_size, methods, scarcity
from edgestill.benchmarks.experiments.devices import deal_device
from edgestill.benchmarks.experiments.grid import Cell, Context, Options, read_records
from edgestill.benchmarks.experiments.locks import locked
from edgestill.benchmarks.experiments.protocol import base_settings, make_run
from edgestill.benchmarks.experiments.report import Report
from edgestill.benchmarks.experiments.sources import load_data
from edgestill.benchmarks.experiments.states import keep_state
from edgestill.benchmarks.experiments.tables import Table
from edgestill.benchmarks.reproduce import COMMITTED, load_experiment, run_stages
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.wire import load
from edgestill.runtime.cli import main
from edgestill.runtime.engines.registry import open_engine
from edgestill.runtime.training.checkpoint import Checkpoint
from edgestill.runtime.training.evaluation import score
from edgestill.runtime.training.teacher import encode_all

pytestmark = pytest.mark.usefixtures("threads")
ON_ONE_DEVICE = [methods, heterogeneity, scarcity, latent_size]


@pytest.fixture
def threads(monkeypatch):
    """Workers that start at once; real ones have tests of their own."""
    monkeypatch.setattr(grid, "worker_processes", ThreadPoolExecutor)


def run_doubling(settings, context):
    if settings["x"] == 5:
        raise ValueError("five is not possible")
    return {"y": 2 * settings["x"]}


def doubling(numbers=(1, 2)):
    """An experiment of two stages: the second doubles what the first found."""
    module = types.ModuleType("doubling")
    module.NAME, module.TITLE = "doubling", "Doubling"
    module.stages = lambda options: [
        lambda records: [Cell("doubling", {"x": x, "stage": 1}) for x in numbers],
        lambda records: [Cell("doubling", {"x": r["result"]["y"], "stage": 2}) for r in records],
    ]
    module.run_cell = run_doubling
    module.estimate_minutes = lambda options, workers: 7.0

    def report(records):
        rows = [[r["settings"]["x"], r["result"]["y"]] for r in records]
        return Report([Table("Doubles", ("x", "y"), rows)], [], {"total": sum(row[1] for row in rows)})

    module.report = report
    return module


@pytest.fixture
def reproduce(monkeypatch, tmp_path, capsys):
    def call(module, *words):
        monkeypatch.setitem(sys.modules, "doubling", module)
        monkeypatch.setitem(EXPERIMENTS, "doubling", "doubling")
        given = ["--output", str(tmp_path), "--workers", "1", "--cache", str(tmp_path / "cache")]
        code = main(["reproduce", "doubling", *words, *given])
        return code, *capsys.readouterr()

    return call


def test_an_experiment_writes_records_and_tables_and_goes_on(reproduce, tmp_path):
    code, output, told = reproduce(doubling(), "--quick", "--json")
    assert code == 0 and json.loads(output) == {"total": 18}
    assert (
        "with 1 worker about 7 minutes" in told
        and "stage 1/2: 2 to run, 1 at once" in told
        and "stage 2/2: 2/2: x 4" in told
    )
    records = [json.loads(line) for line in (tmp_path / "doubling.jsonl").read_text().splitlines()]
    assert [record["settings"]["x"] for record in records] == [1, 2, 2, 4]
    assert {"cpu", "cores"} <= records[0]["machine"].keys() and "hash" in records[0]["commit"]
    assert "| 4 | 8 |" in (tmp_path / "doubling.md").read_text()
    assert "4,8" in (tmp_path / "doubling.csv").read_text()
    before = (tmp_path / "doubling.jsonl").read_bytes()
    code, _, told = reproduce(doubling(), "--quick", "--json")
    assert code == 0 and "stage" not in told
    assert (tmp_path / "doubling.jsonl").read_bytes() == before


def test_a_failing_run_is_told_with_its_settings_and_the_others_are_kept(reproduce, tmp_path):
    code, _, told = reproduce(doubling((1, 5, 3)), "--quick")
    assert code == 1
    assert (
        "FAILED: ValueError: five is not possible" in told
        and '"x": 5' in told
        and "1 of 3 runs failed" in told
    )
    assert len((tmp_path / "doubling.jsonl").read_text().splitlines()) == 2


def test_a_summary_needs_no_data(reproduce):
    assert reproduce(doubling(), "--summary", "--json")[0] == 1
    reproduce(doubling(), "--quick")
    code, output, _ = reproduce(doubling(), "--summary", "--json")
    assert code == 0 and json.loads(output) == {"total": 18}


def test_a_summary_of_a_part_says_so(reproduce, tmp_path):
    reproduce(doubling(), "--quick")
    for partial in (lambda records: Report([]), lambda records: max([])):
        part = doubling()
        part.report = partial
        code, output, told = reproduce(part, "--summary", "--json")
        assert code == 1 and output == "" and "only a part of the runs of doubling" in told


@pytest.mark.parametrize("stage", ["teacher", "tuning"])
def test_what_comes_before_the_final_runs_has_no_summary(monkeypatch, tmp_path, capsys, stage):
    monkeypatch.setattr(methods, "run_cell", made_up)
    run_stages(methods, Options(), Context("", "", tmp_path), tmp_path, workers=1)
    lines = (tmp_path / "methods.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["settings"]["stage"] in ("teacher", "device", stage)]
    (tmp_path / "methods.jsonl").write_text("".join(kept))
    assert main(["reproduce", "methods", "--summary", "--json", "--output", str(tmp_path)]) == 1
    assert "only a part of the runs of methods" in capsys.readouterr().err


def test_a_quick_summary_is_of_the_quick_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("edgestill.benchmarks.reproduce._default_output", lambda quick: tmp_path)
    assert main(["reproduce", "methods", "--quick", "--summary"]) == 1
    assert f"{tmp_path / 'methods.jsonl'} holds no records" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data", "transfer"])
def test_records_of_other_images_are_refused_before_anything_runs(reproduce, tmp_path, name):
    path = tmp_path / "doubling.jsonl"
    record = {"experiment": "doubling", "key": "a", "settings": {name: "sha256:0"}}
    path.write_text(json.dumps(record) + "\n")
    code, _, told = reproduce(doubling(), "--quick")
    assert code == 2 and f"other images than those of --{name}" in told and "--output" in told
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5"])
def test_a_number_of_seeds_that_is_none_is_named(given, capsys):
    assert main(["reproduce", "methods", "--seeds", given]) == 2
    assert f"'{given}' is not a number of at least 1" in capsys.readouterr().err


def test_two_processes_do_not_write_the_same_records(reproduce, tmp_path):
    with locked(tmp_path / "doubling.jsonl"):
        code, _, told = reproduce(doubling(), "--quick")
    assert code == 1 and "another process works on" in told
    assert reproduce(doubling(), "--quick")[0] == 0


def test_an_experiment_that_keeps_no_states_says_so(reproduce, tmp_path):
    code, _, told = reproduce(doubling(), "--quick", "--keep-states", str(tmp_path / "states"))
    assert code == 2 and "doubling keeps no states" in told


def test_full_runs_ask_for_data(reproduce):
    code, _, told = reproduce(doubling())
    assert code == 2 and "needs CIFAR-10" in told and "--data DIR" in told


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_offers_what_the_command_needs(name):
    experiment = load_experiment(name)
    assert experiment.NAME == name and experiment.TITLE
    for options in (Options(quick=True), Options(), Options(seeds=7)):
        alone, shared = (experiment.estimate_minutes(options, workers) for workers in (1, 2))
        assert alone / 2 <= shared <= alone < 1000 and (options.quick or shared < alone)
        first = experiment.stages(options)[0]([])
        assert first and all(cell.experiment == name for cell in first)
        assert len({cell.key for cell in first}) == len(first)


def made_up(settings, context):
    """A result that depends on nothing but the settings."""
    drawn = random.Random(hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest())
    counts = [drawn.randrange(1, 50) for _ in range(10)]
    return {"priv": drawn.random(), "uni": drawn.random(), "class_counts": counts}


@pytest.mark.parametrize("options", [Options(quick=True), Options(data="sha256:0"), Options(seeds=2)])
@pytest.mark.parametrize("experiment", ON_ONE_DEVICE, ids=lambda module: module.NAME)
def test_stages_and_reports_fit_together(experiment, options, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "run_cell", made_up)
    records = run_stages(experiment, options, Context("", "", tmp_path), tmp_path, workers=1)
    report = experiment.report(records)
    assert all(table.rows for table in report.tables)
    json.dumps(report.summary, allow_nan=False)
    students = [r["settings"] for r in records if r["settings"].get("stage") != "teacher"]
    for settings in students:
        assert settings["score_on"] == (
            "validation" if settings.get("stage") in ("device", "tuning") else "test"
        )
    # a set of figures per sweep: drawing them must not fail
    pytest.importorskip("matplotlib")
    from edgestill.benchmarks.experiments.figures import save_figure

    if options.quick:
        for figure in report.figures:
            assert all(path.stat().st_size for path in save_figure(figure, tmp_path / experiment.NAME))


def own_of(settings):
    return json.dumps([settings.get(name) for name in ("export_options", "hyperparameters", "alpha_end")])


def test_other_experiments_take_what_the_committed_records_chose():
    records = read_records(COMMITTED / "methods.jsonl", "methods")
    samples = methods.choose_device(records)["samples"]
    for method in methods.CHOSEN:
        assert methods.chosen(method, samples) == methods.choose_settings(records, method)


def test_methods_chooses_on_validation_with_seeds_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "run_cell", made_up)
    records = run_stages(methods, Options(), Context("", "", tmp_path), tmp_path, workers=1)
    by_stage = {}
    for record in records[1:]:
        by_stage.setdefault(record["settings"]["stage"], []).append(record)
    seeds = {stage: {r["settings"]["seed"] for r in of_stage} for stage, of_stage in by_stage.items()}
    assert len(seeds["final"]) >= 5
    assert not seeds["final"] & seeds["tuning"] and not seeds["final"] & seeds["device"]
    # independently: the candidate with the best validation mean is what the final runs have
    for method in methods.METHODS[1:]:
        scores = {}
        for record in by_stage["tuning"]:
            settings, result = record["settings"], record["result"]
            if settings["method"] == method:
                scores.setdefault(own_of(settings), []).append(result["priv"] + result["uni"])
        assert len(scores) == 5  # as many for every method
        best = max(scores, key=lambda own: sum(scores[own]))
        final = {own_of(r["settings"]) for r in by_stage["final"] if r["settings"]["method"] == method}
        assert final == {best}
    summary = methods.report(records).summary
    assert set(summary) == {"ce", "kd", "crd", "lpd", "lkd", "best"}
    lkd = [r["result"]["uni"] for r in by_stage["final"] if r["settings"]["method"] == "lkd"]
    assert summary["lkd"]["t_uni"]["mean"] == pytest.approx(np.mean(lkd))
    assert summary["lkd"]["t_uni"]["seeds"] == len(lkd) and summary["lkd"]["t_uni"]["ci95"] > 0


def test_a_kept_state_is_made_again_where_it_is_missing(tmp_path):
    final = Cell("methods", {"stage": "final", "method": "lkd", "seed": 3})
    assert methods.redo(final, tmp_path)
    checkpoint = Checkpoint({"a": np.zeros(2, np.float32)}, 1, 1, {"seed": 3})
    bundle = tmp_path / "exported"
    bundle.mkdir()
    (bundle / "manifest.json").write_text('{"state": {"file": "s"}, "files": {"s": {"sha256": "1"}}}')
    keep_state(tmp_path, methods.kept_as(final.settings), bundle, checkpoint)
    assert not methods.redo(final, tmp_path)
    other = Cell("methods", {**final.settings, "samples": 7})  # the file is there, of another run
    assert methods.redo(other, tmp_path)
    assert (tmp_path / "lkd-bundle" / "manifest.json").is_file()
    assert not methods.redo(Cell("methods", {"stage": "tuning", "method": "lkd", "seed": 4}), tmp_path)


@pytest.mark.contract
def test_a_real_run_in_miniature(tmp_path):
    """Export, teacher, student and states through the same code as a full run; its score again by hand."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    base = base_settings(Options(quick=True))
    teacher = {**base["teacher"], "widths": [4, 4, 4, 4], "latent_size": 8, "epochs": 1}
    settings = {
        **base,
        "widths": [4, 4, 4],
        "latent_size": 8,
        "epochs": 1,
        "samples": 128,
        "gamma": 1.0,
        "seed": 0,
        "teacher": teacher,
        "division": {"teacher": 200, "validation": 200},
        "stage": "final",
        "method": "lkd",
        "objective": "lkd",
        "hyperparameters": {"alpha": 0.9},
        "score_on": "test",
    }
    context = Context("cifar10-mini", "cifar100-transfer-mini", tmp_path / "cache", tmp_path / "states")
    result = methods.run_cell(settings, context)
    assert result["steps"] == 4 and sum(result["class_counts"]) == 128
    assert result == methods.run_cell(settings, context)  # from the same cache: the very same numbers
    found = make_run({**settings, "stage": "teacher"}, context)
    assert 0 < found["uni"] < 1

    import torch

    from edgestill.export.students import StudentOptions, build_student

    student = build_student("cnn3", StudentOptions(latent_size=8, widths=(4, 4, 4)))
    arrays = load(tmp_path / "states" / "lkd-seed0.safetensors").arrays
    own = student.state_dict()
    student.load_state_dict(
        {name: torch.from_numpy(np.array(arrays[name])) if name in arrays else own[name] for name in own}
    )
    uni = deal_device(load_data("cifar10-mini"), settings).uni
    mean, std = (
        torch.tensor(values).reshape(1, 3, 1, 1)
        for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    )
    with torch.no_grad():
        logits = student.eval()((torch.from_numpy(uni.images) / 255 - mean) / std)[1].numpy()
    assert score(logits, uni.labels, 10).accuracy == pytest.approx(result["uni"], abs=0.011)
    with Bundle.open(tmp_path / "states" / "lkd-bundle") as bundle:
        engine = open_engine(bundle, "native", threads=1)
        untrained = encode_all(engine, uni.images, bundle.batch).logits
        engine.load_state(bundle.check_state(arrays))
        trained = encode_all(engine, uni.images, bundle.batch).logits
        engine.close()
    np.testing.assert_allclose(trained, logits, atol=2e-4)
    assert np.abs(untrained - logits).max() > 0.05
    assert (tmp_path / "states" / "lkd-bundle" / "manifest.json").is_file()
