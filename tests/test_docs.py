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
from edgestill.runtime.training.trainer import StepRecord

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
OTHER_PROGRAMS_OPTIONS = {"--no-deps", "--wheel-dir"}  # pip's
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
    leaf, back = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "leaf.py").write_text(leaf)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    export, train = (
        next(shlex.split(call)[1:] for call in _calls(text) if f" {command} " in call)
        for command in ("export", "train")
    )
    assert main([*export, "--engines", "onnxruntime", "--seed", "3"]) == 0
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


def test_the_keys_of_a_json_line() -> None:
    rows = _rows(_section("docs/training.md", "Output"))
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row[0])]
    count = len(fields(StepRecord))
    assert keys[:count] == [field.name for field in fields(StepRecord)]


def test_the_fields_of_a_parity_record() -> None:
    import numpy as np

    from edgestill.export.verify import _compare

    class Same:
        def train_step(self, batch):
            return {"loss": np.zeros(1), "latents": np.zeros((1, 2))}

        def state(self):
            return {"w": np.ones(1)}

        def encode(self, images):
            return np.zeros((1, 2)), np.zeros((1, 2))

    expected = [(Same().train_step({}), Same().state())]
    record = _compare("onnxruntime", Same(), [{}], expected, [np.zeros(1)], [Same().encode(np.zeros(1))])
    documented = [row[0].strip("`") for row in _rows(_section("docs/bundle.md", "parity"))]
    assert documented == list(record)


def test_the_table_of_what_to_use_instead() -> None:
    from edgestill.export.lowering.capture import _INSTEAD

    assert dict(_marked("instead")) == _INSTEAD


def test_the_tolerances_of_verify() -> None:
    from edgestill.export.verify import LOSS_TOLERANCE, SAME_CLASS, STATE_TOLERANCE

    rows = _rows(_section("docs/lowering.md", "Parity"))
    rows = [row for row in rows if row[0].strip("`") in STATE_TOLERANCE]
    assert {row[0].strip("`"): float(row[2]) for row in rows} == STATE_TOLERANCE
    for row in rows:
        assert float(row[1]) == LOSS_TOLERANCE and row[3] == f"{100 * SAME_CLASS:.0f} %"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (asked,) = (row[1:] for row in _rows(readme) if row[0].startswith("parity asked by"))
    assert [float(cell) for cell in asked] == list(STATE_TOLERANCE.values())


IMAGE, VECTOR = (2, 4, 6, 6), (4,)
WINDOW = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
CONVOLUTION = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
EXAMPLES: dict[str, list[tuple[list[tuple[int, ...]], dict]]] = {
    **{name: [([(2, 3), (2, 3)], {})] for name in
       ("add", "subtract", "multiply", "divide", "maximum", "greater_equal")},
    **{name: [([(2, 3)], {})] for name in
       ("relu", "positive", "exp", "log", "sqrt", "rsqrt", "to_float", "softmax", "log_softmax")},
    "clamp": [([(2, 3)], {"low": 0.0, "high": 6.0})],
    "one_hot": [([(2,)], {"classes": 3})],
    "matmul": [
        ([(2, 3), (3, 2)], {}),
        ([(2, 3), (2, 3)], {"transpose_b": True}),
        ([(5, 2, 3), (5, 2, 3)], {"transpose_b": True}),
    ],
    "reduce_sum": [([(2, 3)], {"axes": (1,)})],
    "reduce_mean": [([(2, 3)], {"axes": (1,)})],
    "reshape": [([(2, 3)], {"shape": (6,)})],
    "transpose": [([(2, 3)], {"permutation": (1, 0)})],
    "slice": [([(2, 3)], {"axis": 1, "start": 0, "stop": 2})],
    "concat": [([(2, 3), (2, 3)], {"axis": 0})],
    "pad": [([(2, 3)], {"begins": (0, 1), "ends": (0, 1)})],
    "conv2d": [([IMAGE, (4, 4, 3, 3)], CONVOLUTION)],
    "conv2d_transpose": [([IMAGE, (4, 4, 3, 3)], CONVOLUTION | {"output_padding": (0, 0)})],
    "max_pool2d": [([IMAGE], WINDOW | {"dilation": (1, 1)})],
    "avg_pool2d": [([IMAGE], WINDOW)],
    "normalize": [([IMAGE, *[VECTOR] * 4], {"eps": 1e-5})],
    "normalize_by_batch": [([IMAGE, *[VECTOR] * 4], {"eps": 1e-5})],
}  # fmt: skip
"""For each operator shapes of inputs and attributes, in every form that ONNX spells differently."""


def test_the_table_of_operators_is_the_closed_set() -> None:
    from edgestill.export.lowering.operators import OPERATORS

    documented = [row[0].strip("`") for row in _marked("operators")]
    assert documented == list(OPERATORS), "docs/lowering.md and export/lowering/operators.py differ"


@pytest.mark.parametrize("row", _marked("operators"), ids=lambda row: row[0].strip("`"))
def test_the_onnx_spelling_of_an_operator(row: list[str]) -> None:
    from edgestill.export.lowering.graph import Graph
    from edgestill.export.lowering.onnx_emitter import to_onnx

    name = row[0].strip("`")
    dtype = {"one_hot": "int64", "to_float": "uint8"}.get(name, "float32")
    spelled: list[str] = []
    for shapes, attributes in EXAMPLES[name]:
        graph = Graph()
        inputs = [graph.input(f"x{i}", shape, dtype) for i, shape in enumerate(shapes)]
        for i, value in enumerate(graph.apply_many(name, *inputs, **attributes)):
            graph.output(f"y{i}", value)
        spelled += [node.op_type for node in to_onnx(graph).graph.node]
    assert sorted(set(spelled)) == sorted(row[1].split(", "))
