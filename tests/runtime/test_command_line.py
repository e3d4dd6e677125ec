"""What all commands have in common: help, output in a pipe, hints of what to install, the doctor."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgestill.runtime import cli
from edgestill.runtime.commands import doctor
from edgestill.runtime.device.client import HttpCoordinator
from edgestill.runtime.engines import onnxruntime_training
from edgestill.runtime.errors import EdgestillError, EngineError
from tests.support.handmade_bundle import write_handmade_bundle
from tests.test_docs import PARSERS

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("command", [name for name in PARSERS if name])
def test_every_option_has_a_help_text_that_shows_its_default(command: str) -> None:
    parser = PARSERS[command]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        name = (*action.option_strings, action.dest)[0]
        assert action.help, f"{name} has no help text"
        if action.option_strings and action.default not in (None, False, True, "", (), []):
            default = action.default
            said = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
            assert said in parser._get_formatter()._expand_help(action), f"{name}: default {said}"


@pytest.mark.parametrize(
    "command", [name for name, parser in PARSERS.items() if name and not parser._subparsers]
)
def test_every_command_writes_json_when_asked_to(command: str) -> None:
    (action,) = (one for one in PARSERS[command]._actions if "--json" in one.option_strings)
    assert action.default is False


def test_data_are_json_only_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_handmade_bundle(tmp_path / "b")
    for command in (["inspect", str(tmp_path / "b")], ["doctor"]):
        assert cli.main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
        assert cli.main(command) == 0
        with pytest.raises(json.JSONDecodeError):
            json.loads(capsys.readouterr().out)


def test_inspect_says_what_training_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state before and after a step; a bundle that is made by hand plans no memory of its own."""
    write_handmade_bundle(tmp_path / "b")
    state = load_file(tmp_path / "b" / "state.safetensors")
    assert cli.main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["training_memory_bytes"]
    assert needed == 2 * sum(array.nbytes for array in state.values())


def test_inspect_says_what_no_delegate_runs_and_how_near_the_engine_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_handmade_bundle(tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    (engine,) = manifest["graphs"]
    delegated = {"xnnpack.delegate": 2, "xnnpack.add": 9, "amax": 1, "full": 3}
    manifest["graphs"][engine]["train_step"]["operators"] = delegated
    manifest["graphs"][engine]["encode"]["operators"] = {"xnnpack.delegate": 1}
    manifest["parity"] = {engine: {"ok": True, "steps": 20, "multiple": 0.43, "worst": "encode.logits"}}
    path.write_text(json.dumps(manifest))
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "not delegated: full 3, amax 1\n" in text and "not delegated: nothing" in text
    assert "20 steps (at most 0.43 times eager float32's error, encode.logits)" in text
    manifest["graphs"][engine]["train_step"]["operators"] = {"Add": 9}
    manifest["parity"] = {engine: {"ok": True, "steps": 20, "loss_max_abs": 1e-6}}
    path.write_text(json.dumps(manifest))
    assert cli.main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][engine]["train_step"]["not_delegated"] is None
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    assert "verify it again" in capsys.readouterr().out


def test_hints_name_extras_that_there_are() -> None:
    sources = [
        path
        for part in ("edge_runtime", "export", "coordinator", "simulation", "benchmarks")
        for path in (ROOT / part).rglob("*.py")
    ]
    named = {name for path in sources for name in re.findall(r"edgestill\[([a-z0-9]+)\]", path.read_text())}
    assert named >= {"device", "images", "plots", "s3"} and named <= EXTRAS.keys()
    assert {extra for _, _, extra in cli.COMMANDS.values()} <= EXTRAS.keys()
    assert {extra for _, extra in doctor.OPTIONAL_PACKAGES.values()} - {None} <= EXTRAS.keys()


@pytest.mark.parametrize(
    ("package", "likely", "extra"),
    [
        ("sqlalchemy.engine", "export", "coordinator"),
        ("prometheus_client", "export", "coordinator"),
        ("torch", "coordinator", "export"),
        ("onnxruntime", "export", "export"),
        ("backports.zstd", "coordinator", "coordinator"),
        ("unheard_of", "device", "device"),
    ],
)
def test_the_extra_is_the_one_that_brings_the_package(package: str, likely: str, extra: str) -> None:
    assert cli._extra_with(package, likely) == extra


@pytest.mark.contract
def test_a_simulation_without_the_coordinator_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "from edgestill.runtime.cli import main\n"
        "raise SystemExit(main(['simulate', '--devices', '2', '--rounds', '1', '--students', 'cnn3']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "pip install 'edgestill[coordinator]'" in done.stderr and "edgestill[export]" not in done.stderr


def test_a_client_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "httpx2.py").write_text("raise ImportError('libssl.so.3 cannot be opened')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "httpx2", raising=False)
    with pytest.raises(EdgestillError, match=r"libssl\.so\.3 cannot be opened") as caught:
        HttpCoordinator("http://localhost")
    assert caught.value.hint == "pip install 'edgestill[device]'"


def test_the_doctor_knows_what_a_device_and_a_coordinator_need() -> None:
    wanted = {name for extra in ("device", "discovery", "images", "plots") for name in EXTRAS[extra]}
    wanted |= {"fastapi", "sqlalchemy", *EXTRAS["s3"]}
    assert {re.split(r"[>=]", name)[0] for name in wanted} <= doctor.OPTIONAL_PACKAGES.keys()
    report = doctor.examine()
    report["packages"] = dict.fromkeys(doctor.OPTIONAL_PACKAGES)
    said = doctor.describe(report)
    assert "httpx2                 not installed" in said and "pip install 'edgestill[device]'" in said
    assert "make setup" not in said + str([vars(module) for module in (onnxruntime_training,)])


def test_a_place_that_was_looked_at_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    monkeypatch.delenv(onnxruntime_training.INTERPRETER_VARIABLE, raising=False)
    with pytest.raises(EngineError) as caught:
        onnxruntime_training.find_interpreter()
    assert caught.value.message.count(str(tmp_path)) == 1
