"""`edgestill export` and `edgestill verify`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from edgestill.runtime.bundle.manifest import DTYPES, KD_LOSSES, OBJECTIVES, OPTIMIZERS, InputSpec
from edgestill.runtime.console import Progress, add_image_options, add_json_option
from edgestill.runtime.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds both commands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    _add_export(subparsers)
    _add_verify(subparsers)


def _add_export(subparsers: argparse._SubParsersAction) -> None:
    p = subparsers.add_parser(
        "export",
        allow_abbrev=False,  # run_export_inference looks at what was typed
        help="write the bundle of a student: its training graphs for each engine",
        description="Lowers one whole training step of a student to forward operators, for each engine, and writes a "
        "bundle that trains without PyTorch.",
    )

    def add(flag: str, about: str, metavar: str | None = None, kind: Any = None, **more: Any) -> None:
        p.add_argument(flag, help=about, metavar=metavar, **({"type": kind} if kind else {}), **more)

    add("--student", "a student that comes with the product (docs/students.md), or your own as package.module:factory "
        "or file.py:factory", "NAME")  # fmt: skip
    add("--output", "folder of the bundle, or a file ending in .zip; with --inference a .onnx or .pte", "DIR", Path,
        required=True)  # fmt: skip
    p.add_argument("--inference", action="store_true",
        help="instead of a bundle write one ordinary inference model of --bundle's student with the weights of "
        "--state, samples in, probabilities out")  # fmt: skip
    add("--bundle", "with --inference: the student's bundle", "BUNDLE", Path)
    add("--state", "with --inference: a state of that bundle (its initial one)", "FILE", Path)
    add("--engines", "native, onnxruntime, executorch, onnxruntime-training, or all (native,onnxruntime,executorch)",
        "LIST", _engines, default=("native", "onnxruntime", "executorch"))  # fmt: skip
    add("--latent-size", "size of the latent (%(default)s)", "L", int, default=128)
    add("--classes", "number of classes (10, or as many as --class-names gives)", "K", int)
    add("--class-names", "what the outputs mean, in their order: names, or data whose names are taken, as --data of "
        "`edgestill train`", "NAME,…|DATA")  # fmt: skip
    add("--batch", "samples a step, fixed (32); with --inference samples a call (any number for .onnx, 1 for .pte)",
        "B", int)  # fmt: skip
    add("--widths", "channels of each block of a built-in student", "W1,W2,…", _integers)
    add("--normalization", "after each convolution of a built-in student (%(default)s)", default="batch",
        choices=("batch", "group", "none"))  # fmt: skip
    add("--split", "for an existing model: where perception, representation and output lie in it; the last one is "
        "called with the latent (features,head)", "MODULE,…", _names)  # fmt: skip
    add("--input-shape", "of one sample: C,H,W, channels,length, or length of tokens (the student's, else 3,32,32)",
        "N,…", _integers)  # fmt: skip
    add("--input-dtype", "uint8 is normalised in the graph, float32 enters as it is, int64 are indices (the student's, "
        "else uint8)", choices=tuple(DTYPES))  # fmt: skip
    add("--also-input", "a further tensor that perception is called with; repeatable (tokens:int64:20)",
        "NAME:DTYPE:N,…", read_input, action="append", dest="more_inputs")  # fmt: skip
    add("--mean", "a channel, of values 0-1 (CIFAR-10's for 3 channels)", "M,…", _numbers)
    add("--std", "a channel, of values 0-1", "S,…", _numbers)
    add("--objective", "labels alone, or besides them a teacher's logits, latents, both, latents against those of "
        "other samples, or neighbourhoods of latents (%(default)s)", choices=tuple(OBJECTIVES),
        default="lkd")  # fmt: skip
    add("--kd-loss", "for kd and both: squared error of logits, or KL divergence at the temperature (mse)",
        choices=KD_LOSSES)  # fmt: skip
    add("--negatives", "for crd: other samples that each sample is told apart from (512)", "N", int)
    add("--features", "for crd: size of the projected latents (128)", "D", int)
    add("--teacher-latent-size", "for crd: size of the teacher's latent (the student's)", "L", int)
    add("--optimizer", "sgd, with momentum, or adamw (%(default)s)", choices=OPTIMIZERS, default="sgd")
    p.add_argument("--nesterov", action="store_true", help="Nesterov momentum (sgd)")
    p.add_argument("--clip-gradients", action="store_true",
        help="the step clips gradients by their global norm, which --clip-norm of `edgestill train` gives")  # fmt: skip
    add("--freeze", "do not train this module, or its first N blocks (perception, perception:2); repeatable",
        "MODULE[:N]", action="append")  # fmt: skip
    p.add_argument("--common-head", action="store_true", help="for a federation: the one output layer that all "
                   "students of so many classes and latents share, orthogonal and frozen")  # fmt: skip
    add("--seed", "of the initial weights (%(default)s)", "N", int, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace a bundle that is there already")
    add_json_option(p, "one JSON object")
    p.set_defaults(run=run_export)


_OF_INFERENCE = ("--inference", "--bundle", "--state", "--output", "--student", "--batch", "--overwrite", "--json")


def run_export(args: argparse.Namespace) -> int:
    if args.inference:
        return run_export_inference(args)
    for flag in ("bundle", "state"):
        if getattr(args, flag) is not None:
            raise UsageError(f"--{flag} without --inference", "add --inference, or leave it out")
    if args.student is None:
        raise UsageError("which student?", "--student cnn3, or your own: --student package.module:factory")
    from edgestill.export.exporter import export_bundle, options_of

    options, start = options_of(vars(args)), time.monotonic()
    with Progress() as progress, redirect_stdout(sys.stderr):  # what a student prints is no data
        path = export_bundle(options, args.output, progress, args.overwrite)
    if args.json:
        seconds = round(time.monotonic() - start, 2)
        print(json.dumps({"bundle": str(path), "engines": list(options.engines), "seconds": seconds}))
    else:
        print(f"next: `edgestill verify {shlex.quote(str(path))}`", file=sys.stderr)
    return 0


def run_export_inference(args: argparse.Namespace) -> int:
    """Errors: UsageError for options that a bundle has decided already."""
    given = [word.partition("=")[0] for word in args.typed if word.startswith("--")]
    if others := [flag for flag in given if flag not in _OF_INFERENCE]:
        raise UsageError(f"{others[0]} with --inference", "leave it out: the student is that of --bundle")
    if args.bundle is None:
        raise UsageError("--inference of which student?", "give the bundle that it was trained with: --bundle BUNDLE")
    from edgestill.export.inference import export_inference

    with Progress() as progress, redirect_stdout(sys.stderr):
        path = export_inference(
            args.bundle, args.state, args.output, args.student, args.batch, progress, args.overwrite
        )
    if args.json:
        print(json.dumps({"model": str(path), "size_bytes": path.stat().st_size}))
    else:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _add_verify(subparsers: argparse._SubParsersAction) -> None:
    p = subparsers.add_parser(
        "verify",
        help="compare every engine of a bundle with eager PyTorch, step by step",
        description="Makes every training step on each engine and in eager PyTorch (float64 and float32) from the same "
        "state and batch, judges by what float32 itself is wrong by, and writes the differences into the manifest.",
    )
    data = "samples to train on (cifar10-mini where it fits, else random ones)"
    p.add_argument("bundle", type=Path, metavar="DIR", help="a folder from `edgestill export`")
    p.add_argument("--steps", type=int, default=20, help="training steps (%(default)s)")
    p.add_argument("--engines", type=_names, metavar="LIST", help="default: every engine in the bundle")
    p.add_argument("--data", metavar="NAME_OR_PATH", help=data)
    add_image_options(p)
    p.add_argument("--student", metavar="NAME", help="where the student's factory is now, if it has moved")
    p.add_argument("--seed", type=int, default=0, help="of batches and teacher outputs (%(default)s)")
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    add_json_option(p, "one JSON object")
    p.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    from edgestill.export.exporter import check_seed
    from edgestill.export.parity.verify import print_report, verify_bundle

    check_seed(args.seed)
    if args.steps < 1:
        raise UsageError(f"--steps must be at least 1, not {args.steps}")
    with Progress() as progress, redirect_stdout(sys.stderr):
        report = verify_bundle(
            args.bundle, args.steps, args.engines, args.data, args.student, args.seed, args.threads, progress,
            args.resize, args.skip_broken,
        )
    if args.json:
        print(json.dumps({"engines": report}))
    else:
        print_report(report)
    return 0 if all(entry["ok"] for entry in report.values()) else 1


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _engines(text: str) -> tuple[str, ...]:
    from edgestill.runtime.engines.registry import ENGINES

    return tuple(ENGINES) if text == "all" else _names(text)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def read_input(text: str) -> InputSpec:
    """From NAME:DTYPE:N,… Errors: UsageError."""
    try:
        name, dtype, shape = text.split(":")
        if name.isidentifier() and dtype in DTYPES:
            return InputSpec(_integers(shape), dtype, name=name)
    except ValueError:
        pass
    raise UsageError(f"invalid further tensor {text!r}", hint="write NAME:DTYPE:N,… as in tokens:int64:20")
