"""The global model of a task and its bundle, for whoever runs the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.responses import StreamingResponse

from edgestill.coordinator.http.auth import check_keeper
from edgestill.coordinator.http.context import Context, context_of
from edgestill.coordinator.http.problem_responses import problems
from edgestill.coordinator.http.routes.blobs import matches
from edgestill.coordinator.model import body_of, find_model, model_student, task_of
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.store.blobs import CHUNK_BYTES
from edgestill.coordinator.task.task import TASK_NAME

router = APIRouter(prefix="/v1", tags=["operations"], dependencies=[Depends(check_keeper)])
Shared = Annotated[Context, Depends(context_of)]
Name = Annotated[str, Path(pattern=f"^{TASK_NAME.pattern}$", description="a task")]
Known = Annotated[str | None, Header(alias="If-None-Match")]
_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES = {304: {"description": "the client has it already"}}
_PROBLEMS = problems("unauthorised", "token_not_set", "no_such_task", "no_model", "invalid", "unavailable")
_MEDIA_TYPE = "application/octet-stream"


async def _take_place(context: Shared) -> AsyncIterator[None]:
    """A place among the models that are in memory at once, until the answer is sent. Errors: Problem `unavailable`."""
    if not context.model_places:
        raise Problem("unavailable", "as many models are being downloaded as may be at once", retry_after_s=5)
    context.model_places -= 1
    try:
        yield
    finally:
        context.model_places += 1


@router.get(
    "/tasks/{task}/model", response_class=Response, dependencies=[Depends(_take_place)],
    responses={200: {"description": "a state of the bundle, safetensors", **_BINARY}, **_RESPONSES, **_PROBLEMS},
)  # fmt: skip
async def model(
    context: Shared,
    task: Name,
    round: Annotated[
        str | None, Query(pattern="^(best|last|[1-9][0-9]{0,8})$", description="`best`, `last` or a number")
    ] = None,
    if_none_match: Known = None,
) -> Response:
    """The global model after a round; where none is named, after the best by the task's validation images, or the
    last."""
    found = await context.call(find_model, context.service, task, round)
    headers = _headers(found.file_name, found.mark)
    if matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    body = memoryview(await context.call_alone(body_of, context.service, found))

    async def chunks() -> AsyncIterator[memoryview]:  # so that what a slow client has not taken is not copied
        for start in range(0, len(body), CHUNK_BYTES):
            yield body[start : start + CHUNK_BYTES]

    headers |= {"Content-Length": str(len(body))}
    return StreamingResponse(chunks(), media_type=_MEDIA_TYPE, headers=headers)


@router.get(
    "/tasks/{task}/bundle", response_class=Response,
    responses={
        200: {"description": "the bundle that the model is a state of, a .zip", **_BINARY}, **_RESPONSES, **_PROBLEMS,
    },
)  # fmt: skip
async def bundle(context: Shared, task: Name, if_none_match: Known = None) -> Response:
    """The bundle with which the model predicts and trains on."""
    student = model_student(await context.call(task_of, context.service, task))
    headers = _headers(f"{task}-bundle.zip", student.bundle)
    if matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    chunks = await context.call(context.service.blobs.open_range, student.bundle)
    headers |= {"Content-Length": str(student.size_bytes)}
    return StreamingResponse(chunks, media_type=_MEDIA_TYPE, headers=headers)


def _headers(file_name: str, mark: str) -> dict[str, str]:
    return {
        "Content-Disposition": f'attachment; filename="{file_name}"',
        "ETag": f'"{mark}"',
        "Cache-Control": "private, no-cache",
        "Vary": "Authorization, Cookie",
        "X-Content-Type-Options": "nosniff",
    }
