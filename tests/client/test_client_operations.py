"""Both clients: what they send, what they return, and that they are twins."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from contract_double import CHUNKS, COMPLETION, DATASTORE, MODELS, SCORE, ContractDouble, run_async
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from knnlm_client import (
    AsyncClient,
    AsyncDatastores,
    Client,
    Completion,
    CompletionChunk,
    CompletionOptions,
    CompletionRequest,
    Datastore,
    Datastores,
    KnnOptions,
    ModelCard,
    ScoreOptions,
    ScoreRequest,
    ScoreResponse,
    StreamCompletionOptions,
    StreamOptions,
    WeightedDatastore,
    __version__,
)

CLIENT_FOLDER = Path(__file__).parents[2] / "clients" / "python"

ALL_COMPLETION_OPTIONS: StreamCompletionOptions = {
    "max_tokens": 8,
    "min_tokens": 1,
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "stop": ["\n", "."],
    "seed": 7,
    "logprobs": 2,
    "echo": True,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {11: -100.0},
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stop_token_ids": [2],
    "include_stop_str_in_output": True,
    "repetition_penalty": 1.25,
    "user": "me",
    "knn": KnnOptions(
        datastore=[WeightedDatastore(name="law", weight=0.75)],
        k=16,
        temperature=10.0,
        lmbda=0.25,
        gate="always",
        gate_threshold=0.5,
        speculate=False,
        trace=True,
    ),
    "stream_options": StreamOptions(include_usage=True),
}
ALL_ON_THE_WIRE = ALL_COMPLETION_OPTIONS | {
    "logit_bias": {"11": -100.0},
    "knn": {
        "datastore": [{"name": "law", "weight": 0.75}],
        "k": 16,
        "temperature": 10.0,
        "lambda": 0.25,
        "gate": "always",
        "gate_threshold": 0.5,
        "speculate": False,
        "trace": True,
    },
    "stream_options": {"include_usage": True},
}
SCORE_OPTIONS: ScoreOptions = {
    "knn": KnnOptions(datastore="law"),
    "per_token": True,
    "exclude_documents": ["act-7"],
    "window": 1024,
    "stride": 512,
}

# name → (the call on either client, method, path, body on the wire, answer)
OPERATIONS: dict[str, tuple[Callable[[Any], Any], str, str, Any, Any]] = {
    "completions": (
        lambda c: c.completions("The", model="smollm2@law", max_tokens=1),
        "POST",
        "/v1/completions",
        {"prompt": "The", "model": "smollm2@law", "max_tokens": 1},
        Completion.model_validate(COMPLETION),
    ),
    "completions with every option": (
        lambda c: c.completions([[1, 2], [3]], model="smollm2", **ALL_COMPLETION_OPTIONS),
        "POST",
        "/v1/completions",
        {"prompt": [[1, 2], [3]], "model": "smollm2", **ALL_ON_THE_WIRE},
        Completion.model_validate(COMPLETION),
    ),
    "score": (
        lambda c: c.score(["The buyer shall pay."], model="smollm2", **SCORE_OPTIONS),
        "POST",
        "/v1/score",
        {"input": ["The buyer shall pay."], "model": "smollm2", **SCORE_OPTIONS, "knn": {"datastore": "law"}},
        ScoreResponse.model_validate(SCORE),
    ),
    "models": (
        lambda c: c.models(),
        "GET",
        "/v1/models",
        None,
        tuple(ModelCard.model_validate(card) for card in MODELS["data"]),
    ),
    "health": (lambda c: c.health(), "GET", "/health", None, True),
    "ready": (lambda c: c.ready(), "GET", "/ready", None, True),
    "datastores.list": (
        lambda c: c.datastores.list(),
        "GET",
        "/v1/datastores",
        None,
        (Datastore.model_validate(DATASTORE),),
    ),
    "datastores.get": (
        lambda c: c.datastores.get("law"),
        "GET",
        "/v1/datastores/law",
        None,
        Datastore.model_validate(DATASTORE),
    ),
    "datastores.load": (
        lambda c: c.datastores.load("law"),
        "PUT",
        "/v1/datastores/law",
        {"version": "current"},
        Datastore.model_validate(DATASTORE | {"version": "current"}),
    ),
    "datastores.load of a version": (
        lambda c: c.datastores.load("law", version="v4"),
        "PUT",
        "/v1/datastores/law",
        {"version": "v4"},
        Datastore.model_validate(DATASTORE | {"version": "v4"}),
    ),
    "datastores.unload": (lambda c: c.datastores.unload("law"), "DELETE", "/v1/datastores/law", None, None),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_sync_and_async_send_the_same_and_return_the_same(name: str, double: ContractDouble, client: Client) -> None:
    call, method, path, body, expected = OPERATIONS[name]
    answers = [call(client), run_async(double, call)]
    if expected is True:
        answers = [bool(answer) for answer in answers]
    assert answers == [expected, expected]
    assert len(double.seen) == 2
    assert double.seen[0] == double.seen[1]
    assert (double.seen[0].method, double.seen[0].path, double.seen[0].body) == (method, path, body)
    assert double.seen[0].user_agent == f"knnlm-client/{__version__}"


def test_every_operation_of_the_clients_is_compared() -> None:
    methods = {name for name in public_methods(Client) if name != "close"} - {"stream_completions"}
    methods |= {f"datastores.{name}" for name in public_methods(Datastores)}
    assert {name.split()[0] for name in OPERATIONS} == methods


def public_methods(cls: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


@pytest.mark.parametrize(("sync", "twin"), [(Client, AsyncClient), (Datastores, AsyncDatastores)])
def test_the_clients_have_the_same_methods_with_the_same_parameters(sync: type, twin: type) -> None:
    def shape(cls: type) -> dict[str, list[tuple[str, object, object]]]:
        return {
            {"aclose": "close"}.get(name, name): [
                (p.name, p.default, p.annotation) for p in signature.parameters.values()
            ]
            for name, signature in public_methods(cls).items()
        }

    assert shape(sync) == shape(twin)


@pytest.mark.parametrize(
    ("keywords", "model", "positional"),
    [
        (StreamCompletionOptions, CompletionRequest, {"prompt", "model"}),
        (ScoreOptions, ScoreRequest, {"input", "model"}),
    ],
)
def test_keywords_and_request_models_have_the_same_fields(
    keywords: type, model: type[BaseModel], positional: set[str]
) -> None:
    assert set(get_type_hints(keywords)) == set(model.model_fields) - positional
    assert set(get_type_hints(CompletionOptions)) < set(get_type_hints(StreamCompletionOptions))


def test_the_example_of_every_option_leaves_none_out() -> None:
    assert set(ALL_COMPLETION_OPTIONS) == set(get_type_hints(StreamCompletionOptions))
    assert set(SCORE_OPTIONS) == set(get_type_hints(ScoreOptions))


@pytest.mark.parametrize(
    "prompt", ["text", ["a", "b"], ["1", "2"], [1, 2], [[1], [2, 3]], ("a",), (1, 2), ((1,), (2,)), []]
)
def test_every_form_of_prompt_is_sent_as_it_is(prompt: Any, double: ContractDouble, client: Client) -> None:
    client.completions(prompt, model="m")
    assert double.seen[0].body["prompt"] == json.loads(json.dumps(prompt))


def test_none_is_left_to_the_server_and_not_sent(double: ContractDouble, client: Client) -> None:
    client.completions("x", model="m", max_tokens=None, stop=None, knn=KnnOptions(k=None, lmbda=0.0), echo=False)
    assert double.seen[0].body == {"prompt": "x", "model": "m", "knn": {"lambda": 0.0}, "echo": False}


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.completions("x", model="m", max_token=3),
        lambda c: c.completions("x", model="m", stream=True),
        lambda c: c.completions("x", model="m", max_tokens="many"),
        lambda c: c.completions("x", model="m", temperature=float("nan")),
        lambda c: c.completions([1, "a"], model="m"),
        lambda c: c.completions(None, model="m"),
        lambda c: c.score("one text", model="m"),
        lambda c: c.score(["x"], model="m", knn={"datastor": "law"}),
        lambda c: c.stream_completions("x", model=None),
        lambda c: c.stream_completions("x", model="m", temperature=float("inf")),
        lambda c: c.datastores.get(""),
        lambda c: c.datastores.unload(".."),
        lambda c: c.datastores.load("law", version=7),
    ],
)
def test_what_cannot_be_sent_is_refused_before_sending(
    call: Callable[[Client], object], double: ContractDouble, client: Client
) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        call(client)
    assert double.seen == []


def test_lambda_is_called_lmbda_in_python_and_lambda_on_the_wire() -> None:
    assert KnnOptions(lmbda=0.25).body() == {"lambda": 0.25}
    assert KnnOptions.model_validate({"lambda": 0.25}) == KnnOptions(lmbda=0.25)
    trace = Completion.model_validate(COMPLETION).choices[0].knn
    assert trace is not None
    assert trace[0].lmbda == 0.25
    per_token = ScoreResponse.model_validate(SCORE).results[0].per_token
    assert per_token is not None
    assert per_token[0].lmbda == 0.25


@pytest.mark.parametrize(
    ("model", "body"),
    [(Completion, COMPLETION), (CompletionChunk, CHUNKS[0]), (ScoreResponse, SCORE), (Datastore, DATASTORE)],
)
def test_an_answer_survives_being_written_out_again(model: type[BaseModel], body: dict[str, Any]) -> None:
    assert model.model_validate(body).model_dump(mode="json", by_alias=True, exclude_unset=True) == body


def test_fields_of_a_newer_server_are_kept(double: ContractDouble, client: Client) -> None:
    double.next_answer = JSONResponse(DATASTORE | {"replicas": 3})
    assert client.datastores.get("law").model_extra == {"replicas": 3}


def test_a_score_without_a_number_is_none(double: ContractDouble, client: Client) -> None:
    # JSON has no infinity (λ = 1 can give a token no probability), and token ids have no character offsets.
    nothing = {"nll": None, "perplexity": None, "bits_per_byte": None}
    [result] = SCORE["results"]
    result = result | {"mixed": nothing, "per_token": [result["per_token"][0] | {"offset": None}]}
    double.next_answer = JSONResponse(SCORE | {"results": [result]})
    [answer] = client.score([[1, 2]], model="m").results
    assert (answer.mixed.nll, answer.mixed.perplexity, answer.base.nll) == (None, None, 20.0)
    assert answer.per_token is not None
    assert answer.per_token[0].offset is None


def test_a_datastores_name_stays_inside_its_segment(double: ContractDouble, client: Client) -> None:
    assert client.datastores.get("../models?x#y z%2F").name == "../models?x#y z%2F"
    assert double.seen[0].path == "/v1/datastores/..%2Fmodels%3Fx%23y%20z%252F"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_base_url_may_end_as_openais_does(suffix: str, double: ContractDouble) -> None:
    with Client(double.url + suffix) as client:
        assert client.ready()
        client.models()
    assert [seen.path for seen in double.seen] == ["/ready", "/v1/models"]


def test_a_path_before_the_api_is_kept(double: ContractDouble) -> None:
    with Client(double.url + "/team/v1") as client, pytest.raises(ValueError, match="name"):
        client.datastores.get(".")
    with Client(double.url + "/team") as client, pytest.raises(Exception, match="HTTP 404"):
        client.models()
    assert [seen.path for seen in double.seen] == ["/team/v1/models"]


READING = ["completions", "score", "models", "health", "ready", "datastores.list", "datastores.get"]
CHANGING = ["datastores.load", "datastores.unload"]


@pytest.mark.parametrize("name", READING + CHANGING)
def test_the_admin_key_is_sent_to_change_datastores_and_nowhere_else(name: str, double: ContractDouble) -> None:
    call = OPERATIONS[name][0]
    with Client(double.url, api_key="user-key", admin_key="admin-key") as client:
        call(client)
    run_async(double, call, api_key="user-key", admin_key="admin-key")
    expected = "Bearer admin-key" if name in CHANGING else "Bearer user-key"
    assert [seen.authorization for seen in double.seen] == [expected, expected]


@pytest.mark.parametrize("name", READING + CHANGING)
def test_without_an_admin_key_the_api_key_is_sent_everywhere(name: str, double: ContractDouble) -> None:
    with Client(double.url, api_key="user-key") as client:
        OPERATIONS[name][0](client)
    with Client(double.url) as client:
        OPERATIONS[name][0](client)
    assert [seen.authorization for seen in double.seen] == ["Bearer user-key", None]


def test_an_admin_key_alone_is_not_sent_with_other_requests(double: ContractDouble) -> None:
    with Client(double.url, admin_key="admin-key") as client:
        client.models()
    assert double.seen[0].authorization is None


def test_a_stream_sends_the_api_key(double: ContractDouble) -> None:
    with Client(double.url, api_key="k") as client, client.stream_completions("x", model="m") as stream:
        next(stream)
    assert double.seen[0].authorization == "Bearer k"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url"),
        ({"base_url": "ftp://host"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host:port"}, "base_url"),
        ({"api_key": "secret\n"}, "api_key"),
        ({"api_key": ""}, "api_key"),
        ({"admin_key": "schlüssel"}, "admin_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(options: dict[str, Any], named: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=f"`{named}`") as caught:
            kind(**options)
        assert "secret" not in str(caught.value)


def test_a_server_that_is_not_ready_says_why(double: ContractDouble, client: Client) -> None:
    for ask in (client.ready, client.health):
        double.error(503, "not_ready", "loading smollm2")
        status = ask()
        assert not status
        assert status.reason == "loading smollm2"
    double.error(401, "invalid_api_key")
    with pytest.raises(Exception, match="invalid_api_key"):
        client.ready()


def test_many_requests_of_one_async_client_run_at_the_same_time(double: ContractDouble) -> None:
    double.hang = threading.Event()

    async def ask(client: AsyncClient) -> list[Completion]:
        tasks = [asyncio.create_task(client.completions("x", model="m", seed=seed)) for seed in range(20)]
        while len(double.seen) < len(tasks):  # all are there before any is answered
            await asyncio.sleep(0.002)
        assert double.hang is not None
        double.hang.set()
        return await asyncio.gather(*tasks)

    assert len(run_async(double, ask, timeout=20)) == 20
    assert sorted(seen.body["seed"] for seen in double.seen) == list(range(20))


def test_a_long_list_of_ids_is_not_reported_id_by_id() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": [*range(10_000), "x"], "model": "m"})
    assert caught.value.error_count() <= 4, "one for each form that a prompt may have"


def test_the_client_needs_only_httpx_and_pydantic() -> None:
    project = tomllib.loads((CLIENT_FOLDER / "pyproject.toml").read_text())["project"]
    assert {name.split(">")[0] for name in project["dependencies"]} == {"httpx", "pydantic"}
    program = """if True:
        import sys
        import knnlm_client
        names = {name.partition(".")[0] for name in sys.modules}
        print(sorted(names & {"knnlm_core", "knnlm_server", "torch", "numpy", "fastapi", "transformers"}))
    """
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]"
