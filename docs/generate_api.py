"""docs/api.md from the server's own OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

Json = dict[str, Any]
_INTRODUCTION = """# HTTP API

<!-- Written by docs/generate.py from the server's own /openapi.json; change the routes and schemas instead. -->

`GET /openapi.json` of a server says the same to machines. Conventions:

- Bodies are JSON. `?` behind a type: may be left out, or null. `[ ]`: a list. Bounds stand in brackets behind the type.
- *key*: needs the API key where the server has one. *admin key*: needs the admin key; without one the route works on a
  server that listens on this machine only. Both are sent as `Authorization: Bearer KEY`. See [Secure](secure.md).
- `/v1/completions` and `/v1/chat/completions` stream as server-sent events with `"stream": true`, ended by
  `data: [DONE]`; `/v1/score` as lines of JSON (NDJSON); `PUT /v1/datastores/{name}` as server-sent events.
- Unknown fields of completions and chat are ignored, as clients send many; inside `knn` an unknown field is an error.
- Every answer has `X-Request-Id`: the one that the request sent, or a new one. Errors: [errors.md](errors.md). Every
  route may answer 413 and 500; they are not listed.
"""
_ALWAYS = ("413", "500")
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_LENGTHS = (
    ("minLength", "characters ≥"),
    ("maxLength", "characters ≤"),
    ("minItems", "items ≥"),
    ("maxItems", "items ≤"),
)


def api_page() -> str:
    """Every route with what it takes and answers, then the objects that they share."""
    document = _document()
    schemas: dict[str, Json] = document["components"]["schemas"]
    lines = [_INTRODUCTION, "| route | what | needs |", "|---|---|---|"]
    routes = [(path, verb, operation) for path, item in document["paths"].items() for verb, operation in item.items()]
    for path, verb, operation in routes:
        lines.append(
            f"| [`{verb.upper()} {path}`](#{_anchor(verb, path)}) | {operation['summary']} | {_needs(operation)} |"
        )
    for path, verb, operation in routes:
        lines += ["", *_route(path, verb, operation, schemas)]
    bodies = {name for _, _, operation in routes for name in _body_names(operation)}
    lines += ["", "## Objects", "", "What stands in bodies and answers, by name."]
    for name in sorted(schemas.keys() - bodies):
        lines += ["", f"### {name}", "", *_object(schemas[name])]
    return "\n".join([*lines, ""])


def _document() -> Json:
    from knnlm_server.app import create_app  # imports torch; loads no model
    from knnlm_server.settings import ServerSettings

    settings = ServerSettings(
        model="none", playground=False, api_key=("a",), admin_key="b", max_requests_per_key=1, datastores=None
    )  # type: ignore[arg-type]
    return create_app(settings).openapi()


def _route(path: str, verb: str, operation: Json, schemas: dict[str, Json]) -> Iterator[str]:
    yield from (f"## {verb.upper()} {path}", "")
    yield _prose(operation.get("description") or operation["summary"] + ".")
    if needs := _needs(operation):
        yield from ("", f"Needs the {needs}.")
    parameters = operation.get("parameters", ())
    if parameters:
        yield from ("", "| parameter | in | type | what |", "|---|---|---|---|")
        for given in parameters:
            what = _prose(given.get("description", ""))
            yield f"| `{given['name']}` | {given['in']} | {_type(given['schema'])} | {what} |"
    for name in _body_names(operation):
        yield from ("", *_object(schemas[name]))
    yield from ("", "| status | answer |", "|---|---|")
    answers = {status: answer for status, answer in operation["responses"].items() if status not in _ALWAYS}
    for status, answer in answers.items():
        if "content" in answer:
            yield f"| {status} | {'; '.join(_content(answer['content']))} |"
    for _, group in groupby(
        sorted(status for status, answer in answers.items() if "content" not in answer), lambda _: 0
    ):
        yield f"| {', '.join(group)} | an [error](errors.md) |"


def _body_names(operation: Json) -> list[str]:
    body = operation.get("requestBody")
    return list(_references(body["content"]["application/json"]["schema"], deep=False)) if body else []


def _needs(operation: Json) -> str:
    names = {name for requirement in operation.get("security", ()) for name in requirement}
    return "key" if "ApiKey" in names else "admin key" if names else ""


def _object(schema: Json) -> Iterator[str]:
    if description := schema.get("description"):
        yield from (_prose(description), "")
    properties = schema.get("properties")
    if not properties:
        yield f"{_type(schema)}"
        return
    required = set(schema.get("required", ()))
    yield from ("| field | type | default | what |", "|---|---|---|---|")
    for name, field in properties.items():
        default = "" if field.get("default") is None else f"`{_written(field['default'])}`"
        shown = "required" if name in required and "default" not in field else default
        yield f"| `{name}` | {_type(field)} | {shown} | {_prose(field.get('description', ''))} |"


def _type(schema: Json) -> str:
    """A schema in a few words: alternatives, bounds, what lists hold."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            parts = [_type(part) for part in schema[several] if part.get("type") != "null"]
            is_optional = len(parts) < len(schema[several])
            return " or ".join(dict.fromkeys(parts)) + (" ?" if is_optional else "")
    if "enum" in schema:
        return ", ".join(f"`{_written(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_written(schema['const'])}`"
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"[ {_items(schema)} ]{_bounds(schema)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}{_bounds(schema)}"
    return f"{kind if isinstance(kind, str) else ' or '.join(kind)}{_bounds(schema)}"


def _items(schema: Json) -> str:
    if "prefixItems" in schema:
        return ", ".join(_type(item) for item in schema["prefixItems"])
    return _type(schema.get("items", {}))


def _bounds(schema: Json) -> str:
    found = [f"{sign} {_written(schema[name])}" for name, sign in (*_BOUNDS, *_LENGTHS) if name in schema]
    if "maxProperties" in schema:
        found.append(f"members ≤ {schema['maxProperties']}")
    if "pattern" in schema:
        found.append(f"`{schema['pattern']}`".replace("|", "\\|"))
    return f" ({', '.join(found)})" if found else ""


def _content(content: Json) -> Iterator[str]:
    for media_type, given in content.items():
        names = [f"[{name}](#{name.lower()})" for name in dict.fromkeys(_references(given.get("schema", {})))]
        names = [name for name in names if "ErrorBody" not in name]
        told = " or ".join(names) or "text"
        yield told if media_type == "application/json" else f"`{media_type}`: {told}"


def _references(node: Any, *, deep: bool = True) -> Iterator[str]:
    """Names of the schemas that a node refers to; without ``deep`` only alternatives of the node itself."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        below: Iterable[Any] = node.values() if deep else (node.get("anyOf", ()), node.get("oneOf", ()))
        for child in below:
            yield from _references(child, deep=deep)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _references(child, deep=deep)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _prose(text: str) -> str:
    """On one line, with nothing that would end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _anchor(verb: str, path: str) -> str:
    kept = (character for character in f"{verb} {path}".lower() if character.isalnum() or character in "-_ ")
    return "".join(kept).replace(" ", "-")
