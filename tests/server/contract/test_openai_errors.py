"""The openai library, unmodified: an error is one of its classes, says what is wrong, and is retried only if it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from learned import Learned
from live_server import Brake, LiveServer, wait_until
from small_stores import Published, Start

from knnlm_server.settings import ServerSettings

LM, LAW = "learned-lm", "learned-lm@law"
ONE, OTHER, ADMIN = "one-key", "other-key", "admin-key"
ASK = [{"role": "user", "content": "Who?"}]


class Caller:
    """A client of a server, how many requests it has sent, and the status of each answer."""

    def __init__(self, server: LiveServer, key: str = "any", max_retries: int = 2) -> None:
        self.attempts = 0
        self.answers: list[int] = []
        http = openai.DefaultHttpxClient(event_hooks={"request": [self._count], "response": [self._note]})
        self.client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key=key, max_retries=max_retries, http_client=http, timeout=30
        )

    def _count(self, _: object) -> None:
        self.attempts += 1

    def _note(self, response: Any) -> None:
        self.answers.append(response.status_code)

    def complete(self, **body: Any) -> str:
        """The text of a completion."""
        answer = self.client.completions.create(**{"model": LM, "prompt": "The", "max_tokens": 1, **body})
        return str(answer.choices[0].text)

    def load(self, name: str) -> Any:
        """Load a datastore: not one of the library's own calls, so by its generic one."""
        return self.client.put(f"/datastores/{name}", cast_to=object)

    def fails(self, kind: type[openai.APIStatusError], call: Callable[[], object], code: str) -> openai.APIStatusError:
        """The error of a call that must fail with this class and code."""
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        error = caught.value
        assert type(error) is kind, error
        assert (error.code, error.request_id) == (code, error.response.headers["x-request-id"])
        assert isinstance(error.body, dict)
        assert error.body.keys() == {"message", "type", "param", "code"}
        assert error.body["message"] in error.message
        return error


Connect = Callable[..., Caller]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes callers, and closes them in the end."""
    with ExitStack() as opened:

        def to(server: LiveServer, **options: Any) -> Caller:
            caller = Caller(server, **options)
            opened.enter_context(caller.client)
            return caller

        yield to


@pytest.fixture(scope="module")
def strict(learned: Learned) -> Iterator[LiveServer]:
    """A server with keys that runs one request at a time, lets none wait, and takes small bodies."""
    settings = ServerSettings(
        model=str(learned.model),
        datastores=learned.root,
        max_sequences=1,
        max_queued=0,
        max_body_bytes=20_000,
        api_key=f"{ONE},{OTHER}",  # type: ignore[arg-type]
        max_requests_per_key=1,
        admin_key=ADMIN,  # type: ignore[arg-type]
        drain_timeout_s=30,
    )
    with LiveServer(settings) as server:
        yield server


def chat(**body: Any) -> Callable[[Caller], object]:
    return lambda caller: caller.client.chat.completions.create(**{"model": LM, "messages": ASK, **body})


def complete(**body: Any) -> Callable[[Caller], object]:
    return lambda caller: caller.complete(**body)


@pytest.mark.parametrize(
    ("call", "kind", "code", "param"),
    [
        (complete(temperature=-1), openai.BadRequestError, "invalid_parameter", "temperature"),
        (complete(max_tokens=10_000), openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        (complete(suffix="end"), openai.BadRequestError, "unsupported_feature", "suffix"),
        (complete(n=2, best_of=1), openai.BadRequestError, "invalid_parameter", "best_of"),
        (complete(temperature=-1, stream=True), openai.BadRequestError, "invalid_parameter", "temperature"),
        (
            complete(model=LAW, extra_body={"knn": {"lambda": 2}}),
            openai.BadRequestError, "invalid_knn_params", "knn.lambda",
        ),
        (complete(model="gpt-5"), openai.NotFoundError, "model_not_found", "model"),
        (complete(model=f"{LM}@nope"), openai.NotFoundError, "datastore_not_found", "knn.datastore"),
        (lambda caller: caller.client.models.retrieve("gpt-5"), openai.NotFoundError, "model_not_found", "model"),
        (lambda caller: caller.client.embeddings.create(model=LM, input="x"), openai.NotFoundError,
         "route_not_found", None),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}]), openai.BadRequestError,
         "unsupported_feature", "tools"),
        (chat(top_logprobs=2), openai.BadRequestError, "invalid_parameter", "top_logprobs"),
        (chat(messages=[]), openai.BadRequestError, "invalid_parameter", "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_wrong_call_is_told_once_which_field_is_wrong(
    learned_server: LiveServer,
    connect: Connect,
    call: Callable[[Caller], object],
    kind: type[openai.APIStatusError],
    code: str,
    param: str | None,
) -> None:
    caller = connect(learned_server)
    error = caller.fails(kind, lambda: call(caller), code)
    assert error.param == param
    assert error.type == ("not_found_error" if kind is openai.NotFoundError else "invalid_request_error")
    assert caller.attempts == 1


def test_a_wrong_key_is_an_authentication_error(strict: LiveServer, connect: Connect) -> None:
    caller = connect(strict, key="wrong")
    error = caller.fails(openai.AuthenticationError, caller.complete, "invalid_api_key")
    assert (error.status_code, error.type, caller.attempts) == (401, "authentication_error", 1)
    assert "wrong" not in error.message


def test_a_key_that_may_not_change_datastores_is_a_permission_error(strict: LiveServer, connect: Connect) -> None:
    caller = connect(strict, key=ONE)
    error = caller.fails(openai.PermissionDeniedError, lambda: caller.load("law"), "forbidden")
    assert (error.status_code, error.type, caller.attempts) == (403, "permission_error", 1)
    assert connect(strict, key=ONE).complete()


def test_a_body_over_the_limit_is_413(strict: LiveServer, connect: Connect) -> None:
    caller = connect(strict, key=ONE)
    error = caller.fails(openai.APIStatusError, lambda: caller.complete(prompt="long " * 5000), "payload_too_large")
    assert (error.status_code, caller.attempts) == (413, 1)
    assert "20000 bytes" in error.message


def test_a_datastore_of_another_model_is_a_conflict_told_once(
    learned: Learned, published: Published, start_server: Start, connect: Connect
) -> None:
    server = start_server(model=str(learned.model), datastores=published.root)
    caller = connect(server)
    error = caller.fails(openai.ConflictError, lambda: caller.load("law"), "datastore_mismatch")
    assert (error.status_code, error.type, caller.attempts) == (409, "conflict_error", 1)
    assert error.response.headers["x-should-retry"] == "false"


def test_a_change_during_another_is_a_conflict_told_once(strict: LiveServer, connect: Connect) -> None:
    caller, admin = connect(strict, key=ADMIN), connect(strict, key=ADMIN)
    with ThreadPoolExecutor(2) as pool, Brake(strict.lm) as brake:
        answer = pool.submit(connect(strict, key=ONE).complete, model=LAW)
        brake.wait_held()
        unloading = pool.submit(admin.client.delete, "/datastores/law", cast_to=object)
        wait_until(lambda: [status.state for status in strict.backend.registry.statuses()] == ["draining"])
        error = caller.fails(openai.ConflictError, lambda: caller.load("law"), "datastore_busy")
        assert (error.status_code, error.type, caller.attempts) == (409, "conflict_error", 1)
        brake.release()
        assert answer.result(30)
        unloading.result(30)
    assert connect(strict, key=ADMIN).load("law")["state"] == "ready"


def test_a_full_server_is_503_and_the_library_comes_back_when_told(strict: LiveServer, connect: Connect) -> None:
    impatient, patient = (connect(strict, key=OTHER, max_retries=retries) for retries in (0, 2))
    with ThreadPoolExecutor(2) as pool, Brake(strict.lm) as brake:
        first = pool.submit(connect(strict, key=ONE).complete)
        brake.wait_held()
        error = impatient.fails(openai.InternalServerError, impatient.complete, "overloaded")
        assert (error.status_code, error.type, impatient.attempts) == (503, "service_unavailable_error", 1)
        assert int(error.response.headers["retry-after"]) >= 1
        second = pool.submit(patient.complete)
        wait_until(lambda: patient.answers == [503])
        brake.release()
        assert first.result(30)
        assert second.result(30)
    assert patient.attempts == 2


def test_a_key_with_too_many_requests_is_429_and_another_key_is_not(strict: LiveServer, connect: Connect) -> None:
    caller = connect(strict, key=ONE, max_retries=0)
    with ThreadPoolExecutor(1) as pool, Brake(strict.lm) as brake:
        first = pool.submit(connect(strict, key=ONE).complete)
        brake.wait_held()
        error = caller.fails(openai.RateLimitError, caller.complete, "rate_limited")
        assert (error.status_code, error.type, caller.attempts) == (429, "rate_limit_error", 1)
        assert int(error.response.headers["retry-after"]) >= 1
        assert connect(strict, key=OTHER).client.models.list()
        brake.release()
        assert first.result(30)
    assert caller.complete()


def test_an_error_inside_a_stream_is_raised_from_it(
    learned_server: LiveServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm_core.errors import EngineFailure
    from knnlm_server.engine import engine

    monkeypatch.setattr(engine, "run_step", _fails(engine.run_step, EngineFailure("a step failed"), after=3))
    caller = connect(learned_server)
    with pytest.raises(openai.APIError, match="failed") as caught, caller.client:
        for _ in caller.client.completions.create(model=LM, prompt="The", max_tokens=20, stream=True):
            pass
    assert (caught.value.code, caller.attempts) == ("engine_failure", 1)


def _fails(real: Callable[..., Any], error: Exception, after: int) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            raise error
        return real(*args, **kwargs)

    return step
