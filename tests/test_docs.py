"""README and docs against the code: every option, command line, link and table that they show is real."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from edgestill.runtime.cli import COMMANDS
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS
from edgestill.runtime.training.trainer import StepRecord

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# pip's, TensorBoard's, podman's
OTHER_PROGRAMS_OPTIONS = {
    "--no-deps", "--wheel-dir", "--logdir", "--read-only", "--tmpfs", "--cap-drop", "--log-opt", "--format",
}  # fmt: skip
CALL = re.compile(r"^(?:\S*/)?edgestill (?=[a-z])")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

pytestmark = pytest.mark.unit


class _Raises(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command with its parser, subcommands as `bench step`."""
    root = _Raises(prog="edgestill", allow_abbrev=False)
    root.add_argument("--version", action="store_true")
    subparsers = root.add_subparsers(parser_class=_Raises)
    for module in dict.fromkeys(module for module, _, _ in COMMANDS.values()):
        importlib.import_module(module).add_parser(subparsers)
    found = {"": root}

    def collect(parser: argparse.ArgumentParser, path: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    found[f"{path} {name}".strip()] = child
                    collect(child, f"{path} {name}".strip())

    collect(root, "")
    return found


PARSERS = _parsers()


def _options(command: str) -> set[str]:
    strings = {option for action in PARSERS[command]._actions for option in action.option_strings}
    return {option for option in strings if option.startswith("--")} - {"--help"}


def _code_lines(text: str) -> Iterator[str]:
    for block in re.findall(r"^\s*```bash\n(.*?)^\s*```", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()


def _calls(text: str) -> Iterator[str]:
    """The command lines of `edgestill` in a page's code blocks."""
    for line in _code_lines(text):
        if CALL.match(line.strip()):
            yield line.strip()


def _section(page: str, heading: str) -> str:
    """What stands below a heading up to the next one of any level."""
    text = (ROOT / page).read_text(encoding="utf-8")
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert match, f"{page} has no section {heading!r}"
    return match[1]


def _rows(text: str) -> list[list[str]]:
    """The cells of all table rows, without headings and rules."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|- ")]
    skipped = {i for rule in rules for i in (rule - 1, rule)}
    rows = [line for i, line in enumerate(lines) if i not in skipped]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _marked(name: str) -> list[list[str]]:
    text = (ROOT / "docs/lowering.md").read_text(encoding="utf-8")
    return _rows(text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0])


def test_the_command_lines_can_be_parsed() -> None:
    calls = [call for page in PAGES for call in _calls(page.read_text(encoding="utf-8"))]
    assert len(calls) >= 15, "the pages hardly show any command"
    for call in calls:
        words = shlex.split(call, comments=True)[1:]
        try:
            PARSERS[""].parse_args(words)
        except ValueError as error:
            pytest.fail(f"{call}: {error}")


def test_every_json_option_reads_as_one_sentence() -> None:
    texts = [action.help for one in PARSERS.values() for action in one._actions if action.dest == "json"]
    assert len(texts) >= 10 and all(text.count("instead of") == 1 for text in texts), texts


@EVERY_PAGE
def test_every_option_exists(page: Path) -> None:
    known = {option for command in PARSERS for option in _options(command)} | OTHER_PROGRAMS_OPTIONS
    known |= {"--help"}
    unknown = set(OPTION.findall(page.read_text(encoding="utf-8"))) - known
    assert not unknown


@EVERY_PAGE
def test_inline_commands_exist_and_have_the_options(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`(edgestill [^`]+)`", text):
        words = code.split()[1:]
        path = " ".join(words[: 2 if words[0] in ("bench", "task") else 1])
        if path.startswith("--"):
            path = ""
        assert path in PARSERS, f"{code}: no such command"
        assert set(OPTION.findall(code.replace("='--", "='"))) <= _options(path), code


@EVERY_PAGE
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links {target}, and {file.name} has no such heading"


@pytest.mark.parametrize(
    ("command", "page", "heading"),
    [
        ("export", "docs/students.md", "Options of `edgestill export`"),
        ("verify", "docs/lowering.md", "Parity"),
        ("train", "docs/training.md", "Options of `edgestill train`"),
        ("evaluate", "docs/training.md", "`edgestill evaluate`"),
        ("predict", "docs/training.md", "`edgestill predict`"),
        ("bench step", "docs/benchmark.md", "The benchmark"),
    ],
)
def test_the_table_of_a_command_has_all_its_options_and_no_other(command, page, heading) -> None:
    first_cells = [row[0] for row in _rows(_section(page, heading))]
    assert set(OPTION.findall(" ".join(first_cells))) == _options(command)


def test_defaults_of_the_tables() -> None:
    """Where a table's default is a plain word or number, it is the parser's."""
    in_words = ("off", "none", "nothing", "all")
    checked = 0
    for command, page, heading in (
        ("export", "docs/students.md", "Options of `edgestill export`"),
        ("train", "docs/training.md", "Options of `edgestill train`"),
        ("bench step", "docs/benchmark.md", "The benchmark"),
    ):
        actions = {o: a for a in PARSERS[command]._actions for o in a.option_strings}
        for name, default, *_ in _rows(_section(page, heading)):
            options = OPTION.findall(name)
            said = default.strip("`")
            if len(options) != 1 or not re.fullmatch(r"[a-z0-9,-]+", said) or said in in_words:
                continue
            real = actions[options[0]].default
            if actions[options[0]].required:
                assert said == "required", options
            elif real is not None:  # None: the default depends on the bundle
                text = ",".join(map(str, real)) if isinstance(real, list | tuple) else str(real)
                assert said == text, options
                checked += 1
    assert checked >= 15


def test_the_table_of_hyperparameters() -> None:
    rows = _rows(_section("docs/training.md", "Hyperparameters"))
    assert [row[0].strip("`") for row in rows] == list(HYPERPARAMETERS)
    for (name, default, span, unit), row in zip(rows, HYPERPARAMETERS.values(), strict=True):
        first, *others = default.replace("`", "").split("; ")
        assert float(first) == row.default, name
        assert {kind: float(value) for kind, value in (one.split(": ") for one in others)} == dict(row.instead)
        assert (span, unit) == (row.range, row.unit), name


def test_the_readme_lists_every_command() -> None:
    first_cells = " ".join(row[0] for row in _rows(_section("README.md", "Commands")))
    listed = re.findall(r"`edgestill ([^`]+)`", first_cells)
    leaves = {name for name, parser in PARSERS.items() if name and not parser._subparsers}
    assert set(listed) == leaves


@pytest.mark.contract
def test_the_path_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own student, exported, trained and loaded back into PyTorch as it says."""
    import numpy as np
    import torch

    from edgestill.runtime.bundle.bundle import Bundle
    from edgestill.runtime.cli import main
    from edgestill.runtime.data.dataset import load_splits
    from edgestill.runtime.engines.registry import open_engine
    from edgestill.runtime.training.checkpoint import load_state

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, leaf, back = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "leaf.py").write_text(leaf)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    export, train = (
        next(shlex.split(call)[1:] for call in _calls(text) if f" {command} " in call and "leaf" in call)
        for command in ("export", "train")
    )
    assert main([*export, "--engines", "native", "--seed", "3"]) == 0
    assert main([*train[: train.index("--epochs")], "--limit", "96", "--state", "leaf.safetensors"]) == 0

    found: dict[str, object] = {}
    exec(compile(back, "README.md", "exec"), found)
    student = found["student"].eval()
    with Bundle.open("leaf-bundle") as bundle:
        images = load_splits("cifar10-mini", bundle.input, bundle.classes).test.images[: bundle.batch]
        engine = open_engine(bundle, threads=1)
        engine.load_state(load_state(Path("leaf.safetensors"), bundle))
        latents, logits = engine.encode(images)
        engine.close()
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (bundle.input.mean, bundle.input.std))
    with torch.no_grad():
        expected = student.representation(student.perception((torch.from_numpy(images) / 255 - mean) / std))
        np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits, student.output(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.contract
def test_the_readme_in_a_shell_and_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ways name the class of a picture, on pictures of two colours and several sizes."""
    from PIL import Image

    from edgestill.runtime.cli import main

    text = _section("README.md", "In a shell, or in Python")
    for name, colour in (("lime", (60, 220, 40)), ("plum", (110, 20, 90))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(16):
            picture = Image.new("RGB", (20 + 5 * number, 40), colour)
            picture.save(tmp_path / "photos" / name / f"{number}.png")
    picture.save(tmp_path / "holiday.jpg")
    monkeypatch.chdir(tmp_path)
    for call in _calls(text):
        capsys.readouterr()
        assert main(shlex.split(call)[1:]) == 0, call
    assert re.search(r"holiday\.jpg\s+plum", capsys.readouterr().out)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    name, probability = capsys.readouterr().out.split()[-2:]
    assert name == "plum" and float(probability) > 0.5


def test_the_keys_of_a_json_line() -> None:
    rows = _rows(_section("docs/training.md", "Output"))
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row[0])]
    count = len(fields(StepRecord))
    assert keys[:count] == [field.name for field in fields(StepRecord)]


def test_the_fields_of_a_parity_record() -> None:
    from edgestill.export.parity.verify import _judged

    seen = {name: [(1.0, 0.1, 0.1)] for name in ("loss", "latents", "encode.latents", "w")}
    record = _judged("onnxruntime", seen, dict.fromkeys(("onnxruntime", "", "oracle"), [1.0]), ("w",), 1.0)
    documented = [row[0].strip("`") for row in _rows(_section("docs/bundle.md", "parity"))]
    assert documented == list(record)


def test_the_tolerances_of_verify() -> None:
    from edgestill.runtime.engines.registry import ENGINES

    wanted = {name: record.tolerance for name, record in ENGINES.items()}
    rows = [row for row in _rows(_section("docs/lowering.md", "Parity")) if row[0].strip("`") in wanted]
    assert {row[0].strip("`"): float(row[1]) for row in rows} == wanted
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (asked,) = (row[1:] for row in _rows(readme) if row[0].startswith("parity asked by"))
    assert [float(cell) for cell in asked] == list(wanted.values())


IMAGE, VECTOR = (2, 4, 6, 6), (4,)
POOL = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))}
CONVOLUTION = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1}
EXAMPLES: dict[str, list[tuple[list[tuple[int, ...]], dict]]] = {
    **{name: [([(2, 3), (2, 3)], {})] for name in
       ("add", "subtract", "multiply", "divide", "maximum", "minimum", "greater", "greater_equal", "equal", "masked")},
    **{name: [([(2, 3)], {})] for name in
       ("relu", "abs", "exp", "log", "sqrt", "rsqrt", "erf", "tanh", "sigmoid", "sin", "cos", "atan", "floor",
        "to_float", "to_integer", "softmax", "log_softmax")},
    "clamp": [([(2, 3)], {"low": 0.0, "high": 6.0, "closed": True})],
    "power": [([(2, 3)], {"exponent": 1.5})],
    "where": [([(2, 3), (2, 3), (2, 3)], {})],
    "one_hot": [([(2,)], {"classes": 3})],
    "matmul": [
        ([(2, 3), (3, 2)], {}),
        ([(2, 3), (2, 3)], {"transpose_b": True}),
        ([(5, 2, 3), (5, 2, 3)], {"transpose_b": True}),
    ],
    **{name: [([(2, 3)], {"axes": (1,)})] for name in ("reduce_sum", "reduce_mean", "reduce_max")},
    "argmax": [([(2, 3)], {"axis": 1})],
    "standardize": [([(2, 3)], {"eps": 1e-5})],
    "reshape": [([(2, 3)], {"shape": (6,)})],
    "transpose": [([(2, 3)], {"permutation": (1, 0)})],
    "slice": [([(2, 3)], {"axis": 1, "start": 0, "stop": 2, "step": 1})],
    "concat": [([(2, 3), (2, 3)], {"axis": 0})],
    "pad": [([(2, 3)], {"begins": (0, 1), "ends": (0, 1), "value": 0.0})],
    "expand": [([(2, 1)], {"shape": (2, 3)})],
    "gather": [([(2, 3), (4,)], {"axis": 1})],
    "scatter_add": [([(2, 3), (3,)], {"axis": 1, "size": 5})],
    "conv2d": [([IMAGE, (4, 4, 3, 3)], CONVOLUTION)],
    "conv2d_transpose": [([IMAGE, (4, 4, 3, 3)], CONVOLUTION | {"size": (8, 8)})],
    "max_pool2d": [([IMAGE], POOL | {"dilation": (1, 1)})],
    "avg_pool2d": [([IMAGE], POOL)],
    "normalize": [([IMAGE, *[VECTOR] * 4], {"eps": 1e-5})],
    "batch_norm": [([IMAGE, *[VECTOR] * 2], {"eps": 1e-5})],
}  # fmt: skip
"""For each operator that ONNX spells shapes of inputs and attributes, in every form that it spells differently."""


def test_the_table_of_operators_is_the_closed_set() -> None:
    from edgestill.export.lowering.operators import OPERATORS
    from edgestill.export.targets.executorch_rewrites import PLAIN, WINDOWED
    from edgestill.export.targets.onnx_emitter import RULES

    rows = {row[0].strip("`"): row for row in _marked("operators")}
    assert list(rows) == list(OPERATORS), "docs/lowering.md and export/lowering/operators.py differ"
    for name, (_, onnx, xnnpack, _) in rows.items():
        assert (onnx == "rewritten") == (name not in RULES), name
        assert xnnpack == ("rewritten" if name in PLAIN or name in WINDOWED else "as it is"), name


SPELLED = [row for row in _marked("operators") if row[1] != "rewritten"]


@pytest.mark.parametrize("row", SPELLED, ids=lambda row: row[0].strip("`"))
def test_the_onnx_spelling_of_an_operator(row: list[str]) -> None:
    from edgestill.export.lowering.graph import Graph
    from edgestill.export.targets.onnx_emitter import to_onnx

    name = row[0].strip("`")
    spelled: set[str] = set()
    for shapes, attributes in EXAMPLES[name]:
        graph = Graph()
        dtypes = ["float32"] * len(shapes)
        if name in ("one_hot", "to_float"):
            dtypes[0] = {"one_hot": "int64", "to_float": "uint8"}[name]
        if name in ("gather", "scatter_add"):
            dtypes[1] = "int64"
        inputs = [
            graph.input(f"x{i}", shape, dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        for i, value in enumerate(graph.apply_many(name, *inputs, **attributes)):
            graph.output(f"y{i}", value)
        spelled |= {node.op_type for node in to_onnx(graph).graph.node}
    assert sorted(spelled) == sorted(row[1].split(", "))


def test_the_table_of_what_has_a_row() -> None:
    from edgestill.export.lowering.aten import families

    rows = {re.match(r"\[(\w+)\]", row[0])[1]: re.findall(r"`(\w+)`", row[1]) for row in _marked("aten")}
    assert rows == families(), "docs/lowering.md and export/lowering/aten differ"


def test_the_tables_of_rewrites() -> None:
    """Every table that the page names exists where it says."""
    for names, place, _ in _rows(_section("docs/lowering.md", "Rewrites")):
        (path,) = re.findall(r"\(\.\./(\S+?)\)", place)
        module = importlib.import_module("edgestill." + path.removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(module, name), f"{path} has no {name}"


def test_the_table_of_built_in_students() -> None:
    from edgestill.benchmarks.students import students_table

    text = (ROOT / "docs/students.md").read_text(encoding="utf-8")
    assert text.partition("<!-- students:begin -->\n")[2].partition("<!-- students:end -->")[0] == students_table()
