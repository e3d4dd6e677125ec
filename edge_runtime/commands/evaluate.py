"""`edgestill evaluate`: accuracy, accuracy a class and confusion matrix of a state on data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.console import add_image_options, add_json_option, printable
from edgestill.runtime.data.classes import names_of_outputs
from edgestill.runtime.data.dataset import load_splits
from edgestill.runtime.data.notice import Notices
from edgestill.runtime.engines.registry import ENGINES, open_engine
from edgestill.runtime.training.checkpoint import classes_of, load_named_state
from edgestill.runtime.training.evaluation import Evaluation, draw_confusion, evaluate


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evaluate", help="accuracy and confusion matrix of a state", description=__doc__
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="a folder or .zip from `edgestill export`"
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="default: the bundle's initial state")
    parser.add_argument("--data", required=True, metavar="NAME_OR_PATH", help="as for `edgestill train`")
    parser.add_argument(
        "--split", choices=("train", "test", "validation"), help="default: test if there is one, else all"
    )
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the first that works here")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: the engine's own choice"
    )
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    add_image_options(parser)
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with Bundle.open(arguments.bundle) as bundle:
        state, known, notices = None, classes_of(bundle), Notices()
        if arguments.state is not None:
            state, known = load_named_state(arguments.state, bundle)
        splits = load_splits(
            arguments.data,
            bundle.input,
            bundle.classes,
            arguments.resize,
            bundle.more_inputs,
            known=known,
            skip_broken=arguments.skip_broken,
            tell=notices,
        )
        dataset = splits.choose(arguments.split)
        engine = open_engine(bundle, arguments.engine, arguments.threads)
        try:
            if state is not None:
                engine.load_state(state)
            result = evaluate(engine, dataset, bundle.batch, bundle.classes)
        finally:
            engine.close()
        if arguments.confusion is not None:
            title = f"{bundle.student.name}: accuracy {result.accuracy:.3f} on {result.samples} samples"
            draw_confusion(result, arguments.confusion, title)
        if arguments.json:
            print(json.dumps({**result.as_json(), "engine": engine.name, "notices": notices.as_json()}))
        else:
            print(describe(result))
    return 0


def describe(result: Evaluation) -> str:
    """The evaluation as lines for a person."""
    lines = [
        f"accuracy  {result.accuracy:.4f}",
        f"loss      {result.loss:.4f}",
        f"samples   {result.samples}",
    ]
    names = [*map(printable, names_of_outputs(result.class_names, len(result.confusion)))]
    width = max(5, *map(len, names))
    lines.append("")
    for name, share in zip(names, result.per_class, strict=True):
        lines.append(f"{name:<{width}}  {'no samples' if share is None else f'{share:.3f}'}")
    return "\n".join(lines)
