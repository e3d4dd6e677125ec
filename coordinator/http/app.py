"""The coordinator as an ASGI application: routes, problems, figures, and the loop behind them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from edgestill.coordinator.dashboard.routes import make_dashboard_router
from edgestill.coordinator.distillation.loop import BackgroundLoop, RunJob
from edgestill.coordinator.distillation.worker import runner_for
from edgestill.coordinator.http.context import Context
from edgestill.coordinator.http.hosts import KnownHosts, known_hosts
from edgestill.coordinator.http.metrics import Measured
from edgestill.coordinator.http.problem_responses import SCHEMA, add_problem_handlers
from edgestill.coordinator.http.routes import blobs, description, devices, models, operations, uploads
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings

_DESCRIPTION = """Training at the edge by distilling latents: devices exchange outputs on a transfer set.
Errors are `application/problem+json` (RFC 9457) with a `hint`. Contract: docs/federation.md."""


def make_app(
    service: Service, settings: Settings, run_job: RunJob | None = None, loop: bool = True
) -> FastAPI:
    """The application over a service; `loop` off leaves deadlines and step 5 to the caller."""
    context = Context(service, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not loop:
            yield
            return
        async with BackgroundLoop(context, run_job or runner_for(settings)).running():
            yield

    app = FastAPI(title="edgestill coordinator", version="1", description=_DESCRIPTION,
                  lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)  # fmt: skip
    app.state.context = context
    add_problem_handlers(app, context)
    for router in (devices.router, uploads.router, blobs.router, models.router, operations.router, description.router):
        app.include_router(router)
    app.include_router(make_dashboard_router(service, settings, context.upload_memory.devices), include_in_schema=False)
    if (known := known_hosts(settings)) is not None:
        app.add_middleware(KnownHosts, known=known, metrics=context.metrics)
    app.add_middleware(Measured, metrics=context.metrics)
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_problems(make_schema())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _with_problems(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with our form of an error in place of FastAPI's."""
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = SCHEMA
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path in schema["paths"].values():
        for operation in path.values():
            answer = operation["responses"].get("422")
            if answer is not None and "application/json" in answer.get("content", {}):
                answer.update(description="`invalid`", content=problem)
    return schema
