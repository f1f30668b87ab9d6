"""The bodies of requests that change datastores or look into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from knnlm_client.requests.common import RequestPart, Texts
from knnlm_client.responses.datastores import ExportedDocument


class LoadRequest(RequestPart):
    """The body of `PUT /v1/datastores/{name}`.

    Attributes:
        version: a published version, or `current` for the one that is published as current.
        aliases: other words for the name, instead of those that it has.
        default: whether requests that name no datastore use this one.
    """

    version: str
    aliases: list[str] | None = None
    default: bool | None = None


class NewDocument(RequestPart):
    """A document to learn.

    Attributes:
        id: any text that no other document of the datastore has for its id.
        tags: words of the caller's own.
    """

    # So that a document of an export can be learned as it is.
    model_config = ConfigDict(from_attributes=True)

    id: str
    text: str
    uri: str | None = None
    title: str | None = None
    licence: str | None = None
    tags: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_dict(cls, given: object) -> object:
        return dict(given) if isinstance(given, Mapping) else given


# A mapping has the fields of `NewDocument`, under the same names.
Documents: TypeAlias = Sequence[NewDocument | ExportedDocument | Mapping[str, object]]


class LearnRequest(RequestPart):
    """The body of `POST /v1/datastores/{name}/documents`.

    Attributes:
        update: replace documents whose id is there already.
    """

    documents: Annotated[list[NewDocument], Field(fail_fast=True)]
    update: bool


class PurgeRequest(RequestPart):
    """The body of `POST /v1/datastores/{name}/purge`."""

    documents: Texts


class VerifyRequest(RequestPart):
    """The body of `POST /v1/datastores/{name}/verify`; no version means all."""

    version: str | None = None


class DiffQuery(RequestPart):
    """The query of `GET /v1/datastores/{name}/diff`: two published versions."""

    a: str
    b: str
