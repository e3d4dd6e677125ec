"""`edgestill simulate`: thousands of virtual devices through the code of the real ones, without sockets."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from edgestill.coordinator.task.task import EXCHANGES, MODES, RULES, clip_value
from edgestill.runtime.bundle.manifest import OBJECTIVES, OPTIMIZERS
from edgestill.runtime.console import add_json_option, describe_time
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS
from edgestill.simulation.settings import Poison, SimulationSettings


def add_parser(subparsers: Any) -> None:
    """Adds `simulate`; it sets `run`, a function of the parsed arguments that returns the exit code."""
    default = SimulationSettings()
    parser = subparsers.add_parser(
        "simulate",
        help="run many virtual devices against a coordinator in one process",
        description="Runs rounds of a federation with virtual devices: the coordinator's service and the devices' "
        "code, without sockets, on a virtual clock. The same seed gives the same results and digest, whatever the "
        "number of workers. Method: docs/simulation.md.",
    )

    def add(name: str, help_text: str, **options: Any) -> None:
        field = name.removeprefix("--").replace("-", "_")
        options.setdefault("default", getattr(default, field, None))
        shown = options["default"]
        if shown not in (None, "", (), False) and options.get("action") is None:
            help_text += f" (default {','.join(shown) if isinstance(shown, tuple) else shown})"
        parser.add_argument(name, help=help_text, **options)

    add("--devices", "virtual devices", type=int, metavar="N")
    add("--rounds", "rounds of the task", type=int, metavar="R")
    add("--gamma", "Dirichlet concentration of the devices' classes", type=float, metavar="G")
    add(
        "--by-user",
        "every device is one of the users that --data names, instead of --gamma",
        action="store_true",
    )
    add("--students", "students, dealt to the devices in turn", type=_names, metavar="A,B")
    add("--global-student", "the coordinator's own (default: the last of --students)", metavar="A")
    add("--bundle", "a bundle instead of --students; may be repeated", type=Path, action="append",
        metavar="DIR")  # fmt: skip
    add("--global-bundle", "a bundle instead of --global-student", type=Path, metavar="DIR")
    add("--width-divisor", "divides the channels of exported students; 1: as they are", type=int, metavar="N")
    add("--latent-size", "of exported students", type=int, metavar="L")
    add("--batch", "of exported students", type=int, metavar="B")
    add("--optimizer", "of exported students", choices=OPTIMIZERS)
    add("--common-head", "export students with one frozen output layer for all (default: unless parameters are "
        "exchanged)", action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--objective", "of exported students (default: lkd, kd or both, by what is exchanged)", choices=OBJECTIVES)
    add("--exchange", "what is exchanged", choices=EXCHANGES)
    add("--mode", "whether the coordinator distils a global student", choices=MODES)
    add("--aggregation", "rule that combines the uploads", choices=RULES)
    add("--align", "rotate each device's latents to the global ones first", action="store_true")
    add("--screen", "leave out uploads that disagree with the others", action="store_true")
    add("--clip", "largest norm of an upload's row, or median", type=clip_value, metavar="C")
    add("--trim", "share cut at either end by trimmed_mean", type=float, metavar="X")
    add("--byzantine", "share that krum must withstand", type=float, metavar="X")
    add("--precision", "of uploads and global outputs", choices=("fp32", "fp16", "int8"))
    add("--goal", "uploads that complete a round (default: as many as are expected)", type=int, metavar="N")
    add("--minimum", "uploads that are enough at the deadline (default: half of the goal)", type=int,
        metavar="N")  # fmt: skip
    add("--deadline-s", "virtual seconds of a round's collection", type=float, metavar="S")
    add("--availability", "share of the devices that are there in a round", type=float, metavar="X")
    add("--dropout", "share of the selected devices that never upload", type=float, metavar="X")
    add("--poison", "share and attack (scale, shuffle, random): 0.2:scale", type=Poison.parse,
        metavar="X:ATTACK")  # fmt: skip
    add("--data", "private data and test split", metavar="NAME_OR_PATH")
    add("--transfer", "images of the transfer set", metavar="NAME_OR_PATH")
    add("--transfer-count", "images of it that are used, drawn by the seed", type=int, metavar="N")
    add("--transfer-labels", "the coordinator knows the transfer set's classes, devices never do (default: for the "
        "shipped one)", action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--validation", "labelled images that the best round is chosen by (default: those of the shipped transfer set, "
        "else a part of a labelled one)", metavar="NAME_OR_PATH")  # fmt: skip
    add("--resize", "scale images of another size", action="store_true")
    add("--skip-broken", "leave out images that cannot be read; they are counted and named", action="store_true")
    add("--test-samples", "of each device's T_priv and T_uni", type=int, metavar="N")
    add("--noise-multiplier", "differential privacy: noise in units of the sensitivity (default: none)", type=float,
        metavar="Z")  # fmt: skip
    add("--privacy-clip", "norm that private outputs are shortened to, with --noise-multiplier", type=float,
        metavar="C")  # fmt: skip
    add("--local-epochs", "epochs of local training a round", type=int, metavar="N")
    add("--learning-rate", f"of local training: {HYPERPARAMETERS['learning_rate'].help}", type=float, metavar="X")
    add("--weight-decay", f"of local training: {HYPERPARAMETERS['weight_decay'].help}", type=float, metavar="X")
    add("--alpha", f"of local training: {HYPERPARAMETERS['alpha'].help}", type=float, metavar="X")
    add("--transfer-fraction", "share of a batch that comes from the transfer set", type=float, metavar="X")
    add("--augment", "any of flip,crop, on private images (default flip)", metavar="LIST")
    add("--distil-epochs", "epochs of the global student a round", type=int, metavar="N")
    add("--distil-learning-rate", "of the global student", type=float, metavar="X")
    add("--no-local-only", "leave out the comparison with training alone", action="store_true",
        default=False)  # fmt: skip
    add("--seed", "decides every draw", type=int, metavar="S")
    add("--workers", "training processes, one thread each (default: one a core, and no more than devices)", type=int,
        metavar="W")  # fmt: skip
    add("--ray", "train on Ray (RAY_ADDRESS: a cluster) instead of a process pool", action="store_true")
    add("--cache", "keep exported bundles here (default: in the user's cache)", type=Path, metavar="DIR")
    add("--work-dir", "where devices keep their states (default: a temporary folder)", type=Path,
        metavar="DIR")  # fmt: skip
    add("--output", "write results.jsonl and the plot here", type=Path, metavar="DIR")
    add("--plot", "draw accuracy and bytes over the rounds", type=Path, metavar="FILE.png")
    add_json_option(parser, "JSON lines, one a round, then the summary,")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulates and reports; 0 when at least one round was completed, else 1. Errors: EdgestillError."""
    from edgestill.simulation.run import simulate
    from edgestill.simulation.students import default_cache

    settings = settings_from(arguments)
    plot = _plot_path(arguments)
    lines: list[dict[str, Any]] = []
    with ExitStack() as stack:
        cache = arguments.cache or default_cache()
        work = arguments.work_dir
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgestill-simulate-")))
        output = None
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(
                (arguments.output / "results.jsonl").open("w", encoding="utf-8", buffering=1)
            )
        clock = time.monotonic
        since_s, rounds_s = clock(), []
        for line in simulate(settings, work, cache, _tell):
            lines.append(line)
            rounds_s.append(clock() - since_s)
            since_s = clock()
            if output is not None:
                output.write(json.dumps(line) + "\n")
            if arguments.json:
                print(json.dumps(line), flush=True)
            elif "round" in line:
                left_s = seconds_left(rounds_s, settings.rounds, settings.local_only)
                _tell(f"{describe_round(line)}; {describe_time(left_s)} left" if left_s else describe_round(line))
    summary = lines[-1]["summary"]
    if not arguments.json:
        print(describe_summary(summary))
    if plot is not None:
        from edgestill.simulation.plots import plot_simulation

        plot_simulation(lines, plot)
        _tell(f"wrote {plot}")
    return 0 if summary["rounds_completed"] else 1


def settings_from(arguments: argparse.Namespace) -> SimulationSettings:
    """Errors: UsageError for values that make no sense, alone or together."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(SimulationSettings)}
    given |= {"bundles": tuple(arguments.bundle or ()), "local_only": not arguments.no_local_only}
    return SimulationSettings(**given)


def seconds_left(rounds_s: Sequence[float], rounds: int, alone: bool) -> float:
    """What is left by the rounds so far, of which the first also exports; `alone` takes about as long once more."""
    mean_s = fmean(rounds_s[1:] or rounds_s)
    return mean_s * (rounds - len(rounds_s) + rounds * alone)


def describe_round(line: dict[str, Any]) -> str:
    """One round in a line for people."""
    if line["phase"] != "completed":
        return f"round {line['round']}: {line['phase']}: {line['reason']}"
    parts = [f"round {line['round']}: {line['accepted']} of {line['selected']} uploads"]
    parts += [f"{name.replace('t_', 'T_')} {line[name]:.1%}" for name in ("t_priv", "t_uni") if line[name]]
    if line["global_t_uni"] is not None:
        parts.append(f"global T_uni {line['global_t_uni']:.1%}")
    return ", ".join(parts)


def describe_summary(summary: dict[str, Any]) -> str:
    """The summary as a small table for people."""
    from edgestill.runtime.console import align

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    rows = [("", "T_priv", "T_uni")]
    rows.append(("federated", share(summary["t_priv"]), share(summary["t_uni"])))
    rows.append(("local only", share(summary["local_only_t_priv"]), share(summary["local_only_t_uni"])))
    rows.append(("global student", "–", share(summary["global_t_uni"])))
    if summary["best_round"] is not None:
        rows.append((f"its best, round {summary['best_round']}", "–", share(summary["best_global_t_uni"])))
    return "\n".join(
        [
            align(rows),
            "",
            f"bytes a device and round: {summary['bytes_up_per_device_round']} up, "
            f"{summary['bytes_down_per_device_round']} down, and {summary['setup_bytes_per_device']} once",
            f"{summary['trainings']} trainings, {summary['trainings_per_s']:.1f} a second",
            f"digest of the final global outputs {summary['digest']}",
        ]
    )


def _plot_path(arguments: argparse.Namespace) -> Path | None:
    path: Path | None = arguments.plot
    if path is None and arguments.output is None:
        return None
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        if path is None:
            return None  # nobody asked for one
        raise UsageError(
            "--plot needs matplotlib, which is not installed", "pip install 'edgestill[plots]'"
        ) from error
    if path is None:
        return arguments.output / "simulation.png"
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: not a .png file in a folder that exists", "give FOLDER/NAME.png")
    return path


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("the list is empty")
    return names


def _tell(text: str) -> None:
    print(f"simulate: {text}", file=sys.stderr, flush=True)
