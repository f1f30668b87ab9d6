"""schemathesis finds nothing: what `/openapi.json` says is what the server does, for good requests and bad ones.

`make fuzz` runs the same for some 20,000 cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_folder import with_template
from fuzzing import fuzz, fuzzed_settings, total
from live_server import LiveServer, wait_until
from small_stores import Published


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_route_does_what_the_openapi_document_says(
    published: Published, own_root: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    model = with_template(published.model, tmp_path)
    with LiveServer(fuzzed_settings(model, own_root)) as server:
        outcome = fuzz(server, tmp_path, max_examples=10, seed=1)
        assert not outcome.failed, outcome.output
        wait_until(server.is_idle)
        routes = {f"{method.upper()} {path}" for path, item in server.app.openapi()["paths"].items() for method in item}
    assert outcome.cases.keys() == routes
    for route, cases in outcome.cases.items():
        with subtests.test(route):
            # Something was accepted, and something else was not.
            assert cases["statuses"].keys() & {"200", "201"}, cases
            assert sum(cases["statuses"].values()) >= 10
    assert total(outcome.cases).keys() >= {"200", "400", "401", "403", "404", "405"}
