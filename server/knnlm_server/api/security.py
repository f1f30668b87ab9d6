"""Keys: one for all routes under /v1, another for those that change datastores."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from pydantic import SecretStr

from knnlm_core.errors import Forbidden, Unauthorized
from knnlm_server.api.state import service
from knnlm_server.settings import ServerSettings


class BearerScheme(SecurityBase):
    """How a key is sent, for the OpenAPI document; hands out the header as it is, for the checks below."""

    def __init__(self, name: str, description: str) -> None:
        self.scheme_name = name
        self.model = HTTPBearer(description=description)

    async def __call__(self, request: Request) -> str | None:
        return request.headers.get("authorization")


API_KEY = BearerScheme("ApiKey", "`Authorization: Bearer <key>`; the admin key opens these routes too.")
ADMIN_KEY = BearerScheme("AdminKey", "`Authorization: Bearer <key>`, for routes that change datastores.")


def require_key(request: Request, authorization: Annotated[str | None, Depends(API_KEY)]) -> None:
    """Raises Unauthorized: the server has an API key and the request carries neither it nor the admin key."""
    settings = service(request).settings
    if not settings.api_key:
        return
    if key_number(authorization, settings) is None and not _matches(authorization, settings.admin_key):
        raise Unauthorized("a valid API key is needed: Authorization: Bearer <key>")


def require_admin(request: Request, authorization: Annotated[str | None, Depends(ADMIN_KEY)]) -> None:
    """Raises Unauthorized or Forbidden: the request may not change datastores."""
    settings = service(request).settings
    if settings.admin_key is None:
        if not settings.is_loopback:
            raise Forbidden(
                f"changing datastores is off: the server listens on {settings.host} and has no admin key (--admin-key)"
            )
        require_key(request, authorization)
        return
    if authorization is None:
        raise Unauthorized("changing datastores needs the admin key: Authorization: Bearer <key>")
    if not _matches(authorization, settings.admin_key):
        raise Forbidden("this key may not change datastores; the admin key is needed")


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


KeyRequired = Depends(require_key)
AdminRequired = Depends(require_admin)
