"""Enrolment, assignment, waiting for work, reports."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from edgestill.coordinator.http.auth import device_of
from edgestill.coordinator.http.context import Context, context_of, jittered_s
from edgestill.coordinator.http.problem_responses import problems
from edgestill.coordinator.http.routes.bodies import describe_body, json_body
from edgestill.coordinator.http.routes.forms import (
    Assignment,
    Enrolled,
    Enrolment,
    Info,
    Report,
    Standing,
    Status,
    Work,
)

router = APIRouter(prefix="/v1", tags=["devices"])
Shared = Annotated[Context, Depends(context_of)]
Device = Annotated[Any, Depends(device_of)]

_LONGEST_WAIT_S = 300.0
_COME_BACK_S = 1.0
_BODY = ("malformed", "too_large", "invalid")


@router.post(
    "/enrol", status_code=201, response_model=Enrolled,
    responses=problems(*_BODY, "code_refused", "task_finished"), openapi_extra=describe_body(Enrolment),
)  # fmt: skip
async def enrol(context: Shared, body: Annotated[Enrolment, Depends(json_body(Enrolment))]) -> dict[str, Any]:
    """Turns a one-time code into a device's name and token."""
    return await context.call(context.service.enrol, body.code, body.device.model_dump())


@router.get(
    "/authorities/{fingerprint}", response_class=Response, responses={
        200: {"description": "the certificate", "content": {"application/pem-certificate-chain": {}}},
        **problems("not_found"),
    },
)  # fmt: skip
async def authority(
    context: Shared, fingerprint: Annotated[str, Path(description="20 letters, from an enrolment code")]
) -> Response:
    """The certificate of a task's own authority, for a device that knows it by the fingerprint in its code."""
    certificate = await context.call(context.service.authority, fingerprint)
    return Response(certificate, media_type="application/pem-certificate-chain")


@router.put(
    "/info", status_code=204, openapi_extra=describe_body(Info), responses=problems(*_BODY, "unauthorised")
)  # fmt: skip
async def inform(
    context: Shared, device: Device, body: Annotated[Info, Depends(json_body(Info))]
) -> Response:
    """What the device says about itself now; it decides the student of a device that has none yet."""
    await context.call(context.service.inform, device, body.model_dump())
    return Response(status_code=204)


@router.get(
    "/assignment", response_model=Assignment, responses=problems("unauthorised", "no_fitting_student")
)
async def assignment(context: Shared, device: Device) -> dict[str, Any]:
    """The device's task and the largest student that fits its engines and memory."""
    return await context.call(context.service.assignment, device)


@router.post(
    "/work", response_model=Work, openapi_extra=describe_body(Status),
    responses={
        204: {"description": "no work yet: ask again after `Retry-After` seconds"},
        **problems(*_BODY, "unauthorised", "task_finished", "no_fitting_student"),
    },
)  # fmt: skip
async def work(
    request: Request,
    context: Shared,
    device: Device,
    body: Annotated[Status, Depends(json_body(Status))],
    wait_s: Annotated[float, Query(ge=0, le=_LONGEST_WAIT_S, allow_inf_nan=False)] = 0.0,
) -> Any:
    """The round that the device is selected for; waits for one up to `wait_s`, or the coordinator's own limit."""
    until_s = time.monotonic() + min(wait_s, context.settings.long_poll_s)
    status = body.model_dump()
    gone: asyncio.Task[None] | None = None
    try:
        while True:
            event = context.waiting.event(device.task)
            found = await context.call(context.service.ask, device, status)
            left_s = until_s - time.monotonic()
            if found is not None:
                return found
            if left_s <= 0 or context.stopping:
                return Response(status_code=204, headers={"Retry-After": str(jittered_s(_COME_BACK_S))})
            gone = gone or asyncio.create_task(_disconnected(request))
            with context.metrics.waiting.track_inprogress():
                if await _wait(event, gone, left_s):
                    # nobody is there to be selected
                    return Response(status_code=204)
    finally:
        if gone is not None:
            gone.cancel()


@router.get("/standing", response_model=Standing, responses=problems("unauthorised"))
async def standing(context: Shared, device: Device) -> dict[str, Any]:
    """How far the present round of the device's task is: what a device that has uploaded waits for."""
    return await context.call(context.service.standing, device)


@router.put(
    "/rounds/{round}/devices/{device}/report", status_code=204, openapi_extra=describe_body(Report),
    responses=problems(*_BODY, "unauthorised", "foreign_device", "no_such_round"),
)  # fmt: skip
async def report(
    context: Shared,
    caller: Device,
    round: str,
    device: str,
    body: Annotated[Report, Depends(json_body(Report))],
) -> Response:
    """What the round did on the device; the last report wins."""
    sent = body.model_dump(exclude_none=True)
    await context.call(context.service.report, caller, round, device, sent)
    return Response(status_code=204)


async def _disconnected(request: Request) -> None:
    """Ends when the client hangs up; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _wait(event: asyncio.Event, gone: asyncio.Task[None], timeout_s: float) -> bool:
    """Waits for the event, the end of the connection or the time; whether the client is gone."""
    woken = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((woken, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        woken.cancel()
    return gone.done()
