"""Loaded by schemathesis: what it cannot know of this server, and what the report says about the cases."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import schemathesis

# What a schema cannot say, by its error's message: limits of the model and of what is loaded, fields that must agree.
CONTEXT = {
    "conversation that the template refuses": r"the chat template refuses `messages`",
    "context length": r"must be at most \d+ tokens together|of \d+ tokens|at most \d+ tokens per context",
    "vocabulary": r"token ids?\b.*(\d+ … \d+|from 0 to \d+), got|holds token id \d+; ids must be in",
    "no token": r"`(prompt|input\.\d+\.context)` must hold at least 1 token, got 0",
    "sequences at once": r"`(n|best_of)` must be at most \d+, the number of sequences"
    r"|must hold 1 … \d+ (prompts|texts)",
    "names no datastore": r"needs? a datastore, and this request names none",
    "names two datastores": r"`model` names datastore .* they must agree",
    "drafts where there are none": r"`knn.speculate` (is for completions|needs a server that drafts)",
    "gate that has no effect": r"`knn.gate` must be always here",
    "gate that there is not, or not with these": r"`knn.gate` learned (needs a gate|holds for the calibrated)",
    "rule for λ that there is not, or not with these": r"`knn.lambda_mode` must be (one that|fixed where)"
    r"|`knn.lambda_mode` \w+ holds for the calibrated",
    "threshold of another gate": r"`knn.gate_threshold` (needs `knn.gate`|must (not )?be given|of \w+ must be)",
    "mixture of several datastores": r"`knn.weights` must (not )?be|`knn.mixture` neighbors (needs one|knows no)"
    r"|must name different datastores|must give a weight to all datastores or to none|exactly one datastore",
    "neighbours in all": r"`knn.k` must be at most \d+ for all|`knn.attribution` may attribute at most",
    "nothing to attribute": r"`knn.attribution` must be false here",
    "one id twice": r"`documents` must hold each id once",
    "no text": r"has a NUL at character",
    "reserved name": r"`name` of a datastore must be 1 to 63|`aliases` must be fit to be a datastore's name",
    "fields that must agree": r"without `echo`, got 0|`stream_options` needs|`best_of` must (be at least|equal) `n`"
    r"|`min_tokens` must be from 0 to|`top_logprobs` needs|must agree with `max_tokens`|exactly one of `prompt` and"
    r"|must not both be true|`add_special_tokens` needs|`stride` must be at least 1 and less than `window`",
}


@schemathesis.deserializer("application/x-ndjson")
def json_lines(context: Any, response: schemathesis.Response) -> list[Any]:
    """Every line is an object of its own."""
    return [json.loads(line) for line in response.content.decode().splitlines()]


@schemathesis.check
def refused_only_for_its_context(context: Any, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """What fits the schema may be refused with 400 only for a reason that no schema can express."""
    is_positive = case.meta is not None and case.meta.generation.mode.is_positive
    if response.status_code != 400 or not is_positive:
        return
    message = response.json()["error"]["message"]
    reason = next((reason for reason, pattern in CONTEXT.items() if re.search(pattern, message)), None)
    counts.add_refusal(case, reason or message)
    assert reason is not None, f"refused although it fits the schema: {message}"


class Counts:
    """Cases per route, by kind of data and by status."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._routes: defaultdict[str, dict[str, Counter[str]]] = defaultdict(
            lambda: {"data": Counter(), "phases": Counter(), "statuses": Counter(), "refusals": Counter()}
        )

    def add(self, case: schemathesis.Case, response: schemathesis.Response) -> None:
        """Count one case."""
        with self._lock:
            route = self._routes[case.operation.label]
            if case.meta is not None:
                route["data"][case.meta.generation.mode.value] += 1
                route["phases"][case.meta.phase.name.value] += 1
            route["statuses"][str(response.status_code)] += 1

    def add_refusal(self, case: schemathesis.Case, reason: str) -> None:
        """Count why something that fits the schema was refused."""
        with self._lock:
            self._routes[case.operation.label]["refusals"][reason] += 1

    def write(self, path: Path) -> None:
        """As JSON."""
        routes = {
            name: {what: dict(sorted(counts.items())) for what, counts in route.items()}
            for name, route in sorted(self._routes.items())
        }
        path.write_text(json.dumps(routes, indent=1))


counts = Counts()
if "FUZZ_COUNTS" in os.environ:
    atexit.register(lambda: counts.write(Path(os.environ["FUZZ_COUNTS"])))


PUBLISHED: dict[str, list[str]] = json.loads(os.environ.get("FUZZ_VERSIONS", "{}"))
FUZZ_DOCUMENT = os.environ.get("FUZZ_DOCUMENT", "")
_turns = itertools.count()


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Let every other good request name what exists, and its fields agree: hardly any would get further than that."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.path.endswith("/diff") and case.path_parameters["name"] in PUBLISHED and next(_turns) % 2:
        versions = PUBLISHED[case.path_parameters["name"]]
        case.query.update(a=versions[0], b=versions[-1])
    body = case.body
    if not isinstance(body, dict):
        return
    if case.path.endswith("/purge") and next(_turns) % 2:
        body["documents"] = [FUZZ_DOCUMENT]
    if isinstance(body.get("stream_options"), dict) and not body.get("stream") and next(_turns) % 2:
        body["stream"] = True
    if body.get("prompt") is not None and body.get("messages") is not None and next(_turns) % 2:
        body["messages"] = None


@schemathesis.hook
def after_call(context: Any, case: schemathesis.Case, response: schemathesis.Response) -> None:
    """After every request, probes of checks excepted."""
    counts.add(case, response)
