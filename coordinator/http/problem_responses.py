"""Problems of the catalog as HTTP responses (RFC 9457), whoever raised them; and how they read in the OpenAPI."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from edgestill.coordinator.http.context import Context, jittered_s
from edgestill.coordinator.problems import CATALOG, Problem
from edgestill.coordinator.store.blobs import BlobError
from edgestill.coordinator.store.database import StoreError

MEDIA_TYPE = "application/problem+json"
_LOG = logging.getLogger("coordinator")
_KIND_OF_STATUS = {
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    431: "header_too_large",
    503: "unavailable",
}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "required": ["type", "title", "status", "detail", "hint"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:edgestill:problem:late"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "hint": {"type": "string"},
    },
}


class ProblemResponse(JSONResponse):
    """A problem as an answer, with Retry-After where trying again makes sense."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if problem.retry_after_s is not None:
            headers["Retry-After"] = str(jittered_s(problem.retry_after_s))
        if problem.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="edgestill"'
        super().__init__(problem.as_json(), problem.status, headers)


def add_problem_handlers(app: FastAPI, context: Context) -> None:
    """Lets the app answer problems, FastAPI's own refusals and plain bugs in one form."""

    def answer(problem: Problem, headers: dict[str, str] | None = None) -> ProblemResponse:
        context.metrics.refusals.labels(problem.kind).inc()
        return ProblemResponse(problem, headers)

    async def on_problem(_: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, Problem)
        return answer(error)

    async def on_invalid(_: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, RequestValidationError)
        return answer(Problem("invalid", describe_invalid(error.errors())))

    async def on_http(_: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, HTTPException)
        kind = _KIND_OF_STATUS.get(error.status_code, "malformed")
        detail = "there is nothing at this address" if kind == "not_found" else str(error.detail)
        return answer(Problem(kind, detail), dict(error.headers or {}))

    async def on_bug(request: Request, error: Exception) -> ProblemResponse:
        route = getattr(request.scope.get("route"), "path", "no route")
        _LOG.error("%s %s failed", request.method, route, exc_info=error)
        return answer(Problem("internal", "the coordinator failed at this request"))

    async def on_store(request: Request, error: Exception) -> ProblemResponse:
        route = getattr(request.scope.get("route"), "path", "no route")
        # for the log alone: a message of the database may quote what others stored
        _LOG.error("%s %s: %s", request.method, route, error)
        return answer(Problem("unavailable", "the coordinator's store does not answer", retry_after_s=5))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(StoreError, on_store)
    app.add_exception_handler(BlobError, on_store)
    app.add_exception_handler(Exception, on_bug)


def describe_invalid(errors: Any) -> str:
    """The first few complaints, each with its place; what was sent is not repeated, it may be a secret."""
    lines = [f"{'.'.join(map(str, one.get('loc', ()))) or 'body'}: {one.get('msg', '')}" for one in errors]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3])[:400] + more


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """What a route may answer besides success, for its `responses`."""
    by_status: dict[int | str, list[str]] = {}
    for kind in kinds:
        by_status.setdefault(CATALOG[kind].status, []).append(kind)
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": ", ".join(f"`{kind}`" for kind in of),
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status, of in by_status.items()
    }
