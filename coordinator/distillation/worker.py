"""Step 5 in a process of its own: a crash, a leak or an engine that never returns cannot take the coordinator down.

The parent starts `python -m edgestill.coordinator.distillation.worker`, writes one line of JSON to its stdin
(settings and job; not to the command line, where others could read a database's password) and keeps stdin open: when
it closes, the worker ends, so that none outlives its coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO

from edgestill.coordinator.distillation.loop import RunJob
from edgestill.coordinator.http.context import Context
from edgestill.coordinator.opening import is_shared, open_service, start_logging
from edgestill.coordinator.service import Job
from edgestill.coordinator.settings import Settings, load_settings

_LOG = logging.getLogger("coordinator")
_MODULE = "edgestill.coordinator.distillation.worker"
_KEPT_OUTPUT_BYTES = 2000


def runner_for(settings: Settings, command: tuple[str, ...] = (sys.executable, "-m", _MODULE)) -> RunJob:
    """Runs steps in worker processes; in a thread where no other process could see the store."""
    if not is_shared(settings):
        return run_in_thread

    async def run(context: Context, job: Job) -> None:
        await run_in_process(context, job, command)

    return run


async def run_in_thread(context: Context, job: Job) -> None:
    """Runs the step in this process, for a store in memory."""
    with tempfile.TemporaryDirectory(prefix="edgestill-distillation-") as folder:
        await context.call(context.service.run_job, job, Path(folder))
    context.metrics.steps.labels("ended").inc()


async def run_in_process(context: Context, job: Job, command: tuple[str, ...]) -> None:
    """Runs the step in a worker; one that fails, dies or is late ends the round with the reason."""
    with tempfile.TemporaryDirectory(prefix="edgestill-distillation-") as folder:
        order = {
            "settings": context.settings.as_json(secrets=True),
            "job": dataclasses.asdict(job),
            "folder": folder,
        }
        reason = await _work(
            json.dumps(order).encode() + b"\n", command, job.seconds_left(context.service.clock())
        )
    if reason is not None:
        _LOG.error("step 5 of %s: %s", job.round_name, reason)
        await context.call(context.service.fail_job, job, reason)
    context.metrics.steps.labels("ended" if reason is None else "failed").inc()


async def _work(order: bytes, command: tuple[str, ...], timeout_s: float) -> str | None:
    """None when the worker has done its work, else why not."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stderr is not None
    said = asyncio.create_task(_last_bytes(process.stderr))
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(order)
            await process.stdin.drain()
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        return f"took longer than {timeout_s:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process.stdin.close()
        lines = (await said).decode(errors="replace").strip().splitlines()
    if code == 0:
        return None
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return f"the worker {how}" + (f": {lines[-1][:300]}" if lines else "")


async def _last_bytes(stream: asyncio.StreamReader) -> bytes:
    """Reads all, so that the worker never waits for us, hands it on, and keeps the end."""
    kept = b""
    while chunk := await stream.read(4096):
        sys.stderr.write(chunk.decode(errors="replace"))
        kept = (kept + chunk)[-_KEPT_OUTPUT_BYTES:]
    sys.stderr.flush()
    return kept


def main(stdin: BinaryIO | None = None) -> int:
    """The worker: reads its order, runs step 5, and says on stderr why it could not."""
    stdin = stdin or sys.stdin.buffer
    order: dict[str, Any] = json.loads(stdin.readline())
    threading.Thread(target=_end_with, args=(stdin.fileno(),), daemon=True).start()
    settings = load_settings({k: v for k, v in order["settings"].items() if v is not None})
    start_logging(settings)
    service = open_service(settings)
    service.run_job(Job(**order["job"]), Path(order["folder"]))
    return 0


def _end_with(descriptor: int) -> None:
    # not through sys.stdin: its lock, held by this thread at the interpreter's end, would abort the process
    while os.read(descriptor, 4096):
        pass
    os._exit(3)


if __name__ == "__main__":
    raise SystemExit(main())
