"""Uploads of outputs: refused on their head wherever possible, then read with a bound and checked."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response

from edgestill.coordinator.http.auth import token_of
from edgestill.coordinator.http.context import Context, context_of
from edgestill.coordinator.http.problem_responses import problems
from edgestill.coordinator.http.routes.bodies import content_length, read_bounded, sha256_of_content_digest
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.uploads.checks import UploadTicket

router = APIRouter(prefix="/v1", tags=["devices"])

_BODY = {
    "requestBody": {
        "required": True,
        "description": "a safetensors file, as sent in the Content-Encoding",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.put(
    "/rounds/{round}/devices/{device}/outputs", status_code=201, openapi_extra=_BODY,
    responses={
        200: {"description": "the same outputs were there already"},
        201: {"description": "the outputs are on disk and count"},
        **problems(
            "malformed", "digest_mismatch", "unauthorised", "foreign_device", "no_such_round", "not_selected",
            "other_digest", "late", "length_required", "too_large", "encoding", "wrong_outputs", "quota",
            "unavailable",
        ),
    },
)  # fmt: skip
async def upload(
    request: Request,
    context: Annotated[Context, Depends(context_of)],
    token: Annotated[str, Depends(token_of)],
    round: str,
    device: str,
    content_digest: Annotated[str | None, Header(description="`sha-256=:BASE64:` (RFC 9530)")] = None,
    content_encoding: Annotated[str, Header(description="`zstd` or `identity`")] = "identity",
) -> Response:
    """Takes a device's outputs of a round; sending the same again is harmless."""
    service, settings = context.service, context.settings
    encoding = content_encoding.strip().lower() or "identity"

    def check() -> tuple[
        UploadTicket, int, str
    ]:  # who asks and what is asked at once: a thread less to wait for
        caller = service.identify(token)
        length = content_length(request)
        digest = None if content_digest is None else sha256_of_content_digest(content_digest)
        ticket = service.check_upload(caller, round, device, length, digest, encoding)
        if length is None or digest is None:  # the service has refused both; this is for its reader's peace
            raise Problem("length_required" if length is None else "malformed")
        return ticket, length, digest

    ticket, length, digest = await context.call(check)
    with context.upload_memory.taken(ticket.device, length):
        body = await read_bounded(request, length, settings.upload_timeout_s)
        result = await context.call(service.take_upload, ticket, body, digest, encoding)
    context.metrics.uploads.labels(result).inc()
    return Response(status_code=201 if result == "created" else 200)
