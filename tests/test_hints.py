"""Commands that messages, pages and helps name: each is parsed as the command line parses it."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgestill.runtime import cli
from edgestill.runtime.commands.completion import SHELLS
from edgestill.runtime.commands.examples import EXAMPLES
from tests.test_docs import PARSERS, ROOT

pytestmark = pytest.mark.unit
CODE_FOLDERS = ("coordinator", "edge_runtime", "export", "benchmarks", "simulation", "edgestill")
CALL = re.compile(rf"edgestill (?:{'|'.join(cli.COMMANDS)})\b(?!:)")


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module that is no docstring; 1 stands for what is filled in."""
    tree = ast.parse(path.read_text())
    inside = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
    inside |= {id(part) for one in ast.walk(tree) if isinstance(one, ast.JoinedStr) for part in one.values}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(map(_filled, node.values))


def _filled(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    source = ast.unparse(part)
    if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.IfExp):
        return ast.literal_eval(part.value.body) if isinstance(part.value.body, ast.Constant) else "1"
    if "place" in source:  # ` --data-dir DIR`, or nothing
        return ""
    if "newest" in source:  # a version of the database
        return "0001"
    return "methods" if "experiment" in source else "1"


def hinted() -> Iterator[tuple[str, str]]:
    """Place and text of every command that code or a page of the dashboard names."""
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "examples.py":
                continue
            for line, text in texts_of(path):
                for found in re.findall(r"`(edgestill [a-z][^`]*)`", text):
                    yield f"{path.relative_to(ROOT)}:{line}", found
    for path in sorted((ROOT / "coordinator/dashboard/templates").glob("*.html")):
        for block in re.findall(r"<pre[^>]*>(.*?)</pre>", path.read_text(), re.DOTALL):
            for line in re.sub(r"\{\{.*?\}\}", "1", block).splitlines():
                yield path.name, line.strip()


def check(command: str) -> str | None:
    """What is wrong with a command line; a bare name of a command is its name, nothing to be typed."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    while "=" in words[0]:  # a variable before the command
        words = words[1:]
    for end in (">", ">>", "|"):
        words = words[: words.index(end)] if end in words else words
    if " ".join(words[1:]) in PARSERS or "--help" in words:
        return None
    try:
        PARSERS[""].parse_args(words[1:])
    except ValueError as error:
        return f"{command}: {error}"
    return None


def test_every_command_that_a_message_names_can_be_typed() -> None:
    found = list(hinted())
    assert len(found) > 40
    assert not (all_wrong := [f"{place}: {wrong}" for place, command in found if (wrong := check(command))]), (
        "\n".join(all_wrong)
    )


def test_no_message_names_a_command_in_any_other_form() -> None:
    """Where commands stand in backticks, the test above sees them."""
    wrong = []
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "examples.py":
                continue
            for line, text in texts_of(path):
                if CALL.search(re.sub(r"`[^`]*`", "", text)):
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {text}")
    assert wrong == []


@pytest.mark.parametrize("command", [name for name, parser in PARSERS.items() if name and not parser._subparsers])
def test_every_help_ends_with_examples_that_can_be_typed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    _, _, shown = capsys.readouterr().out.partition("\nexamples:\n")
    examples = [line.strip() for line in shown.replace("\\\n", " ").splitlines()]
    assert len(examples) == len(EXAMPLES[command]) > 0
    for example in examples:
        assert f"edgestill {command}" in example
        assert check(example) is None


def test_examples_are_of_commands_that_there_are() -> None:
    assert set(EXAMPLES) <= set(PARSERS)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_told_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    words = set(re.findall(r"[\w-]+", script))
    assert set(cli.COMMANDS) <= words
    for command in ("serve", "task create", "join", "train"):
        options = {one for action in PARSERS[command]._actions for one in action.option_strings}
        bare = {one.lstrip("-") for one in options}
        assert bare <= words | {word.lstrip("-") for word in words}, command


@pytest.mark.contract
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("edgestill tas", {"task"}),
        ("edgestill task cr", {"create"}),
        ("edgestill serve --dashboard-t", {"--dashboard-token"}),
        ("edgestill task create --exchange l", {"latents", "logits"}),
        ("edgestill predict ./edge", {"./edgestill.bash"}),
        ("edgestill predict x ./edge", {"./edgestill.bash"}),
    ],
)
def test_bash_completes_what_was_begun(
    typed: str, wanted: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "edgestill.bash").write_text(capsys.readouterr().out)
    words = shlex.join(typed.split())
    script = f"""source {shlex.quote(str(tmp_path / "edgestill.bash"))}
        COMP_WORDS=({words}); COMP_CWORD={len(typed.split()) - 1}
        $(complete -p edgestill | sed 's/.*-F \\([^ ]*\\).*/echo \\1/' | bash); printf '%s\\n' "${{COMPREPLY[@]}}\""""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == wanted, done.stderr
