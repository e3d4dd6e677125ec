"""`edgestill export` and `edgestill verify`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from edgestill.runtime.bundle.manifest import OBJECTIVES, OPTIMIZERS, InputSpec, Objective, Optimizer
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
        help="a student that comes with the product (docs/students.md), or your own as package.module:factory or "
        "file.py:factory",
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
        "--split",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="MODULE,…",
        help="for an existing model: where perception, representation and output lie in it; the last one is called "
        "with the latent (features,head)",
    )
    p.add_argument(
        "--input-shape",
        type=_integers,
        metavar="N,…",
        help="of one sample: C,H,W, channels,length, or length of tokens (default: the student's, else 3,32,32)",
    )
    p.add_argument(
        "--input-dtype",
        choices=("uint8", "float32", "int64"),
        help="uint8 is normalised in the graph, float32 enters as it is, int64 are indices (default: the student's, "
        "else uint8)",
    )
    p.add_argument(
        "--also-input",
        action="append",
        default=[],
        type=_input,
        metavar="NAME:DTYPE:N,…",
        help="a further tensor that perception is called with; repeatable (tokens:int64:20)",
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
        choices=tuple(OBJECTIVES),
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
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="default: %(default)s")
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
    from edgestill.export.exporter import ExportOptions, default_input, export_bundle
    from edgestill.export.targets import ENGINES

    of_logits = args.objective in ("kd", "both")
    if args.kd_loss and not of_logits:
        raise UsageError(f"--kd-loss is for --objective kd or both, not {args.objective}")
    if args.nesterov and args.optimizer != "sgd":
        raise UsageError(f"--nesterov is for --optimizer sgd, not {args.optimizer}")
    kd_loss = (args.kd_loss or "mse") if of_logits else None
    engines = (
        ENGINES if args.engines == "all" else tuple(dict.fromkeys(filter(None, args.engines.split(","))))
    )
    usual = default_input(args.student)
    options = ExportOptions(
        student=args.student,
        latent_size=args.latent_size,
        classes=args.classes,
        batch=args.batch,
        widths=args.widths,
        normalization=args.normalization,
        input=InputSpec(
            args.input_shape or usual.shape, args.input_dtype or usual.dtype, args.mean or (), args.std or ()
        ),
        more_inputs=tuple(args.also_input),
        split=args.split,
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
        description="Makes every training step on each engine and in eager PyTorch (float64 and float32) from the same "
        "state and batch, judges by what float32 itself is wrong by, and writes the differences into the manifest.",
    )
    p.add_argument("bundle", type=Path, metavar="DIR", help="a folder from `edgestill export`")
    p.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    p.add_argument("--engines", metavar="LIST", help="default: every engine in the bundle")
    p.add_argument(
        "--data",
        default=None,
        metavar="NAME_OR_PATH",
        help="samples to train on (default: cifar10-mini where it fits, else random ones)",
    )
    p.add_argument(
        "--student", default=None, metavar="NAME", help="where the student's factory is now, if it has moved"
    )
    p.add_argument("--seed", type=int, default=0, help="of batches and teacher outputs (default: %(default)s)")
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    add_json_option(p, "one JSON object")
    p.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    from edgestill.export.parity.verify import print_report, verify_bundle

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


def _input(text: str) -> InputSpec:
    name, dtype, shape = text.split(":")
    if not name.isidentifier() or dtype not in ("uint8", "float32", "int64"):
        raise ValueError(text)
    return InputSpec(_integers(shape), dtype, name=name)
