"""The body of a change of datastores."""

from __future__ import annotations

from knnlm_client.requests.common import RequestPart


class LoadRequest(RequestPart):
    """The body of `PUT /v1/datastores/{name}`: a published version, or `current` for the one that the store names."""

    version: str
