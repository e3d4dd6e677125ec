"""`edgestill export` and `edgestill verify`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from edgestill.runtime.console import add_json_option
from edgestill.runtime.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds both commands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    _add_export(subparsers)
    _add_verify(subparsers)


def _add_export(subparsers: argparse._SubParsersAction) -> None:
    p = subparsers.add_parser(
        "export",
        help="write the bundle of a student: its training graphs for each engine",
        description="Lowers one whole training step of a student to forward operators, for each engine, and writes a "
        "bundle that trains without PyTorch.",
    )
    p.add_argument(
        "--student",
        required=True,
        metavar="NAME",
        help="cnn3, cnn4, cnn5, resnet8, mobilenet-tiny, or your own as package.module:factory or file.py:factory",
    )
    p.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the bundle, or a file ending in .zip",
    )
    p.add_argument(
        "--engines",
        default="onnxruntime,executorch",
        metavar="LIST",
        help="onnxruntime, executorch, onnxruntime-training, or all (default: %(default)s)",
    )
    p.add_argument(
        "--latent-size", type=int, default=128, metavar="L", help="size of the latent (default: %(default)s)"
    )
    p.add_argument(
        "--classes", type=int, default=10, metavar="K", help="number of classes (default: %(default)s)"
    )
    p.add_argument(
        "--batch", type=int, default=32, metavar="B", help="samples a step, fixed (default: %(default)s)"
    )
    p.add_argument(
        "--widths", type=_integers, metavar="W1,W2,…", help="channels of each block of a built-in student"
    )
    p.add_argument(
        "--normalization",
        choices=("batch", "group", "none"),
        default="batch",
        help="after each convolution of a built-in student (default: %(default)s)",
    )
    p.add_argument(
        "--input-shape", type=_integers, default=(3, 32, 32), metavar="C,H,W", help="default: 3,32,32"
    )
    p.add_argument(
        "--input-dtype",
        choices=("uint8", "float32"),
        default="uint8",
        help="uint8 is normalised in the graph, float32 enters as it is (default: %(default)s)",
    )
    p.add_argument(
        "--mean",
        type=_numbers,
        metavar="M,…",
        help="a channel, of values 0-1 (default: CIFAR-10's for 3 channels)",
    )
    p.add_argument("--std", type=_numbers, metavar="S,…", help="a channel, of values 0-1")
    p.add_argument(
        "--objective",
        choices=("ce", "kd", "lkd", "both", "crd", "lpd"),
        default="lkd",
        help="labels alone, or besides them a teacher's logits, latents, both, latents against those of other samples, "
        "or neighbourhoods of latents (default: %(default)s)",
    )
    p.add_argument(
        "--kd-loss",
        choices=("mse", "kl"),
        default=None,
        help="for kd and both: squared error of logits, or KL divergence at the temperature (default: mse)",
    )
    p.add_argument(
        "--negatives",
        type=int,
        metavar="N",
        help="for crd: other samples that each sample is told apart from (default: 512)",
    )
    p.add_argument(
        "--features", type=int, metavar="D", help="for crd: size of the projected latents (default: 128)"
    )
    p.add_argument(
        "--teacher-latent-size",
        type=int,
        metavar="L",
        help="for crd: size of the teacher's latent (default: the student's)",
    )
    p.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="default: %(default)s")
    p.add_argument("--nesterov", action="store_true", help="Nesterov momentum (sgd)")
    p.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="MODULE[:N]",
        help="do not train this module, or its first N blocks (perception, perception:2); repeatable",
    )
    p.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace a bundle that is there already")
    add_json_option(p, "one JSON object")
    p.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    from edgestill.export.exporter import ExportOptions, export_bundle
    from edgestill.export.objectives import Objective
    from edgestill.export.optimizers import Optimizer
    from edgestill.export.step import InputOptions
    from edgestill.export.targets import ENGINES

    of_logits = args.objective in ("kd", "both")
    if args.kd_loss and not of_logits:
        raise UsageError(f"--kd-loss is for --objective kd or both, not {args.objective}")
    if args.nesterov and args.optimizer != "sgd":
        raise UsageError(f"--nesterov is for --optimizer sgd, not {args.optimizer}")
    if len(args.input_shape) != 3:
        raise UsageError(
            f"--input-shape needs channels,height,width, not {args.input_shape}",
            hint="a window of 9 sensors and 128 samples is --input-shape 9,1,128",
        )
    kd_loss = (args.kd_loss or "mse") if of_logits else None
    engines = (
        ENGINES if args.engines == "all" else tuple(dict.fromkeys(filter(None, args.engines.split(","))))
    )
    options = ExportOptions(
        student=args.student,
        latent_size=args.latent_size,
        classes=args.classes,
        batch=args.batch,
        widths=args.widths,
        normalization=args.normalization,
        input=InputOptions(args.input_shape, args.input_dtype, args.mean, args.std),
        objective=Objective(args.objective, kd_loss, args.negatives, args.features, args.teacher_latent_size),
        optimizer=Optimizer(args.optimizer, args.nesterov),
        freeze=tuple(args.freeze),
        engines=engines,
        seed=args.seed,
    )
    start = time.monotonic()
    path = export_bundle(options, args.output, _say, args.overwrite)
    if args.json:
        print(
            json.dumps(
                {"bundle": str(path), "engines": list(engines), "seconds": round(time.monotonic() - start, 2)}
            )
        )
    else:
        _say(f"next: edgestill verify {path}")
    return 0


def _add_verify(subparsers: argparse._SubParsersAction) -> None:
    p = subparsers.add_parser(
        "verify",
        help="compare every engine of a bundle with eager PyTorch, step by step",
        description="Trains the bundle on each engine and in eager PyTorch from the same state on the same images, "
        "and writes the largest differences into the manifest.",
    )
    p.add_argument("bundle", type=Path, metavar="DIR", help="a folder from `edgestill export`")
    p.add_argument("--steps", type=int, default=20, help="consecutive steps (default: %(default)s)")
    p.add_argument("--engines", metavar="LIST", help="default: every engine in the bundle")
    p.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help="images to train on (default: cifar10-mini where they fit, else random samples)",
    )
    p.add_argument(
        "--student", default=None, metavar="NAME", help="where the student's factory is now, if it has moved"
    )
    p.add_argument("--seed", type=int, default=0, help="of the images' order (default: %(default)s)")
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    add_json_option(p, "one JSON object")
    p.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    from edgestill.export.verify import print_report, verify_bundle

    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed} is out of range", hint="give 0 or more, below 2^63")
    if args.steps < 1:
        raise UsageError(f"--steps must be at least 1, not {args.steps}")
    engines = tuple(filter(None, args.engines.split(","))) if args.engines else None
    report = verify_bundle(
        args.bundle, args.steps, engines, args.data, args.student, args.seed, args.threads, _say
    )
    if args.json:
        print(json.dumps({"engines": report}))
    else:
        print_report(report)
    return 0 if all(entry["ok"] for entry in report.values()) else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
