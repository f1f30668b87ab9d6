"""Keys: one for all routes under /v1, another for those that change datastores."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from pydantic import SecretStr
from starlette.types import Scope

from knnlm_core.errors import Forbidden, Unauthorized
from knnlm_server.api.state import service
from knnlm_server.settings import LOOPBACK, ServerSettings


class BearerScheme(SecurityBase):
    """How a key is sent, for the OpenAPI document alone; the checks below read the header themselves."""

    def __init__(self, name: str, description: str) -> None:
        self.scheme_name = name
        self.model = HTTPBearer(description=description)

    async def __call__(self, request: Request) -> None:
        return None


API_KEY = BearerScheme("ApiKey", "`Authorization: Bearer <key>`; the admin key opens these routes too.")
ADMIN_KEY = BearerScheme("AdminKey", "`Authorization: Bearer <key>`, for routes that change datastores.")


def require_key(request: Request, _: Annotated[None, Depends(API_KEY)] = None) -> None:
    """Raises Unauthorized: the server has an API key and the request carries neither it nor the admin key."""
    settings = service(request).settings
    if not settings.api_key:
        return
    authorization = authorization_of(request.scope)
    if key_number(authorization, settings) is None and not _matches(authorization, settings.admin_key):
        raise Unauthorized("a valid API key is needed, once: Authorization: Bearer <key>")


def require_admin(request: Request, _: Annotated[None, Depends(ADMIN_KEY)] = None) -> None:
    """Raises Unauthorized or Forbidden: the request may not change datastores."""
    settings = service(request).settings
    if settings.admin_key is None:
        if not settings.is_loopback:
            raise Forbidden(
                f"changing datastores is off: the server listens on {settings.host} and has no admin key (--admin-key)"
            )
        _refuse_other_pages(request)
        require_key(request)
        return
    authorization = authorization_of(request.scope)
    if authorization is None:
        raise Unauthorized("changing datastores needs the admin key, once: Authorization: Bearer <key>")
    if not _matches(authorization, settings.admin_key):
        raise Forbidden("this key may not change datastores; the admin key is needed")


def _refuse_other_pages(request: Request) -> None:
    """A browser asks for any page that is open in it, and says which. Raises Forbidden: not one of this server."""
    host = request.headers.get("host", "")
    try:
        is_here = urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:  # brackets that do not match
        is_here = False
    for origin in request.headers.getlist("origin"):
        if not is_here or origin not in (f"http://{host}", f"https://{host}"):
            raise Forbidden(
                f"the page of {origin!r} may not change datastores of a server that has no admin key (--admin-key)"
            )


def authorization_of(scope: Scope) -> str | None:
    """The one header that says who asks. Given twice it says nothing: no two readers may take one key each."""
    given: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
    return given[0].decode("latin-1") if len(given) == 1 else None


def actor_of(request: Request) -> str:
    """Who asks, for an audit log: the address, and the request's id, by which the access log knows more."""
    address = request.client.host if request.client is not None else "unknown"
    return f"http {address} request {request.state.request_id}"


def key_number(authorization: str | None, settings: ServerSettings) -> int | None:
    """Which of the server's API keys a request carries, if any."""
    found = [number for number, key in enumerate(settings.api_key) if _matches(authorization, key)]
    return found[0] if found else None


def _matches(authorization: str | None, key: SecretStr | None) -> bool:
    if authorization is None or key is None:
        return False
    scheme, _, given = authorization.partition(" ")
    # Digests have one length, so the comparison takes the same time for every key.
    digests = (hashlib.sha256(value.encode()).digest() for value in (given.strip(), key.get_secret_value()))
    return scheme.lower() == "bearer" and hmac.compare_digest(*digests)


KEY_CHECKS: tuple[Callable[[Request], None], ...] = (require_key, require_admin)
KeyRequired = Depends(require_key)
AdminRequired = Depends(require_admin)
