"""The body of a change of datastores."""

from __future__ import annotations

from knnlm_client.requests.common import RequestPart


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
