"""Where trainings run: in this process, in a pool of processes, or on Ray; results come in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from edge_runtime.errors import UsageError

# Every worker computes on one thread: workers are the parallelism, and sums over more threads than one may
# come in another order on another machine.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Pool(Protocol):
    """Runs a function of this package's on many jobs."""

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the jobs. Errors: the first one of a job."""


class _Here:
    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(function, list(jobs))


class _Processes:
    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return self._executor.map(function, jobs)


class _Ray:
    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        remote = self._ray.remote(num_cpus=1)(function)
        references = [remote.remote(job) for job in jobs]
        return (self._ray.get(reference) for reference in references)


@contextmanager
def open_pool(workers: int, ray: bool) -> Iterator[Pool]:
    """A pool that is closed with its block; one worker without Ray means this process.

    Errors: UsageError when Ray is asked for and not installed.
    """
    if ray:
        yield from _open_ray(workers)
    elif workers == 1:
        yield _Here()
    else:
        # spawn: engines hold threads, which a forked process would lose
        context = multiprocessing.get_context("spawn")
        with _environment(ONE_THREAD), ProcessPoolExecutor(workers, mp_context=context) as executor:
            try:
                yield _Processes(executor)
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise


def _open_ray(workers: int) -> Iterator[Pool]:
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray, which is not installed", "pip install 'edgestill[ray]'") from error
    # RAY_ADDRESS names a cluster; without it Ray starts on this machine with as many workers as are asked for
    cpus = None if os.environ.get("RAY_ADDRESS") else workers
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": ONE_THREAD})  # fmt: skip
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
