"""Take part in a federation: train on this device's own data, exchange outputs with a coordinator, round by round."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.commands.events import EventOutput
from edgestill.runtime.console import add_image_options, add_json_option
from edgestill.runtime.data.notice import Notice
from edgestill.runtime.device.address import check_url
from edgestill.runtime.device.assignment import fetch_assignment
from edgestill.runtime.device.authority import fetch_authority
from edgestill.runtime.device.client import HttpCoordinator
from edgestill.runtime.device.conditions import Conditions, read_status
from edgestill.runtime.device.device import Device, Watch
from edgestill.runtime.device.enrolment import LONGEST_NAME, check_code, device_info, enrol, installation_hint
from edgestill.runtime.device.journal import WorkFolder
from edgestill.runtime.device.local_round import Equipment, Options, Privacy, warn_of_noise
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.device.outputs import PRECISIONS
from edgestill.runtime.device.private_data import PrivateSettings, find_known_classes, load_private
from edgestill.runtime.device.round_log import RoundLog
from edgestill.runtime.engines.registry import (
    ENGINES,
    Engine,
    engine_status,
    open_engine,
)
from edgestill.runtime.errors import EngineError, Interrupted, UsageError
from edgestill.runtime.machine import memory_bytes, peak_rss_bytes
from edgestill.runtime.stop_signals import handling

_MEGABYTE = 10**6


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("join", help="take part in a coordinator's rounds", description=__doc__)
    parser.add_argument(
        "url", nargs="?", metavar="URL", help="the coordinator, http://HOST:PORT; known to an enrolled device"
    )
    parser.add_argument(
        "--discover", action="store_true", help="look for the coordinator on the local network instead (mDNS)"
    )
    parser.add_argument(
        "--code",
        nargs="?",
        const="",
        metavar="CODE",
        help="from `edgestill enrol`; needed once for a --work-dir",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("edgestill-device"),
        metavar="DIR",
        help="token, journal, student and downloads (edgestill-device)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help=f"shown to the coordinator, at most {LONGEST_NAME} characters "
        "(the host's name and four characters of chance)",
    )
    parser.add_argument("--ca-cert", type=Path, metavar="FILE", help="certificates to trust instead, PEM")

    data = parser.add_argument_group("private data")
    data.add_argument(
        "--data",
        required=True,
        metavar="NAME_OR_PATH",
        help="cifar10-mini, a CIFAR archive, an .npz, or a folder of images a class",
    )
    add_image_options(data)
    data.add_argument(
        "--share", metavar="K/N", help="only device K's Dirichlet share of the data among N devices"
    )
    data.add_argument("--gamma", type=float, metavar="G", help="concentration of that share (0.5)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of share and tests (0)")
    data.add_argument(
        "--test",
        metavar="NAME_OR_PATH",
        help="labelled samples that nobody trains on; default: the data's test split, else a fifth of the share",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--engine", choices=tuple(ENGINES), help="default: the first that works here and is in the bundle"
    )
    training.add_argument("--threads", type=int, default=0, metavar="N", help="default: the engine's choice")
    training.add_argument(
        "--memory",
        type=float,
        metavar="MB",
        help="what training may take; decides the student (default: all)",
    )
    training.add_argument(
        "--compare-alone",
        action="store_true",
        help="also train a copy on this device's data alone, and tell both accuracies: twice the work",
    )
    training.add_argument("--precision", choices=PRECISIONS, help="of uploads; default: the task's")

    privacy = parser.add_argument_group("privacy (docs/privacy.md)")
    privacy.add_argument(
        "--privacy-clip", type=float, metavar="C", help="largest L2 norm of a sample's outputs"
    )
    privacy.add_argument(
        "--noise-multiplier", type=float, metavar="Z", help="Gaussian noise in units of the sensitivity"
    )
    privacy.add_argument("--delta", type=float, default=1e-5, metavar="D", help="for epsilon (1e-05)")
    privacy.add_argument(
        "--share-class-counts",
        action=argparse.BooleanOptionalAction,
        help="tell how many samples of each class there are (default: unless there is noise)",
    )

    defaults = Conditions()
    gate = parser.add_argument_group("conditions for training")
    gate.add_argument(
        "--min-battery",
        type=float,
        default=defaults.minimum_battery,
        metavar="SHARE",
        help=f"charge, 0 to 1, unless charging ({defaults.minimum_battery})",
    )
    gate.add_argument(
        "--max-temperature",
        type=float,
        default=defaults.maximum_temperature_c,
        metavar="C",
        help=f"of the hottest sensor, in degrees Celsius ({defaults.maximum_temperature_c})",
    )
    gate.add_argument(
        "--min-memory",
        type=float,
        metavar="MB",
        help=f"free memory ({round(defaults.minimum_memory_bytes / _MEGABYTE)}, or an eighth of a small machine's)",
    )
    gate.add_argument("--allow-metered", action="store_true", help="take part over a metered network, too")
    gate.add_argument("--ignore-conditions", action="store_true", help="train whatever the device says")

    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="write event files for TensorBoard")
    parser.add_argument("--once", action="store_true", help="leave after one round")
    add_json_option(parser, "events as JSON lines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Takes part until the task is finished, a signal comes, or with --once one round is over.

    1 with --once when that round was not uploaded.
    """
    options, conditions = options_from(arguments), conditions_from(arguments)
    output = EventOutput(arguments.json)
    with ExitStack() as stack:
        watch: Watch = output
        if arguments.log_dir is not None:
            watch = log = RoundLog(arguments.log_dir, output)
            stack.callback(log.close)
        keep = WorkFolder(arguments.work_dir)
        stack.callback(keep.close)
        identity = keep.identity()
        if identity is not None and arguments.code is not None:
            output(
                "warning",
                message=f"--code is not used: {arguments.work_dir} is enrolled already, as {identity['device']}; "
                "another device needs another --work-dir",
            )
        url = _address(arguments, None if identity is None else identity["url"], output)
        coordinator = HttpCoordinator(url, ca_cert=_trusted(arguments, url, keep, identity is not None))
        stack.callback(coordinator.close)
        if identity is None:
            identity = enrol(arguments, url, coordinator, keep)
            output("enrolled", device=identity["device"], task=identity["task"], name=identity["name"])
        else:
            coordinator.use_token(identity["token"])
            with suppress(EngineError):  # which engine is missing is said better once the student is known
                coordinator.inform(device_info(arguments, identity.get("name")))
        assignment = fetch_assignment(coordinator, keep)
        bundle = stack.enter_context(Bundle.open(assignment.bundle_path))
        for path in keep.other_students(bundle):
            notice = Notice(
                "student",
                f"this device gets {bundle.student.name} for its engines and memory; what it trained before stays in "
                f"{path}",
                {"student": bundle.student.name, "before": str(path)},
            )
            output("notice", **notice.as_json())
        engine = open_task_engine(bundle, arguments.engine, arguments.threads)
        stack.callback(engine.close)
        known = find_known_classes(assignment.task, bundle)
        transfer = None if assignment.transfer_path is None else Transfer.load(assignment.transfer_path)
        wanted = PrivateSettings(**{one.name: getattr(arguments, one.name) for one in fields(PrivateSettings)})
        private, tests = load_private(
            wanted, bundle, known, lambda notice: output("notice", **notice.as_json()), transfer
        )
        student = (assignment.bundle_path, keep.student_path(bundle))
        device = Device(
            name=identity["device"],
            coordinator=coordinator,
            keep=keep,
            equipment=Equipment(assignment.task, bundle, engine, private, transfer, tests, options),
            conditions=conditions,
            read_status=read_status,
            peak_rss_bytes=peak_rss_bytes,
            watch=watch,
            bytes_down=assignment.bytes_down,
            needed_blobs=assignment.digests,
        )
        output(
            "assigned",
            task=identity["task"],
            device=identity["device"],
            student=bundle.student.name,
            engine=engine.name,
            samples=len(private),
            tests={name: len(dataset) for name, dataset in tests.items()},
        )
        if (warning := warn_of_noise(device.equipment)) is not None:
            output("warning", message=warning)
        before = device.participant.completed
        with stop_requests(lambda: device.training) as requests:
            device.stop_requested = lambda: bool(requests) or output.lost
            try:
                device.run(1 if arguments.once else None)
            except KeyboardInterrupt as error:
                output.summary(device, device.participant.completed - before, *student)
                raise Interrupted(
                    f"stopped; {arguments.work_dir} says where this device stands",
                    "run the same command again to go on",
                ) from error
            except Interrupted:
                output.summary(device, device.participant.completed - before, *student)
                raise
            finally:
                output.end_progress()
        uploaded = device.participant.completed - before
        output.summary(device, uploaded, *student)
    return 1 if arguments.once and not uploaded else 0


def options_from(arguments: argparse.Namespace) -> Options:
    """Errors: UsageError for options that make no sense together."""
    clip, noise = arguments.privacy_clip, arguments.noise_multiplier
    if (clip is None) != (noise is None):
        raise UsageError("--privacy-clip and --noise-multiplier go together", "give both, or neither")
    privacy = None
    if clip is not None:
        if not (0 < clip < float("inf") and 0 <= noise < float("inf") and 0 < arguments.delta < 1):
            raise UsageError(
                f"clip {clip}, noise multiplier {noise}, delta {arguments.delta} are out of range",
                "give a clip above 0, a multiplier of 0 or more, and a delta between 0 and 1",
            )
        privacy = Privacy(clip, noise, arguments.delta)
    if arguments.gamma is not None and arguments.share is None:
        raise UsageError("--gamma without --share", "give --share K/N, too")
    counts = arguments.share_class_counts
    return Options(
        arguments.precision,
        privacy,
        privacy is None if counts is None else counts,
        compare_alone=arguments.compare_alone,
    )


def conditions_from(arguments: argparse.Namespace) -> Conditions | None:
    """None with --ignore-conditions. Errors: UsageError."""
    if arguments.ignore_conditions:
        return None
    if arguments.min_memory is not None and not 0 <= arguments.min_memory < 1e9:
        raise UsageError(f"--min-memory {arguments.min_memory}", "give megabytes, 0 or more")
    least_bytes = Conditions().minimum_memory_bytes
    if arguments.min_memory is not None:
        least_bytes = int(arguments.min_memory * _MEGABYTE)
    elif (whole := memory_bytes()) is not None:  # a container of 200 MB never has 256 MiB free
        least_bytes = min(least_bytes, whole // 8)
    return Conditions(
        minimum_battery=arguments.min_battery,
        maximum_temperature_c=arguments.max_temperature,
        minimum_memory_bytes=least_bytes,
        allow_metered=arguments.allow_metered,
    )


def open_task_engine(bundle: Bundle, name: str | None, threads: int) -> Engine:
    """`open_engine` on the student that the coordinator gave, in words for who has this device, not its bundle.

    Errors: UsageError, EngineError.
    """
    student, known = bundle.student.name, [engine for engine in bundle.engines if engine in ENGINES]
    statuses = {engine: engine_status(engine) for engine in known}
    if name is not None and name not in known:
        usable = [engine for engine in known if statuses[engine].usable]
        raise UsageError(
            f"this task's student {student} has no graphs for --engine {name}, only for {', '.join(known)}",
            f"leave --engine out: {usable[0]} works here" if usable else installation_hint(statuses.values()),
        )
    wanted = known if name is None else [name]
    if not any(statuses[engine].usable for engine in wanted):
        reasons = "; ".join(f"{engine}: {statuses[engine].reason}" for engine in wanted)
        raise EngineError(
            f"no engine of this task's student {student} works here ({reasons})",
            installation_hint(statuses[engine] for engine in wanted),
        )
    return open_engine(bundle, name, threads)


@contextmanager
def stop_requests(is_training: Callable[[], bool]) -> Iterator[list[int]]:
    """A list that signals to end add themselves to, so that a training step ends and leaves a checkpoint.

    Outside of training, and at a second signal, they interrupt at once: the journal holds at any moment.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1 or not is_training():
            raise KeyboardInterrupt

    with handling(note):
        yield received


def _trusted(arguments: argparse.Namespace, url: str, keep: WorkFolder, enrolled: bool) -> Path | None:
    """The file of certificates to trust; None for the system's. Errors: those of `check_code`, `fetch_authority`."""
    if arguments.ca_cert is not None:
        return arguments.ca_cert
    if not enrolled and arguments.code is not None:
        _, wanted = check_code(arguments.code)
        if wanted is not None:
            keep.write_authority(fetch_authority(url, wanted))
        elif (left := keep.authority()) is not None:  # by a code that came to nothing
            left.unlink()
    return keep.authority()


def _address(arguments: argparse.Namespace, known: str | None, output: EventOutput) -> str:
    if arguments.discover and arguments.url is not None:
        raise UsageError("a URL and --discover", "give one of them")
    if arguments.url is not None:
        return check_url(arguments.url)
    if not arguments.discover:
        if known is None:
            raise UsageError("which coordinator?", "give its URL, or --discover")
        return known
    from edgestill.runtime.device.discovery import find_one

    found = find_one()
    output("found", name=found.name, url=found.url)
    if known is not None and found.url != known:
        # an announcement proves nothing, and whoever gets the token is this device from then on
        raise UsageError(
            f"{found.name} announced {found.url}; this device is enrolled at {known}",
            f"if the coordinator has moved there, say so: `edgestill join {found.url} --data {quote(arguments.data)} "
            f"--work-dir {quote(str(arguments.work_dir))}`",
        )
    return found.url
