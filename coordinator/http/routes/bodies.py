"""Bodies of requests, read with a hard bound after everything that can be refused without them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from edgestill.coordinator.http.problem_responses import describe_invalid
from edgestill.coordinator.problems import Problem

MAX_JSON_BYTES = 64 << 10
JSON_TIMEOUT_S = 30.0
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:;[^,]*)?(?:$|,)")

Model = TypeVar("Model", bound=BaseModel)


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads a body as `model`.

    FastAPI itself would read all of a body before it asks who sends it. Errors: Problem `malformed`,
    `invalid`, `too_large`.
    """

    async def read(request: Request) -> Model:
        body = await read_bounded(request, MAX_JSON_BYTES, JSON_TIMEOUT_S)
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            complaints = error.errors(include_input=False, include_url=False)
            kind = "malformed" if complaints[0]["type"] == "json_invalid" else "invalid"
            raise Problem(kind, describe_invalid(complaints)) from None

    return read


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI form of a body that is read by `json_body`."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def read_bounded(request: Request, limit_bytes: int, timeout_s: float) -> bytearray:
    """The whole body. Errors: Problem `too_large` past the limit, `malformed` when it stops or dawdles."""
    announced = content_length(request)
    if announced is not None and announced > limit_bytes:
        raise Problem("too_large", f"the body has {announced} bytes, at most {limit_bytes} are read")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit_bytes:
                    raise Problem(
                        "too_large", f"the body has more than the {limit_bytes} bytes that are read"
                    )
                body += chunk
    except TimeoutError:
        raise Problem("malformed", f"the body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise Problem("malformed", "the body was cut off") from None
    return body


def content_length(request: Request) -> int | None:
    """The announced size in bytes; None when there is none. Errors: Problem `malformed`."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Problem("malformed", "Content-Length is not a number of bytes")
    return int(text)


def sha256_of_content_digest(header: str | None) -> str:
    """The SHA-256 in a Content-Digest field (RFC 9530) in hexadecimal. Errors: Problem `malformed`."""
    if header is None:
        raise Problem("malformed", "no Content-Digest: send `sha-256=:BASE64:` over the body as sent")
    match = _SHA256.search(header)
    if match is None:
        raise Problem("malformed", "Content-Digest has no `sha-256=:BASE64:` of 32 bytes")
    try:
        return base64.b64decode(match[1], validate=True).hex()
    except binascii.Error:
        raise Problem("malformed", "Content-Digest is not base64") from None


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without `$defs`, which have no place inside of an OpenAPI document."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(one) for one in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved
