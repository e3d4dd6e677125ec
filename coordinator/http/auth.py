"""Who asks: a device by its bearer token, a person at the dashboard by the dashboard's token."""

from __future__ import annotations

import hmac
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from edgestill.coordinator.http.address import is_loopback, is_private
from edgestill.coordinator.http.context import Context, context_of
from edgestill.coordinator.problems import Problem

DASHBOARD_COOKIE = "edgestill_dashboard"

# auto_error off: a missing token is a problem of our catalog like any other
_BEARER = HTTPBearer(auto_error=False, scheme_name="device token")


async def token_of(request: Request, _: Annotated[Any, Depends(_BEARER)]) -> str:
    """The token in the Authorization header, not looked up. Errors: Problem `unauthorised`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Problem("unauthorised", "no bearer token in the Authorization header")
    return token.strip()


async def device_of(
    context: Annotated[Context, Depends(context_of)], token: Annotated[str, Depends(token_of)]
) -> Any:
    """The device whose token stands in the Authorization header. Errors: Problem `unauthorised`."""
    return await context.call(context.service.authenticate, token)


async def check_operator(request: Request, context: Annotated[Context, Depends(context_of)]) -> None:
    """Lets in whoever has the dashboard's token, as bearer or in the dashboard's cookie; everyone if none is set.

    Errors: Problem `unauthorised`.
    """
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else cookie_of(request)
    if not is_operator(given, context.settings.dashboard_token):
        raise Problem("unauthorised", "this page needs the dashboard's token")


async def check_keeper(request: Request, context: Annotated[Context, Depends(context_of)]) -> None:
    """`check_operator`, and without a token only who asks on this machine a coordinator that listens to it alone: for
    what is not to be seen by the whole network.

    Errors: Problem `unauthorised`, `token_not_set`.
    """
    await check_operator(request, context)
    settings = context.settings
    # behind a proxy the client is the one that the proxy names (trusted_proxies)
    here = request.client is not None and is_loopback(request.client.host)
    if not settings.dashboard_token and not (here and is_private(settings)):
        raise Problem("token_not_set")


def is_operator(given: str, token: str) -> bool:
    """Whether this is the dashboard's token, compared in constant time; everyone is let in where none is set."""
    # as bytes: compare_digest refuses text outside of ASCII
    return not token or hmac.compare_digest(given.encode(errors="replace"), token.encode(errors="replace"))


def cookie_of(request: Request) -> str:
    """The token in the dashboard's cookie; empty without one."""
    return unquote(request.cookies.get(DASHBOARD_COOKIE, ""))
