"""`edgestill predict`: the classes of pictures or of other samples, by a state, with their probabilities."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.console import add_image_options, add_json_option, printable
from edgestill.runtime.data.classes import names_of_outputs
from edgestill.runtime.data.notice import Notices
from edgestill.runtime.data.pictures import load_pictures, load_unlabelled
from edgestill.runtime.engines.registry import ENGINES, open_engine
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.checkpoint import classes_of, load_named_state
from edgestill.runtime.training.evaluation import probabilities
from edgestill.runtime.training.teacher import encode_all

_SHOWN = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("predict", help="classes of pictures or samples", description=__doc__)
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="a folder or .zip from `edgestill export`"
    )
    parser.add_argument(
        "pictures", type=Path, nargs="*", metavar="IMAGE", help="picture files, or folders of them"
    )
    parser.add_argument(
        "--data", metavar="NAME_OR_PATH", help="instead: as for `edgestill train`, with or without labels"
    )
    parser.add_argument(
        "--split", choices=("train", "test", "validation"), help="of --data; default: test if there is one"
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="default: the bundle's initial state")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: the first that works here")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: the engine's own choice"
    )
    add_image_options(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="CSV on stdout instead of words, with every class")
    add_json_option(form, "JSON lines")
    parser.set_defaults(run=run)
    _take_pictures_behind_options(parser)


def _take_pictures_behind_options(parser: argparse.ArgumentParser) -> None:
    """Lets options stand between BUNDLE and IMAGE, which argparse does for a whole command line alone."""
    plain = parser.parse_known_args

    def intermixed(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parser.parse_known_args = plain  # type: ignore[method-assign]  # which the next line calls in turn
        try:
            return parser.parse_known_intermixed_args(args, namespace)
        finally:
            parser.parse_known_args = intermixed  # type: ignore[method-assign]

    parser.parse_known_args = intermixed  # type: ignore[method-assign]


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.pictures) == (arguments.data is not None):
        raise UsageError(
            "predict what?" if arguments.data is None else "pictures and --data", "give pictures, or --data"
        )
    if arguments.split is not None and arguments.data is None:
        raise UsageError("--split without --data", "leave it out, or give the folder of that split")
    notices = Notices()
    with Bundle.open(arguments.bundle) as bundle:
        known, state = classes_of(bundle), None
        if arguments.state is not None:
            state, known = load_named_state(arguments.state, bundle)
        else:
            print(
                "edgestill: no --state, so by the weights that the bundle was exported with", file=sys.stderr
            )
        how = (arguments.resize, arguments.skip_broken, notices)
        if arguments.data is None:
            samples = load_pictures(arguments.pictures, bundle.samples, *how)
        else:
            samples = load_unlabelled(arguments.data, bundle.samples, arguments.split, *how)
        engine = open_engine(bundle, arguments.engine, arguments.threads)
        try:
            if state is not None:
                engine.load_state(state)
            first, *more = samples.samples
            found = probabilities(encode_all(engine, first, bundle.batch, tuple(more)).logits)
        finally:
            engine.close()
        classes = names_of_outputs(known.names, bundle.classes)
    if arguments.json:
        _print_json(samples.names, found, classes)
        print(json.dumps({"summary": {"samples": len(samples), "engine": engine.name,
                                      "class_names": classes, "notices": notices.as_json()}}))  # fmt: skip
    elif arguments.csv:
        _print_csv(samples.names, found, classes)
    else:
        _print_words(samples.names, found, classes)
    return 0


def _print_json(names: Sequence[str], found: np.ndarray, classes: Sequence[str]) -> None:
    for name, row in zip(names, found.tolist(), strict=True):
        best = int(np.argmax(row))
        print(json.dumps({"sample": name, "class": classes[best], "number": best, "probability": row[best],
                          "probabilities": row}))  # fmt: skip


def _print_csv(names: Sequence[str], found: np.ndarray, classes: Sequence[str]) -> None:
    table, classes = csv.writer(sys.stdout, lineterminator="\n"), [*map(printable, classes)]
    table.writerow(["sample", "class", "probability", *classes])
    for name, row in zip(names, found.tolist(), strict=True):
        best = int(np.argmax(row))
        table.writerow([printable(name), classes[best], f"{row[best]:.6g}", *(f"{p:.6g}" for p in row)])


def _print_words(names: Sequence[str], found: np.ndarray, classes: Sequence[str]) -> None:
    """The likeliest class of each sample, and those that come next."""
    names, classes = [*map(printable, names)], [*map(printable, classes)]
    width, wide = max(map(len, names)), max(map(len, classes))
    for name, row in zip(names, found, strict=True):
        best, *others = np.argsort(-row, kind="stable")[:_SHOWN]
        rest = ", ".join(f"{classes[one]} {row[one]:.3f}" for one in others)
        print(f"{name:<{width}}  {classes[best]:<{wide}}  {row[best]:.3f}  ({rest})")
