"""Immutable blobs by their SHA-256, whole or in part (RFC 9110: ranges and conditional requests)."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Response
from fastapi.responses import StreamingResponse

from edgestill.coordinator.http.auth import device_of
from edgestill.coordinator.http.context import Context, context_of
from edgestill.coordinator.http.problem_responses import ProblemResponse, problems
from edgestill.coordinator.problems import Problem

router = APIRouter(prefix="/v1", tags=["devices"])
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES = {
    200: {"description": "the whole blob", **_BINARY},
    206: {"description": "the range that was asked for", **_BINARY},
    304: {"description": "the client has it already"},
    **problems("unauthorised", "not_found", "range_not_satisfiable"),
}


@router.get("/blobs/{digest}", responses=_RESPONSES, response_class=Response)
@router.head("/blobs/{digest}", responses=_RESPONSES, response_class=Response, include_in_schema=False)
async def blob(
    context: Annotated[Context, Depends(context_of)],
    device: Annotated[Any, Depends(device_of)],
    digest: Annotated[str, Path(description="64 lower-case hexadecimal digits")],
    range: Annotated[str | None, Header(description="one range of bytes")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A blob of the device's own task: bundle, transfer set or global outputs."""
    if not _DIGEST.fullmatch(digest):
        raise Problem("not_found", "a blob's name is its SHA-256 in 64 lower-case hexadecimal digits")
    size_bytes = await context.call(context.service.readable_blob, device, digest)
    etag = f'"{digest}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Vary": "Authorization",
    }
    if matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    wanted = None
    if range is not None and (if_range is None or if_range.strip() == etag):
        try:
            wanted = parse_range(range, size_bytes)
        except Problem as problem:
            context.metrics.refusals.labels(problem.kind).inc()
            return ProblemResponse(
                problem, {"Content-Range": f"bytes */{size_bytes}", "Accept-Ranges": "bytes"}
            )
    start, stop = wanted or (0, size_bytes)
    headers["Content-Length"] = str(stop - start)
    if wanted is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
    chunks = await context.call(context.service.blobs.open_range, digest, start, stop)
    return StreamingResponse(
        chunks, 200 if wanted is None else 206, headers, media_type="application/octet-stream"
    )


def parse_range(text: str, size_bytes: int) -> tuple[int, int] | None:
    """The first byte and the one after the last; None for what a server may ignore: several ranges, other units.

    Errors: Problem `range_not_satisfiable`. Source: RFC 9110, 14.1.2 and 14.2.
    """
    match = _RANGE.fullmatch(text.strip().replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, stop = max(0, size_bytes - int(match[2])), size_bytes
        if int(match[2]) == 0:
            start = size_bytes
    else:
        start = int(match[1])
        stop = size_bytes if match[2] == "" else min(int(match[2]) + 1, size_bytes)
        if match[2] != "" and int(match[2]) < start:
            return None
    if start >= size_bytes:
        raise Problem("range_not_satisfiable", f"the blob has {size_bytes} bytes")
    return start, stop


def matches(header: str | None, etag: str) -> bool:
    """Whether If-None-Match names it; compared weakly: `W/` does not count."""
    if header is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return "*" in tags or etag in tags
