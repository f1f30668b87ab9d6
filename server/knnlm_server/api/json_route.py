"""Routes that read JSON's numbers as JSON means them: there is one kind, and 8.0 is 8."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

_EXACT = 2.0**53  # below it, a float that is whole is one integer and no other


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), parse_float=_number)
        return self._json


class JsonRoute(APIRoute):
    """Gives validation an int wherever a whole number was written, with a fraction of zero or not.

    JSON Schema, and so the OpenAPI document, calls both an integer; some languages write every number with a fraction.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return read_and_handle


def _number(written: str) -> float | int:
    number = float(written)
    return int(number) if abs(number) <= _EXACT and number.is_integer() else number
