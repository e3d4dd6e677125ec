"""`edgestill task export`: takes the global model of a task out, with its bundle."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from edgestill.coordinator.model import BEST, LAST, GlobalModel, body_of, find_model
from edgestill.coordinator.opening import open_existing
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import STORE_SETTINGS, add_flags, place_words, settings_from
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.writer import check_output, replacing
from edgestill.runtime.console import add_json_option
from edgestill.runtime.errors import UsageError
from edgestill.runtime.files import write_atomically


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "export", help="write the global model to a file", allow_abbrev=False,
        description="Writes the global model of a task after a round as a state of its bundle: it predicts, trains on, "
        "becomes an inference model and loads into PyTorch.",
    )  # fmt: skip
    parser.add_argument("name", metavar="TASK", help="its name; `edgestill task list` has them all")
    parser.add_argument(
        "--round",
        metavar="best|last|N",
        help="after which round (the best by the task's validation images, where it has some, else the last)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model (.safetensors)")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="also write its bundle; a .zip gives one file")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    add_json_option(parser, "one JSON object")
    add_flags(parser, STORE_SETTINGS)
    parser.set_defaults(run=run_export)


def run_export(arguments: argparse.Namespace) -> int:
    """Writes the model, and the bundle where it is asked for; both or a message why not."""
    wanted, output = arguments.round, arguments.output
    if wanted not in (None, BEST, LAST) and not wanted.isdecimal():
        raise UsageError(f"--round {wanted}", f"give {BEST}, {LAST} or a round's number")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", f"give a file: --output {output / arguments.name}.safetensors")
    if output.exists() and not arguments.overwrite:
        raise UsageError(f"{output} exists already", "add --overwrite, or give another --output")
    if arguments.bundle is not None:
        check_output(arguments.bundle, arguments.overwrite)
    service = open_existing(settings_from(arguments))
    try:
        model = find_model(service, arguments.name, wanted)
    except Problem as problem:
        place = place_words(vars(arguments))
        hint = problem.hint.replace("`edgestill task list`", f"`edgestill task list{place}`")
        name = shlex.quote(arguments.name)
        hint = hint.replace("`edgestill task show TASK`", f"`edgestill task show {name}{place}`")
        raise UsageError(problem.detail, hint) from problem
    samples = "" if arguments.bundle is None else _write_bundle(service, model, arguments.bundle)
    body = body_of(service, model)
    write_atomically(output, [body])
    bundle = None if arguments.bundle is None else str(arguments.bundle)
    if arguments.json:
        said = {"task": model.task.name, "round": model.round, "best": model.best, "student": model.student.student}
        print(json.dumps(said | {"model": str(output), "size_bytes": len(body), "bundle": bundle}))
        return 0
    which = f"round {model.round}{', the best' if model.best else ''}"
    print(f"edgestill: wrote {output}: {model.student.student} of {model.task.name} after {which}", file=sys.stderr)
    if bundle is not None:
        words = shlex.join(["edgestill", "predict", bundle, "--state", str(output)])
        print(f"edgestill: next: {words} {samples}", file=sys.stderr)
    return 0


def _write_bundle(service: Service, model: GlobalModel, output: Path) -> str:
    """What `edgestill predict` is told of the samples that the bundle takes."""
    source = service.blobs.path(model.student.bundle)
    with Bundle.open(source) as bundle:
        samples = "--resize IMAGE" if bundle.input.is_image and not bundle.more_inputs else "--data PATH"
        if output.suffix == ".zip":
            write_atomically(output, [source.read_bytes()])
            return samples
        with replacing(output) as folder:
            shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    return samples
