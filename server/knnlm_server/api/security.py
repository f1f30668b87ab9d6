"""Keys: one for all routes under /v1, another for those that change datastores."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import SecretStr

from knnlm_core.errors import Forbidden, Unauthorized
from knnlm_server.api.state import service

Authorization = Annotated[str | None, Header(description="`Bearer <key>`")]


def require_key(request: Request, authorization: Authorization = None) -> None:
    """Raises Unauthorized: the server has an API key and the request carries neither it nor the admin key."""
    settings = service(request).settings
    if settings.api_key is None:
        return
    if not (_matches(authorization, settings.api_key) or _matches(authorization, settings.admin_key)):
        raise Unauthorized("a valid API key is needed: Authorization: Bearer <key>")


def require_admin(request: Request, authorization: Authorization = None) -> None:
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


def _matches(authorization: str | None, key: SecretStr | None) -> bool:
    if authorization is None or key is None:
        return False
    scheme, _, given = authorization.partition(" ")
    # Digests have one length, so the comparison takes the same time for every key.
    digests = (hashlib.sha256(value.encode()).digest() for value in (given.strip(), key.get_secret_value()))
    return scheme.lower() == "bearer" and hmac.compare_digest(*digests)


KeyRequired = Depends(require_key)
AdminRequired = Depends(require_admin)
