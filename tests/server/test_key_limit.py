"""A key's own limit: 429 for that key alone, until one of its requests ends, however it ends."""

from __future__ import annotations

import httpx
from live_server import Brake, LiveServer, wait_until
from small_stores import Published, Start

BODY = {"prompt": "The tenant", "max_tokens": 3, "ignore_eos": True}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def status(server: LiveServer, key: str) -> httpx.Response:
    return server.http.get("/v1/models", headers=bearer(key))


def test_one_request_more_than_a_key_may_have_is_answered_429(published: Published, start_server: Start) -> None:
    server = start_server(api_key="one,two", max_requests_per_key=2)
    with Brake(server.lm) as brake:
        streams = [
            server.http.send(
                server.http.build_request(
                    "POST", "/v1/completions", json=BODY | {"stream": True}, headers=bearer("one")
                ),
                stream=True,
            )
            for _ in range(2)
        ]
        brake.wait_held()
        refused = status(server, "one")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limited", "rate_limit_error")
        assert "at most 2 requests" in error["message"]
        assert status(server, "two").status_code == 200
        assert status(server, "wrong").status_code == 401
        assert server.http.get("/health", headers=bearer("other")).status_code == 200

        streams[0].close()  # a client that leaves makes room, as one that is served does
        wait_until(lambda: status(server, "one").status_code == 200)
        brake.release()
        streams[1].read()
    wait_until(server.is_idle)
    assert [status(server, "one").status_code for _ in range(5)] == [200] * 5
