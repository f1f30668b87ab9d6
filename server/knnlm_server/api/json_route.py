"""Routes that take JSON: the key comes before the body, and numbers are read as JSON means them, where 8.0 is 8."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from knnlm_server.api.security import KEY_CHECKS

_EXACT = 2.0**53  # below it, a float that is whole is one integer and no other


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), parse_float=_number)
        return self._json


class JsonRoute(APIRoute):
    """Refuses whoever lacks the key before the body is read: FastAPI itself would parse all of it first.

    Gives validation an int wherever a whole number was written, with a fraction of zero or not.
    JSON Schema, and so the OpenAPI document, calls both an integer; some languages write every number with a fraction.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        asked = [given.dependency for given in self.dependencies]
        checks = [check for check in KEY_CHECKS if check in asked]

        async def read_and_handle(request: Request) -> Response:
            for check in checks:
                check(request)
            return await handle(_JsonRequest(request.scope, request.receive))

        return read_and_handle


def _number(written: str) -> float | int:
    number = float(written)
    return int(number) if abs(number) <= _EXACT and number.is_integer() else number
