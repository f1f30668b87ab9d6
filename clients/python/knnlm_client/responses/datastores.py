"""What a datastore has learned and forgotten, which versions it has, and what it holds."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from knnlm_client.responses.common import ResponsePart
from knnlm_client.responses.server import Datastore


class DatastoreRevision(ResponsePart):
    """What a change of documents has led to; requests that begin now see it.

    Attributes:
        revision: counter of what the name has learned and deleted.
    """

    object: Literal["datastore.revision"]
    name: str
    version: str
    generation: int
    revision: int


class LearnedDocument(ResponsePart):
    """A document that is learned now.

    Attributes:
        entries: its tokens with a context, which can be retrieved.
    """

    id: str
    tokens: int
    entries: int


class Learned(DatastoreRevision):
    """The answer of learning."""

    documents: list[LearnedDocument]


class Forgotten(DatastoreRevision):
    """The answer of forgetting."""

    document_id: str


class Purged(ResponsePart):
    """The answer of a purge, after which no file of the name holds anything of the documents but their ids.

    Attributes:
        replaced_versions: versions that held copies → what replaces them; None where nothing else was left.
        files_searched: files that were searched for traces and held none.
    """

    object: Literal["datastore.purge"]
    documents: list[str]
    revision: int
    replaced_versions: dict[str, str | None]
    files_searched: int
    datastore: Datastore


class PublishedVersion(ResponsePart):
    """A version on the server's disk.

    Attributes:
        revision: what was learned and deleted up to it is part of the version.
        current: whether it is published as the current one.
        serving: whether the server serves it.
    """

    version: str
    parent_version: str | None
    revision: int
    entries: int
    documents: int
    bytes: int
    current: bool
    serving: bool


class VersionListBody(ResponsePart):
    """The answer of `GET /v1/datastores/{name}/versions`."""

    data: list[PublishedVersion]


class VerifiedVersion(ResponsePart):
    """A version whose files are as they were published.

    Attributes:
        canary_queries: queries kept from the build that were asked again.
        recall_at_32: the share of their exact neighbours that was found; None for a version without canaries.
    """

    version: str
    files: int
    bytes: int
    canary_queries: int
    recall_at_32: float | None


class Verified(ResponsePart):
    """The answer of a verification that found nothing wrong; damage is `DatastoreCorrupt`.

    Attributes:
        segments: folders of learned documents.
        leftovers: files of interrupted work; nobody reads them.
    """

    object: Literal["datastore.verification"]
    name: str
    versions: list[VerifiedVersion]
    revision: int
    segments: int
    leftovers: list[str]


class SettingChange(ResponsePart):
    """A setting that differs between two versions."""

    a: JsonValue
    b: JsonValue


class EntryCounts(ResponsePart):
    """How many entries each of two versions has."""

    a: int
    b: int


class VersionDiff(ResponsePart):
    """Two versions as they were published, compared.

    Attributes:
        added: ids of documents that only `b` has; like the other two lists cut short, unlike the counts.
        removed: ids of documents that only `a` has.
        changed: ids of documents whose text differs.
        settings: path in the manifest → both values, where they differ.
    """

    object: Literal["datastore.diff"]
    name: str
    a: str
    b: str
    entries: EntryCounts
    added: list[str]
    removed: list[str]
    changed: list[str]
    num_added: int
    num_removed: int
    num_changed: int
    num_unchanged: int
    settings: dict[str, SettingChange]


class ExportedDocument(ResponsePart):
    """A document that the datastore serves; it can be learned elsewhere as it is."""

    id: str
    text: str
    uri: str | None = None
    title: str | None = None
    licence: str | None = None
    tags: list[str] | None = None
