"""`edgestill train`: trains a bundle on data, with checkpoints."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.commands.train_output import Output, summarise
from edgestill.runtime.console import add_image_options, add_json_option
from edgestill.runtime.data.augmentation import AUGMENTATIONS
from edgestill.runtime.data.classes import KnownClasses
from edgestill.runtime.data.dataset import (
    Dataset,
    Splits,
    digest_of_arrays,
    load_splits,
    load_transfer_samples,
)
from edgestill.runtime.data.notice import Notice, Notices
from edgestill.runtime.data.shares import hold_out
from edgestill.runtime.engines.registry import ENGINES, open_engine
from edgestill.runtime.errors import TrainingError, UsageError
from edgestill.runtime.machine import peak_rss_bytes
from edgestill.runtime.stop_signals import handling
from edgestill.runtime.training.batches import TransferSet
from edgestill.runtime.training.checkpoint import (
    check_same_classes,
    classes_of,
    load_checkpoint,
    load_named_state,
    load_state,
)
from edgestill.runtime.training.evaluation import evaluate
from edgestill.runtime.training.event_file import EventFile, figures_of
from edgestill.runtime.training.hyperparameters import (
    CHECKPOINT_EVERY,
    EPOCHS,
    HOLDOUT,
    HYPERPARAMETERS,
    TRANSFER_FRACTION,
)
from edgestill.runtime.training.plan import Run, TrainSettings, plan
from edgestill.runtime.training.schedule import SCHEDULES, Schedule
from edgestill.runtime.training.teacher import Teacher, in_order_of
from edgestill.runtime.training.trainer import StepRecord, prepare, train

_OPTIONS = {name: "lr" if name == "learning_rate" else name.replace("_", "-") for name in HYPERPARAMETERS}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train", help="train a bundle on this machine", description=__doc__)
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="a folder or .zip from `edgestill export`"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="NAME_OR_PATH",
        help="cifar10-mini, a CIFAR archive, an .npz, or a folder of images a class",
    )
    parser.add_argument(
        "--state",
        required=True,
        type=Path,
        metavar="FILE",
        help="where the state is kept (.safetensors); an unfinished run in it goes on",
    )
    parser.add_argument("--epochs", type=int, default=int(EPOCHS.default), metavar="N", help=EPOCHS.help)
    parser.add_argument(
        "--engine", choices=tuple(ENGINES), help="default: the first that works here and is in the bundle"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: the engine's own choice"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of order, augmentation, dropout, --holdout and --limit (0)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="train on N samples drawn by the seed")
    parser.add_argument(
        "--augment", default="", metavar="LIST", help=f"any of {','.join(AUGMENTATIONS)} (none)"
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="constant", help="of the learning rate (constant)"
    )
    parser.add_argument(
        "--warmup-steps", type=int, default=0, metavar="N", help="steps that climb to the full rate (0)"
    )
    for name, row in HYPERPARAMETERS.items():
        kind, metavar = (int, "N") if row.whole else (float, "X")
        parser.add_argument(f"--{_OPTIONS[name]}", dest=name, type=kind, metavar=metavar, help=row.help)
    parser.add_argument(
        "--alpha-end", type=float, metavar="X", help="alpha of the last step, reached in a straight line"
    )
    parser.add_argument("--teacher", metavar="BUNDLE[:STATE]", help="whose latents or logits to distill")
    parser.add_argument(
        "--transfer",
        metavar="NAME_OR_PATH",
        help="unlabelled samples to distill on besides the data, e.g. cifar100-transfer-mini",
    )
    parser.add_argument("--transfer-fraction", type=float, metavar="X", help=TRANSFER_FRACTION.help)
    parser.add_argument(
        "--init", type=Path, metavar="FILE", help="start from this state instead of the bundle's"
    )
    parser.add_argument(
        "--new-classes",
        action="store_true",
        help="with --init: the data's classes are others than that state's",
    )
    parser.add_argument("--restart", action="store_true", help="overwrite the run in --state")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=int(CHECKPOINT_EVERY.default),
        metavar="STEPS",
        help=CHECKPOINT_EVERY.help,
    )
    parser.add_argument(
        "--holdout",
        type=float,
        metavar="X",
        help="share of every class that tests the run where the data have no test split, 0 for none (0.1)",
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="write event files for TensorBoard")
    add_image_options(parser)
    add_json_option(parser, "JSON lines")
    parser.set_defaults(run=run)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Trains, goes on, or says that nothing is left to do; evaluates on the test split or on what it held out."""
    settings = settings_from(arguments)
    with ExitStack() as stack:
        bundle = stack.enter_context(Bundle.open(arguments.bundle))
        state_path = _usable_state_path(arguments.state, bundle)
        notices = Notices()
        splits = load_splits(
            arguments.data,
            bundle.input,
            bundle.classes,
            arguments.resize,
            bundle.more_inputs,
            known=_known_classes(arguments, bundle, state_path),
            skip_broken=arguments.skip_broken,
            tell=notices,
        )
        dataset, test = _with_test(arguments, splits, notices)
        if arguments.limit is not None:
            dataset = dataset.take(arguments.limit, arguments.seed)
        planned = _plan(arguments, bundle, dataset, settings, state_path, notices)
        engine = open_engine(bundle, arguments.engine, arguments.threads)
        stack.callback(engine.close)
        first_step = prepare(engine, planned, state_path, arguments.restart)
        output = Output(arguments.json, planned.total_steps)
        log = None
        if arguments.log_dir is not None:
            log = stack.enter_context(EventFile(_outside(arguments.log_dir, bundle)))
            log.begin(first_step + 1)
        output.start(first_step, planned, engine, state_path)
        times_ms: list[float] = []
        epoch: list[StepRecord] = []  # the present one
        with stop_requests() as requests:
            steps = train(
                engine,
                planned,
                state_path,
                first_step=first_step,
                checkpoint_every=arguments.checkpoint_every,
                should_stop=lambda: bool(requests),
            )
            try:
                for record in steps:
                    times_ms.append(record.ms)
                    if epoch and epoch[-1].epoch != record.epoch:
                        epoch.clear()
                    epoch.append(record)
                    if not output.step(record):  # whoever looked on has left, as a closed terminal does
                        requests.append(signal.SIGPIPE)
                    if log is not None:
                        log.add(record.step, figures_of(record))
            except TrainingError as error:
                raise TrainingError(error.message, _remedy(arguments, planned, bool(error.kept))) from error
            finally:
                output.end_progress()
        peak = peak_rss_bytes()
        result = None
        if test is not None:
            result = evaluate(engine, test, bundle.batch, bundle.classes)
            if log is not None:
                log.add(planned.total_steps, {"test/accuracy": result.accuracy, "test/loss": result.loss})
        summary = summarise(planned, engine, state_path, first_step, times_ms, epoch, peak, result)
        tested_on = None if test is None else "test split" if test is splits.test else "held out"
        output.summary(summary | {"tested_on": tested_on, "notices": notices.as_json()})
    return 0


def settings_from(arguments: argparse.Namespace) -> TrainSettings:
    """Errors: UsageError for options that make no sense together."""
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}", "give one sample or more")
    if arguments.transfer_fraction is not None and arguments.transfer is None:
        raise UsageError("--transfer-fraction without --transfer", "give the transfer set, too")
    given = {name: getattr(arguments, name) for name in HYPERPARAMETERS}
    fraction = arguments.transfer_fraction
    return TrainSettings(
        epochs=arguments.epochs,
        seed=arguments.seed,
        schedule=Schedule(arguments.schedule, arguments.warmup_steps),
        hyperparameters={name: value for name, value in given.items() if value is not None},
        augmentations=tuple(name for name in arguments.augment.split(",") if name),
        transfer_fraction=TRANSFER_FRACTION.default if fraction is None else fraction,
        alpha_end=arguments.alpha_end,
    )


def _with_test(
    arguments: argparse.Namespace, splits: Splits, notices: Notices
) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what tests the run: the test split, else a share of every class. Errors: UsageError."""
    share, whole = arguments.holdout, splits.train
    if splits.test is not None:
        if share is not None:
            raise UsageError(f"{arguments.data} has a test split, so nothing is held out", "leave --holdout out")
        return whole, splits.test
    if share == 0:
        return whole, None
    kept, held = hold_out(whole.labels, HOLDOUT if share is None else share, arguments.seed)
    if len(held) == 0:
        text = "too few samples of each class to hold any out, so nothing tests this run; --holdout 0.5 holds out half"
        notices(Notice("holdout", text))
        return whole, None
    if len(kept) == 0:
        raise UsageError(f"--holdout {share:g} holds all {len(held)} samples out", "give less, such as 0.1")
    return whole.select(kept), whole.select(held)


def _outside(folder: Path, bundle: Bundle) -> Path:
    if bundle.contains(folder):
        raise UsageError(f"--log-dir {folder} lies in the bundle, which holds only what its manifest lists",
                         "write the event files elsewhere")  # fmt: skip
    return folder


def _remedy(arguments: argparse.Namespace, planned: Run, kept: bool) -> str:
    """The same command anew at a tenth of the learning rate; into another file where --state keeps what was good."""
    dropped = ("--lr", "--state", "--restart") if kept else ("--lr", "--restart")
    words, given = [], iter(arguments.typed)
    for word in given:
        if word in dropped:
            if word != "--restart":
                next(given)
        elif word.partition("=")[0] not in dropped:
            words.append(word)
    words += ["--lr", f"{planned.hyperparameters['learning_rate'] / 10:g}"]
    words += ["--state", str(_free_beside(arguments.state))] if kept else ["--restart"]
    return shlex.join(["edgestill", *words])


def _free_beside(path: Path) -> Path:
    """The first of `NAME-2`, `NAME-3`, … that does not exist."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(name for name in names if not name.exists())


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that signals to end add themselves to, so that a step in progress ends first.

    A second one, of whichever kind, acts as it always did: who presses Ctrl-C twice does not want to wait.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)  # type: ignore[arg-type]

    with handling(note) as before:
        yield received


def _known_classes(arguments: argparse.Namespace, bundle: Bundle, state_path: Path) -> KnownClasses | None:
    """What the student's outputs mean already: as the bundle says, the run that goes on, or the state it starts from.

    Errors: UsageError, StateError.
    """
    if arguments.new_classes and arguments.init is None:
        raise UsageError("--new-classes without --init", "give the state to start from, too")
    own = classes_of(bundle)
    if arguments.init is not None and not arguments.new_classes:
        initial = load_named_state(arguments.init, bundle)[1]
        check_same_classes(arguments.init, initial.names, own.names)
        own = own or initial
    if own or arguments.restart or not state_path.exists():
        return own
    return KnownClasses(load_checkpoint(state_path, bundle).class_names, f"the state {state_path}")


def _plan(
    arguments: argparse.Namespace,
    bundle: Bundle,
    dataset: Dataset,
    settings: TrainSettings,
    state_path: Path,
    notices: Notices,
) -> Run:
    initial_state = None if arguments.init is None else load_state(arguments.init, bundle)
    if arguments.teacher is None:
        if arguments.transfer is not None:
            raise UsageError("--transfer without --teacher", "a transfer set needs a teacher's outputs on it")
        return plan(bundle, dataset, settings, initial_state=initial_state)
    teacher = Teacher(arguments.teacher, bundle, arguments.engine, arguments.threads)
    try:
        cache = state_path.with_suffix(".teacher.safetensors")
        digest = digest_of_arrays(*dataset.samples)
        names = dataset.class_names or bundle.class_names
        outputs = teacher.outputs(dataset.images, digest, cache, dataset.more)
        outputs = in_order_of(outputs, teacher.classes, bundle, names)
        transfer, origins = None, {"teacher": teacher.digest, "transfer": None}
        if arguments.transfer is not None:
            images, *others = load_transfer_samples(
                arguments.transfer,
                bundle.input,
                arguments.resize,
                bundle.more_inputs,
                skip_broken=arguments.skip_broken,
                tell=notices,
            )
            more = tuple(others)
            origins["transfer"] = digest_of_arrays(images, *more)
            cache = state_path.with_suffix(".teacher-transfer.safetensors")
            on_transfer = teacher.outputs(images, origins["transfer"], cache, more)
            transfer = TransferSet(images, in_order_of(on_transfer, teacher.classes, bundle, names), more)
    finally:
        teacher.close()
    return plan(
        bundle,
        dataset,
        settings,
        teacher=outputs,
        transfer=transfer,
        initial_state=initial_state,
        origins=origins,
    )


def _usable_state_path(path: Path, bundle: Bundle) -> Path:
    if bundle.contains(path):
        raise UsageError(f"--state {path} lies in the bundle, which holds only what its manifest lists",
                         "keep the state elsewhere")  # fmt: skip
    if path.is_dir():
        raise UsageError(f"--state {path} is a folder", "give a file name such as state.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--state {path}: {error.strerror or error}", "give a file that can be written"
        ) from error
    return path
