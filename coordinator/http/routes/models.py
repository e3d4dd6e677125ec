"""The global model of a task and its bundle, for whoever runs the coordinator."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import StreamingResponse

from edgestill.coordinator.http.auth import check_operator
from edgestill.coordinator.http.context import Context, context_of
from edgestill.coordinator.http.problem_responses import problems
from edgestill.coordinator.model import global_model, model_student, task_of
from edgestill.coordinator.task.task import TASK_NAME

router = APIRouter(prefix="/v1", tags=["operations"], dependencies=[Depends(check_operator)])
Shared = Annotated[Context, Depends(context_of)]
Name = Annotated[str, Path(pattern=f"^{TASK_NAME.pattern}$", description="a task")]
_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_PROBLEMS = problems("unauthorised", "no_such_task", "no_model", "invalid")
_MEDIA_TYPE = "application/octet-stream"


@router.get(
    "/tasks/{task}/model", response_class=Response,
    responses={200: {"description": "a state of the bundle, safetensors", **_BINARY}, **_PROBLEMS},
)  # fmt: skip
async def model(
    context: Shared,
    task: Name,
    round: Annotated[
        str | None, Query(pattern="^(best|last|[1-9][0-9]{0,8})$", description="`best`, `last` or a number")
    ] = None,
) -> Response:
    """The global model after a round; where none is named, after the best by the task's validation images, or the
    last."""
    found = await context.call(global_model, context.service, task, round)
    digest = hashlib.sha256(found.body).hexdigest()
    return Response(found.body, media_type=_MEDIA_TYPE, headers=_headers(found.file_name, digest))


@router.get(
    "/tasks/{task}/bundle", response_class=Response,
    responses={200: {"description": "the bundle that the model is a state of, a .zip", **_BINARY}, **_PROBLEMS},
)  # fmt: skip
async def bundle(context: Shared, task: Name) -> Response:
    """The bundle with which the model predicts and trains on."""
    student = model_student(await context.call(task_of, context.service, task))
    chunks = await context.call(context.service.blobs.open_range, student.bundle)
    headers = _headers(f"{task}-bundle.zip", student.bundle) | {"Content-Length": str(student.size_bytes)}
    return StreamingResponse(chunks, media_type=_MEDIA_TYPE, headers=headers)


def _headers(file_name: str, digest: str) -> dict[str, str]:
    return {
        "Content-Disposition": f'attachment; filename="{file_name}"',
        "ETag": f'"{digest}"',
        "Cache-Control": "private, no-cache",
        "Vary": "Authorization, Cookie",
        "X-Content-Type-Options": "nosniff",
    }
