"""Where trainings run: in this process, in a pool of processes, or on Ray; results come in the order of the jobs.

A job names files only by what `Pool.share` gave for them, so that it runs where none of this machine's folders is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgestill.runtime.errors import EdgestillError, UsageError
from edgestill.runtime.files import write_atomically

# Every worker computes on one thread: workers are the parallelism, and sums over more threads than one may
# come in another order on another machine.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SECONDS_TO_END = 5.0
"""What a worker that is told to end has to close what it has open."""
JOBS_A_WORKER = 4
"""How many jobs a worker has waiting: enough to be never idle, few enough to hold ten thousand devices' states."""


class SharedFile(Protocol):
    """A file that workers can read; hashable."""

    def path(self, folder: Path) -> Path:
        """Where it lies, if need be as a copy in `folder`."""


class Pool(Protocol):
    """Runs a function of this package's on many jobs."""

    def share(self, path: Path) -> SharedFile:
        """What stands for a file in jobs. Errors: UsageError for a folder that cannot travel."""

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the jobs, which are taken as they are needed. Errors: the first one of a job."""


@dataclass(frozen=True)
class LocalFile:
    """A file that workers see where it lies."""

    where: Path

    def path(self, folder: Path) -> Path:
        return self.where


@dataclass(frozen=True)
class RayFile:
    """A file in Ray's object store: `reference` to its bytes."""

    name: str
    reference: Any

    def path(self, folder: Path) -> Path:
        import ray

        target = folder / f"{self.reference.hex()}-{self.name}"
        if not target.exists():
            write_atomically(target, [ray.get(self.reference)])
        return target


class _Here:
    def share(self, path: Path) -> SharedFile:
        return LocalFile(path)

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(function, jobs)


class _Processes:
    def __init__(self, executor: ProcessPoolExecutor, workers: int) -> None:
        self._executor, self._workers = executor, workers

    def share(self, path: Path) -> SharedFile:
        return LocalFile(path)

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        submitted = (submit(self._executor, function, job) for job in jobs)
        return (future.result() for future in _ahead(submitted, JOBS_A_WORKER * self._workers))


class _Ray:
    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def share(self, path: Path) -> SharedFile:
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder, which does not travel to Ray's workers",
                "give an archive or an .npz file",
            )
        return RayFile(path.name, self._ray.put(np.fromfile(path, np.uint8)))

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        remote = self._ray.remote(num_cpus=1)(function)
        submitted = (remote.remote(job) for job in jobs)
        return (self._ray.get(reference) for reference in _ahead(submitted, JOBS_A_WORKER * self._workers))


def _ahead(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items in their order, each handed out once `count` more have been taken."""
    taken: deque[Any] = deque()
    for item in items:
        taken.append(item)
        if len(taken) > count:
            yield taken.popleft()
    yield from taken


@contextmanager
def open_pool(workers: int, ray: bool) -> Iterator[Pool]:
    """A pool that is closed with its block; one worker without Ray means this process.

    Errors: UsageError when Ray is asked for and not installed, EdgestillError when its cluster does not answer.
    """
    if ray:
        yield from _open_ray(workers)
    elif workers == 1:
        yield _Here()
    else:
        with worker_processes(workers) as executor:
            yield _Processes(executor, workers)


@contextmanager
def worker_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compute on one thread each and end with this one, however it ends.

    An error or Ctrl-C in the block ends them at once, whatever they are at.
    """
    # spawn: engines hold threads, which a forked process would lose
    context = multiprocessing.get_context("spawn")
    with (
        _environment(ONE_THREAD),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as executor,
    ):
        try:
            yield executor
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            executor.shutdown(cancel_futures=True)
            raise


def submit(executor: Executor, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A job for one of the `worker_processes`. Its errors: the function's; EdgestillError where the worker is ended."""
    return executor.submit(_run, function, arguments)


_ending = False
"""Whether this worker has been told to end: it takes no more jobs, and leaves as it would at the end of its work."""


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        if not _ending:
            return function(*arguments)
    except SystemExit:
        pass  # of `_end`: an executor would carry it to the parent and end that, too
    raise EdgestillError("the worker process was told to end", "run the same command again")


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(signum: int, frame: Any) -> None:
    """Leaves the job, which closes and removes what it has opened, or the process if that takes long."""
    global _ending
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _ending = True
    timer = threading.Timer(SECONDS_TO_END, os._exit, (1,))
    timer.daemon = True
    timer.start()
    raise SystemExit(1)


def _open_ray(workers: int) -> Iterator[Pool]:
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray, which is not installed", "pip install 'edgestill[ray]'") from error
    # RAY_ADDRESS names a cluster; without it Ray starts on this machine with as many workers as are asked for, and
    # does not look for a cluster that somebody started here, or that is gone and left its address behind
    where = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "num_cpus": workers}
    try:
        ray.init(**where, include_dashboard=False, log_to_driver=False,
                 runtime_env={"env_vars": ONE_THREAD})  # fmt: skip
    except ConnectionError as error:
        raise EdgestillError(
            f"--ray: {error}",
            "start the cluster that RAY_ADDRESS names, and give its RAY_AUTH_TOKEN if it has one",
        ) from error
    try:
        yield _Ray(ray)
    finally:
        ray.shutdown()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that processes started in this block inherit, unless they are set already."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
