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
from contract_bodies import (
    CHAT,
    CHAT_CHUNKS,
    CHUNKS,
    COMPLETION,
    DATASTORE,
    DATASTORES,
    DIFF,
    EXPORTED,
    FORGOTTEN,
    LEARNED,
    LOAD_EVENTS,
    NEIGHBORS,
    PURGED,
    READY,
    SCORE,
    SCORE_EVENTS,
    TOKENIZATION,
    TOKENIZER_INFO,
    VERIFIED,
    VERSIONS,
)
from contract_double import ContractDouble, run_async
from every_operation import (
    ALL_CHAT_OPTIONS,
    ALL_COMPLETION_OPTIONS,
    NEIGHBORS_OPTIONS,
    OPERATIONS,
    SCORE_OPTIONS,
    STREAMS,
)
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from knnlm_client import (
    AsyncClient,
    AsyncDatastores,
    ChatCompletion,
    ChatCompletionChunk,
    ChatOptions,
    ChatRequest,
    Client,
    Completion,
    CompletionChunk,
    CompletionOptions,
    CompletionRequest,
    Datastore,
    Datastores,
    ExportedDocument,
    Forgotten,
    KnnOptions,
    Learned,
    NeighborsOptions,
    NeighborsRequest,
    NeighborsResponse,
    Purged,
    Readiness,
    ScoreOptions,
    ScoreRequest,
    ScoreResponse,
    StreamChatOptions,
    StreamCompletionOptions,
    Tokenization,
    TokenizeChatRequest,
    TokenizeOptions,
    TokenizeRequest,
    TokenizerInfo,
    UnexpectedResponse,
    Verified,
    VersionDiff,
    __version__,
)
from knnlm_client.responses import DatastoreListBody, LoadEventBody, ReadyBody, ScoreLine, VersionListBody

CLIENT_FOLDER = Path(__file__).parents[2] / "clients" / "python"


@pytest.mark.parametrize("name", OPERATIONS)
def test_sync_and_async_send_the_same_and_return_the_same(name: str, double: ContractDouble, client: Client) -> None:
    call, method, path, body, expected = OPERATIONS[name]
    answers = [call(client), run_async(double, call)]
    assert [type(answer) for answer in answers] == [type(expected)] * 2
    assert answers == [expected, expected]
    assert len(double.seen) == 2
    assert double.seen[0] == double.seen[1]
    sent = double.seen[0]
    assert (sent.method, f"{sent.path}?{sent.query}".rstrip("?"), sent.body) == (method, path, body)
    assert double.seen[0].user_agent == f"knnlm-client/{__version__}"


def test_every_operation_of_the_clients_is_compared() -> None:
    methods = {name for name in public_methods(Client) if name != "close"}
    methods |= {f"datastores.{name}" for name in public_methods(Datastores)}
    assert {name.split()[0] for name in OPERATIONS | STREAMS} == methods
    returned = {name: member.return_annotation for name, member in public_methods(Client).items()}
    returned |= {f"datastores.{name}": member.return_annotation for name, member in public_methods(Datastores).items()}
    assert set(STREAMS) == {name for name, annotation in returned.items() if annotation.startswith("Stream[")}


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
    ("keywords", "models", "positional"),
    [
        (StreamCompletionOptions, (CompletionRequest,), {"prompt", "model"}),
        (StreamChatOptions, (ChatRequest,), {"messages", "model"}),
        (ScoreOptions, (ScoreRequest,), {"input", "model"}),
        (NeighborsOptions, (NeighborsRequest,), {"input", "model"}),
        (TokenizeOptions, (TokenizeRequest, TokenizeChatRequest), {"prompt", "messages"}),
    ],
)
def test_keywords_and_request_models_have_the_same_fields(
    keywords: type, models: tuple[type[BaseModel], ...], positional: set[str]
) -> None:
    fields = {name for model in models for name in model.model_fields}
    assert set(get_type_hints(keywords)) == fields - positional


@pytest.mark.parametrize(
    ("whole", "stream"), [(CompletionOptions, StreamCompletionOptions), (ChatOptions, StreamChatOptions)]
)
def test_a_stream_takes_the_keywords_of_the_whole_and_its_own(whole: type, stream: type) -> None:
    assert set(get_type_hints(stream)) == set(get_type_hints(whole)) | {"stream_options"}


def test_the_example_of_every_option_leaves_none_out() -> None:
    assert set(ALL_COMPLETION_OPTIONS) == set(get_type_hints(StreamCompletionOptions))
    assert set(ALL_CHAT_OPTIONS) == set(get_type_hints(StreamChatOptions))
    assert set(SCORE_OPTIONS) == set(get_type_hints(ScoreOptions))
    assert set(NEIGHBORS_OPTIONS) == set(get_type_hints(NeighborsOptions))


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
        lambda c: c.score(["x", [1]], model="m"),
        lambda c: c.score([{"document": "act-7"}], model="m"),
        lambda c: c.score([{"context": "The buyer"}], model="m"),
        lambda c: c.score([{"context": "The buyer", "text": [523]}], model="m"),
        lambda c: c.score([{"context": [504], "text": " shall"}], model="m"),
        lambda c: c.score(["x"], model="m", stream=True),
        lambda c: c.stream_score(["x"], model="m", stream_options=None),
        lambda c: c.chat("Wer zahlt?", model="m"),
        lambda c: c.chat([{"role": "user"}], model="m"),
        lambda c: c.chat([{"role": "user", "content": "x", "tool_calls": []}], model="m"),
        lambda c: c.chat([{"role": "user", "content": [{"text": "x"}]}], model="m"),
        lambda c: c.chat([{"role": "user", "content": "x"}], model="m", logprobs=5),
        lambda c: c.chat([{"role": "user", "content": "x"}], model="m", echo=True),
        lambda c: c.chat([{"role": "user", "content": "x"}], model="m", chat_template_kwargs={"now": object()}),
        lambda c: c.stream_chat([{"role": "user", "content": "x"}], model="m", tools=[]),
        lambda c: c.neighbors([1, "a"], model="m"),
        lambda c: c.neighbors("x", model="m", k=3),
        lambda c: c.tokenize(None),
        lambda c: c.tokenize("x", add_generation_prompt=True),
        lambda c: c.tokenize([{"role": "user", "content": "x"}], add_special_tokens=True),
        lambda c: c.detokenize("x"),
        lambda c: c.score(["x"], model="m", knn={"datastor": "law"}),
        lambda c: c.stream_completions("x", model=None),
        lambda c: c.stream_completions("x", model="m", temperature=float("inf")),
        lambda c: c.datastores.get(""),
        lambda c: c.datastores.unload(".."),
        lambda c: c.datastores.load("law", version=7),
        lambda c: c.datastores.load("law", aliases="statutes"),
        lambda c: c.datastores.load("law", aliases=[1]),
        lambda c: c.datastores.stream_load("law", default="yes, please"),
        lambda c: c.datastores.rollback(""),
        lambda c: c.datastores.unload("law/documents/act-7"),
        lambda c: c.datastores.learn("law", {"id": "a", "text": "x"}),
        lambda c: c.datastores.learn("law", ["x"]),
        lambda c: c.datastores.learn("law", [{"id": "a"}]),
        lambda c: c.datastores.learn("law", [{"id": "a", "text": "x", "colour": "red"}]),
        lambda c: c.datastores.learn("law", [{"id": "a", "text": "x", "tags": "zx"}]),
        lambda c: c.datastores.learn("law", [{"id": "a", "text": "x"}], update="yes, please"),
        lambda c: c.datastores.forget("law", ""),
        lambda c: c.datastores.forget("law", "half a character: \ud800"),
        lambda c: c.datastores.forget("law/documents/a", "b"),
        lambda c: c.datastores.compact(""),
        lambda c: c.datastores.purge("law", "manuals/valve"),
        lambda c: c.datastores.purge("law", [7]),
        lambda c: c.datastores.versions("."),
        lambda c: c.datastores.verify("law", 7),
        lambda c: c.datastores.diff("law", "v2", None),
        lambda c: c.datastores.export("a/b"),
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
    [
        (Completion, COMPLETION),
        *((CompletionChunk, chunk) for chunk in CHUNKS),
        (ChatCompletion, CHAT),
        *((ChatCompletionChunk, chunk) for chunk in CHAT_CHUNKS),
        (ScoreResponse, SCORE),
        *((ScoreLine, event) for event in SCORE_EVENTS),
        (NeighborsResponse, NEIGHBORS),
        (Tokenization, TOKENIZATION),
        (TokenizerInfo, TOKENIZER_INFO),
        (Datastore, DATASTORE),
        (Learned, LEARNED),
        (Forgotten, FORGOTTEN),
        (Purged, PURGED),
        (Verified, VERIFIED),
        (VersionDiff, DIFF),
        *((ExportedDocument, document) for document in EXPORTED),
        (VersionListBody, {name: value for name, value in VERSIONS.items() if name != "object"}),
        *((LoadEventBody, event) for event in LOAD_EVENTS),
        (DatastoreListBody, {name: value for name, value in DATASTORES.items() if name != "object"}),
        (ReadyBody, READY),
    ],
)
def test_an_answer_survives_being_written_out_again(model: type[BaseModel], body: dict[str, Any]) -> None:
    assert model.model_validate(body).model_dump(mode="json", by_alias=True, exclude_unset=True) == body


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (Completion, COMPLETION),
        (ChatCompletion, CHAT),
        (ChatCompletionChunk, CHAT_CHUNKS[2]),
        (ScoreResponse, SCORE),
        (ScoreLine, SCORE_EVENTS[1]),
        (NeighborsResponse, NEIGHBORS),
        (TokenizerInfo, TOKENIZER_INFO),
        (Datastore, DATASTORE),
        (DatastoreListBody, {name: value for name, value in DATASTORES.items() if name != "object"}),
        (LoadEventBody, LOAD_EVENTS[0]),
        (Learned, LEARNED),
        (Forgotten, FORGOTTEN),
        (Purged, PURGED),
        (Verified, VERIFIED),
        (VersionDiff, DIFF),
        (ExportedDocument, EXPORTED[0]),
        (VersionListBody, {name: value for name, value in VERSIONS.items() if name != "object"}),
        (ReadyBody, READY),
    ],
)
def test_every_field_of_an_answer_is_declared(model: type[BaseModel], body: dict[str, Any]) -> None:
    def undeclared(value: object) -> set[str]:
        if isinstance(value, (list, tuple)):
            return set().union(*map(undeclared, value))
        if not isinstance(value, BaseModel):
            return set()
        fields = [getattr(value, name) for name in type(value).model_fields]
        return set(value.model_extra or {}) | undeclared(fields)

    assert undeclared(model.model_validate(body)) == set()


def test_an_answers_message_is_the_next_requests_as_it_is(double: ContractDouble, client: Client) -> None:
    answer = client.chat([{"role": "user", "content": "Wer zahlt?"}], model="m")
    client.chat([answer.choices[0].message], model="m")
    assert double.seen[1].body["messages"] == [{"role": "assistant", "content": "Der Käufer muß"}]


def test_the_logprobs_of_a_chat_are_typed() -> None:
    logprobs = ChatCompletion.model_validate(CHAT).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    (token,) = logprobs.content
    assert (token.logprob, bytes(token.bytes or []).decode()) == (-0.25, " muß")
    assert [other.token for other in token.top_logprobs] == [" muß", " kann"]


def test_overlap_is_typed() -> None:
    answer = ScoreResponse.model_validate(SCORE)
    for sums in (answer.total, *answer.results):
        assert [bucket.longest_match for bucket in sums.overlap or ()] == [(2, 3), (32, None)]
    assert [token.longest_match for token in answer.results[0].per_token or ()] == [3]
    assert answer.results[0].document_id == "act-7"


def test_the_loaded_datastores_are_a_sequence_that_knows_what_is_published(client: Client) -> None:
    listed = client.datastores.list()
    assert [store.name for store in listed] == ["law"]
    assert (len(listed), listed[0], listed[-1:]) == (1, listed.loaded[0], listed.loaded)
    assert listed.loaded[0] in listed
    assert listed.published == ("medicine",)
    assert (listed.aliases, listed.default, listed.persistent) == ({"statutes": "law"}, "law", True)


def test_a_ready_server_says_how_busy_it_is(double: ContractDouble, client: Client) -> None:
    status = client.ready()
    assert (status.running, status.waiting, status.scoring) == (3, 2, 1)
    double.next_answer = JSONResponse(READY | {"replicas": 2})
    assert client.ready().model_extra == {"replicas": 2}
    double.error(503, "not_ready", "loading smollm2")
    assert client.ready() == Readiness(ok=False, reason="loading smollm2")


def test_a_ready_page_of_another_server_is_unexpected(double: ContractDouble, client: Client) -> None:
    double.next_answer = JSONResponse({})
    with pytest.raises(UnexpectedResponse, match="this is no ReadyBody"):
        client.ready()


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
    assert client.datastores.get("models?x#y z%2F").name == "models?x#y z%2F"
    assert double.seen[0].path == "/v1/datastores/models%3Fx%23y%20z%252F"


@pytest.mark.parametrize(
    ("document_id", "quoted"),
    [
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("../x", "..%2Fx"),
        ("a/./b/", "a%2F.%2Fb%2F"),
        ("/a", "%2Fa"),
        ("%2e%2E", "%252e%252E"),
        ("a?b#c d+e&f", "a%3Fb%23c%20d%2Be%26f"),
        ("Käufer\n🙂", "K%C3%A4ufer%0A%F0%9F%99%82"),
    ],
)
def test_a_documents_id_stays_inside_its_segment(
    document_id: str, quoted: str, double: ContractDouble, client: Client
) -> None:
    double.next_answer = JSONResponse(FORGOTTEN)
    client.datastores.forget("law", document_id)
    assert (double.seen[0].path, double.seen[0].query) == (f"/v1/datastores/law/documents/{quoted}", "")


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


FOR_EVERYBODY = {"datastores.list", "datastores.get"}
FOR_ADMINS = sorted({name for name in OPERATIONS if name.startswith("datastores.") and " " not in name} - FOR_EVERYBODY)
OTHERS = sorted({name for name in OPERATIONS if " " not in name} - set(FOR_ADMINS))


@pytest.mark.parametrize("name", OTHERS + FOR_ADMINS)
def test_the_admin_key_is_sent_to_administer_datastores_and_nowhere_else(name: str, double: ContractDouble) -> None:
    call = OPERATIONS[name][0]
    with Client(double.url, api_key="user-key", admin_key="admin-key") as client:
        call(client)
    run_async(double, call, api_key="user-key", admin_key="admin-key")
    expected = "Bearer admin-key" if name in FOR_ADMINS else "Bearer user-key"
    assert [seen.authorization for seen in double.seen] == [expected, expected]


@pytest.mark.parametrize("name", OTHERS + FOR_ADMINS)
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


@pytest.mark.parametrize("name", ["datastores.stream_load", "datastores.export"])
def test_a_stream_for_admins_sends_the_admin_key(name: str, double: ContractDouble) -> None:
    with Client(double.url, api_key="k", admin_key="admin-key") as client, STREAMS[name][0](client) as stream:
        next(stream)
    assert double.seen[0].authorization == "Bearer admin-key"


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_sends_the_api_key(name: str, double: ContractDouble) -> None:
    with Client(double.url, api_key="k") as client, STREAMS[name][0](client) as stream:
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
