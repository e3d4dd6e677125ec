"""For whoever runs the coordinator: is it alive, and its figures."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from edgestill.coordinator.http.auth import check_operator
from edgestill.coordinator.http.context import Context, context_of
from edgestill.coordinator.http.figures import figures_of
from edgestill.coordinator.http.problem_responses import problems

router = APIRouter(tags=["operations"])
Shared = Annotated[Context, Depends(context_of)]


@router.get("/healthz", responses=problems("unavailable"))
async def healthz(context: Shared) -> dict[str, str]:
    """Whether the store answers."""
    await context.call(context.service.tasks)
    return {"status": "ok"}


@router.get(
    "/metrics", response_class=Response, dependencies=[Depends(check_operator)],
    responses={200: {"content": {"text/plain": {}}}, **problems("unauthorised")},
)  # fmt: skip
async def metrics(context: Shared) -> Response:
    """Figures in Prometheus' text format."""
    families = await context.call(figures_of, context.service, context.liveness())
    return Response(context.metrics.render(families), media_type=CONTENT_TYPE_LATEST)
