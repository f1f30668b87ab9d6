"""`/openapi.json` is a valid document, leaves out no route and no error, and is true of what a live server answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi.routing import iter_route_contexts
from live_server import LiveServer, parse_events
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from small_stores import Published, Start

from knnlm_core.datastore.layout import is_name
from knnlm_server.api.errors import STATUS
from knnlm_server.api.schemas.completions import CompletionBody
from knnlm_server.api.schemas.generation import GenerationBody
from knnlm_server.app import create_app
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.settings import ServerSettings

Json = dict[str, Any]
LAW = "tiny-lm@law"
PROMPT = "The tenant"
UNDOCUMENTED = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/playground"}


@pytest.fixture
def document(live_server: LiveServer) -> Json:
    return live_server.http.get("/openapi.json").json()


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def resolved(document: Json, node: Json) -> Json:
    """What a reference means; other nodes mean themselves."""
    if "$ref" not in node:
        return node
    found: Any = document
    for step in node["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return found


def validator(document: Json, schema: Json) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]}, validate_formats=True)


def check(document: Json, response: httpx.Response, path: str) -> None:
    """An answer has a status, headers and a body that the document gives the route."""
    operation = document["paths"][path][response.request.method.lower()]
    documented = resolved(document, operation["responses"][str(response.status_code)])
    for name, header in documented["headers"].items():
        schema = resolved(document, header)["schema"]
        value = response.headers[name]
        validator(document, schema).validate(int(value) if schema.get("type") == "integer" else value)
    media_type = response.headers["content-type"].split(";")[0]
    schema = documented["content"][media_type]["schema"]
    if media_type == "application/json":
        validator(document, schema).validate(response.json())
    elif media_type == "text/event-stream":
        chunk = schema["properties"]["data"]["anyOf"][1]["contentSchema"]
        events = parse_events(response.text)
        assert events
        for event in events:
            validator(document, chunk).validate(event)
    elif media_type == "application/x-ndjson":
        validator(document, schema).validate([json.loads(line) for line in response.text.splitlines()])
    else:
        assert media_type == "text/plain"


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_document_is_valid_openapi(document: Json) -> None:
    assert document["openapi"].startswith("3.1.")
    OPENAPI_31_VALIDATOR.validate(document)


def test_every_reference_leads_somewhere_and_every_component_is_used(document: Json) -> None:
    seen: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str) and reference not in seen:
                seen.add(reference)
                walk(resolved(document, node))
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(document["paths"])
    components = document["components"]
    have = {f"#/components/{kind}/{name}" for kind in ("schemas", "responses", "headers") for name in components[kind]}
    assert seen <= have
    # A status that no route of this server can have is documented nowhere else either.
    assert {name for name in have - seen if "/responses/" not in name} == set()


def test_every_schema_compiles(document: Json) -> None:
    for name in document["components"]["schemas"]:
        validator(document, {"$ref": f"#/components/schemas/{name}"})


def test_every_route_is_in_the_document(live_server: LiveServer, document: Json) -> None:
    routes = {
        (method.lower(), route.path_format)
        for route in iter_route_contexts(live_server.app.routes)
        for method in route.methods or ()
        if route.path_format not in UNDOCUMENTED
    }
    assert routes == {(method, path) for method, path, _ in operations(document)}
    assert len(routes) >= 12


def test_every_route_documents_its_answer_and_its_errors(document: Json) -> None:
    for method, path, operation in operations(document):
        responses = operation["responses"]
        assert "422" not in responses
        assert {"413", "500"} <= responses.keys(), path
        for status, reference in responses.items():
            response = resolved(document, reference)
            assert "X-Request-Id" in response["headers"], (path, status)
            for media_type, content in response["content"].items():
                assert content["schema"], (method, path, status, media_type)
        if "requestBody" in operation:
            assert "400" in responses
        if path.startswith("/v1/"):
            assert "503" in responses
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_objects_of_answers_are_closed(document: Json) -> None:
    """An answer says nothing that is not documented."""
    schemas = document["components"]["schemas"]
    bodies = {name for name in schemas if name.endswith("Body") and name != "ErrorBody"}
    inputs = bodies | {"Part", "Message", "StreamOptions", "DocumentInput"}
    for name, schema in schemas.items():
        if schema.get("type") == "object" and name not in inputs:
            assert schema["additionalProperties"] is False, name


def test_every_status_of_the_error_table_is_an_answer_of_some_route(document: Json) -> None:
    statuses = {int(status) for *_, operation in operations(document) for status in operation["responses"]}
    # Nobody reads the answer to a cancelled request; keys, their limit and the admin's rights are not asked for here.
    assert {status for status, _ in STATUS.values()} - statuses == {401, 403, 429, 499}


def test_keys_are_documented_as_the_server_asks_for_them() -> None:
    def security(path: str, method: str, **settings: Any) -> tuple[list[str], set[str]]:
        document = create_app(ServerSettings(model="none", **settings)).openapi()
        OPENAPI_31_VALIDATOR.validate(document)
        operation = document["paths"][path][method]
        names = [name for requirement in operation.get("security", ()) for name in requirement]
        assert set(names) <= document["components"].get("securitySchemes", {}).keys()
        return names, operation["responses"].keys() & {"401", "403", "429"}

    change = ("/v1/datastores/{name}", "put")
    read = ("/v1/models", "get")
    assert security(*change) == ([], set())
    assert security(*change, host="0.0.0.0") == ([], {"403"})
    assert security(*change, api_key="k") == (["ApiKey"], {"401"})
    assert security(*change, api_key="k", admin_key="a") == (["AdminKey"], {"401", "403"})
    assert security(*read, admin_key="a") == ([], set())
    assert security(*read, api_key="k", admin_key="a") == (["ApiKey", "AdminKey"], {"401"})
    assert security(*read, api_key="k", max_requests_per_key=2) == (["ApiKey"], {"401", "429"})
    assert security("/health", "get", api_key="k") == ([], set())


# -- requests ----------------------------------------------------------------------------------------------------------


def test_the_limits_shown_are_the_limits_enforced(live_server: LiveServer, document: Json) -> None:
    """One step beyond each limit that is shown of a number, the server refuses it."""
    properties = document["components"]["schemas"]["CompletionBody"]["properties"]
    checked = 0
    for field, schema in properties.items():
        for member in schema.get("anyOf", ()):
            if member.get("type") not in ("integer", "number"):
                continue
            step = 1 if member["type"] == "integer" else 1e-6
            beyond = [member["minimum"] - step] if "minimum" in member else []
            beyond += [member["maximum"] + step] if "maximum" in member else []
            beyond += [member["exclusiveMaximum"]] if "exclusiveMaximum" in member else []
            for value in beyond:
                response = live_server.post("/v1/completions", {"prompt": PROMPT, field: value})
                assert response.status_code == 400, (field, value)
                # `best_of` is how many choices are generated, which the engine calls `n`.
                assert response.json()["error"]["param"] in (field, field.replace("best_of", "n"))
                checked += 1
    assert checked >= 20


@pytest.mark.parametrize(
    "field", sorted(GenerationBody.model_fields.keys() & SamplingParams.__dataclass_fields__.keys())
)
def test_every_sampling_field_shows_a_limit(document: Json, field: str) -> None:
    schema = document["components"]["schemas"]["CompletionBody"]["properties"][field]
    if schema.get("type") != "boolean":
        assert all(len(member) > 1 for member in schema["anyOf"] if member["type"] not in ("null", "boolean")), schema


def test_a_whole_number_may_be_written_with_a_fraction(live_server: LiveServer) -> None:
    """JSON knows one kind of number, and its schema calls 8.0 an integer."""

    def complete(body: str) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return live_server.http.post("/v1/completions", content=body, headers=headers)

    whole = complete('{"prompt": [5, 17], "max_tokens": 3, "temperature": 1, "seed": 7, "logit_bias": {"5": -1}}')
    assert whole.status_code == 200
    written = complete(
        '{"prompt": [5.0, 1.7e1], "max_tokens": 3.0, "temperature": 1.0, "seed": 7.0, "logit_bias": {"5": -1.0}}'
    )
    assert written.json()["choices"] == whole.json()["choices"]
    for number in ("3.5", "1e400", "-3.0", "1e30", '"3"'):
        refused = complete(f'{{"prompt": "x", "max_tokens": {number}}}')
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens"), number


def test_null_inside_knn_says_nothing_and_an_empty_gate_is_none(live_server: LiveServer) -> None:
    nulls = dict.fromkeys(("datastore", "k", "temperature", "lambda", "gate", "gate_threshold", "speculate"))
    plain = live_server.complete(PROMPT, max_tokens=3)
    assert live_server.complete(PROMPT, max_tokens=3, knn=nulls)["choices"] == plain["choices"]
    refused = live_server.post("/v1/completions", {"prompt": PROMPT, "model": LAW, "knn": {"gate": ""}})
    assert refused.json()["error"]["param"] == "knn.gate"


def test_the_example_of_a_body_is_accepted(live_server: LiveServer, document: Json) -> None:
    examined = 0
    for _, path, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        schema = resolved(document, body)
        for example in schema.get("examples", ()):
            validator(document, schema).validate(example)
            if path == "/v1/chat/completions":  # the model here takes no conversations; schemathesis sends the example
                continue
            response = live_server.post(path, example)
            assert response.status_code == 200, response.text
            check(document, response, path)
            examined += 1
    assert examined >= 1


@pytest.mark.parametrize("name", ["law", "a", "0", "a.b_c-d", "a" * 63, "", "-a", "A", "a/b", "a" * 64, "é", "a b"])
def test_the_pattern_of_a_name_is_the_rule(document: Json, name: str) -> None:
    (parameter,) = document["paths"]["/v1/datastores/{name}"]["put"]["parameters"]
    assert validator(document, parameter["schema"]).is_valid(name) == is_name(name)


# -- answers -----------------------------------------------------------------------------------------------------------

FULL = {"model": LAW, "max_tokens": 6, "logprobs": 2, "seed": 3}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": [PROMPT, "A buyer"], "n": 2, **FULL, "echo": True, "knn": {"trace": True}},
        {"stream": True, **FULL, "echo": True, "knn": {"trace": True}, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"knn": {"trace": True}, "max_tokens": 2},
        {"model": LAW, "echo": True, "max_tokens": 0, "logprobs": 0, "knn": {"lambda": 1}},
        {"model": "other"},
        {"max_tokens": 10_000},
        {"knn": {"datastore": "nope"}},
        {"prompt": None},
    ],
    ids=str,
)
def test_completions_answer_as_documented(live_server: LiveServer, document: Json, body: Json) -> None:
    check(document, live_server.post("/v1/completions", {"prompt": PROMPT, **body}), "/v1/completions")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": LAW, "per_token": True},
        {"input": ["x", ""]},
        {"input": [[], [5]], "stream": True},
        {"input": [PROMPT, PROMPT], "model": LAW, "stream": True, "per_token": True},
    ],
    ids=str,
)
def test_scores_answer_as_documented(live_server: LiveServer, document: Json, body: Json) -> None:
    check(document, live_server.post("/v1/score", {"input": PROMPT, **body}), "/v1/score")


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/v1/models", {}),
        ("/v1/models/{model}", {"model": LAW}),
        ("/v1/models/{model}", {"model": "nope"}),
        ("/v1/datastores", {}),
        ("/v1/datastores/{name}", {"name": "law"}),
        ("/v1/datastores/{name}", {"name": "nope"}),
        ("/health", {}),
        ("/ready", {}),
        ("/version", {}),
        ("/metrics", {}),
        ("/tokenizer_info", {}),
    ],
    ids=str,
)
def test_what_is_read_is_as_documented(live_server: LiveServer, document: Json, path: str, values: Json) -> None:
    check(document, live_server.http.get(path.format(**values)), path)


def test_changes_of_datastores_answer_as_documented(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, load=("news",))
    document = server.http.get("/openapi.json").json()
    path = "/v1/datastores/{name}"
    seen = []
    for method, name, body in (
        ("PUT", "law", {"version": published.law_old}),
        ("PUT", "law", {"aliases": ["statutes"], "default": True}),
        ("PUT", "statutes", {"stream": True}),
        ("PUT", "absent", {"stream": True}),
        ("PUT", "law", {"aliases": ["news"]}),
        ("GET", "law", None),
        ("PUT", "law", {"version": "x"}),
        ("PUT", "Law", None),
        ("PUT", "nope", None),
        ("DELETE", "law", None),
        ("DELETE", "law", None),
        ("PUT", "law", None),
    ):
        response = server.http.request(method, path.format(name=name), json=body)
        check(document, response, path)
        seen.append(response.status_code)
    assert seen == [201, 200, 200, 200, 409, 200, 400, 400, 404, 200, 404, 201]
    for status in (200, 200, 409):
        response = server.http.post("/v1/datastores/news/rollback" if status == 409 else "/v1/datastores/law/rollback")
        check(document, response, "/v1/datastores/{name}/rollback")
        assert response.status_code == status


# -- routing -----------------------------------------------------------------------------------------------------------


def test_a_wrong_method_is_told_every_right_one(live_server: LiveServer, document: Json) -> None:
    for path, item in document["paths"].items():
        address = path.format(name="law", model="tiny-lm", document_id="d")
        for wrong in {"PATCH", "OPTIONS", "DELETE", "GET"} - {method.upper() for method in item}:
            response = live_server.http.request(wrong, address)
            assert response.status_code == 405, (wrong, path)
            assert response.headers["allow"] == ", ".join(sorted(method.upper() for method in item))


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/datastores/", "/health/"])
def test_a_slash_too_many_is_an_unknown_route(live_server: LiveServer, path: str) -> None:
    response = live_server.http.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] in ("route_not_found", "model_not_found")


def test_completion_fields_all_have_a_line(document: Json) -> None:
    """The document shows every field that the route takes."""
    shown = document["components"]["schemas"]["CompletionBody"]["properties"]
    assert shown.keys() == CompletionBody.model_fields.keys()
