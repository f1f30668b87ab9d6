"""What the server says about itself: its state, its models, its datastores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, overload

from pydantic import Field, RootModel

from knnlm_client.responses.common import ResponsePart


class ServerStatus(ResponsePart):
    """Whether the server is up; true or false by itself."""

    ok: bool
    reason: str | None = None  # why not

    def __bool__(self) -> bool:
        return self.ok


class Readiness(ServerStatus):
    """Whether the server can answer now, and how busy it is; everything but the reason is None while it cannot.

    Attributes:
        model: name of the base LM.
        datastores: names of the loaded datastores.
        running: requests that generate.
        waiting: requests that wait for a place.
        scoring: requests that score.
    """

    model: str | None = None
    datastores: list[str] | None = None
    running: int | None = None
    waiting: int | None = None
    scoring: int | None = None


class ReadyBody(ResponsePart):
    """The answer of `GET /ready` when the server is ready."""

    status: str
    model: str
    datastores: list[str]
    running: int
    waiting: int
    scoring: int


class ModelCard(ResponsePart):
    """A name that requests may give as `model`; `parent` is the base LM of `<lm>@<datastore>`."""

    id: str
    object: str = "model"
    created: int | None = None  # Unix seconds
    owned_by: str | None = None
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    datastore: str | None = None


class ModelListBody(ResponsePart):
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]


class SelfTestReport(ResponsePart):
    """What became of the queries that a version keeps from its build, when it was loaded."""

    queries: int
    recall_at_32: float
    needed: float  # below it, the version would have been refused


class Datastore(ResponsePart):
    """A datastore as the server holds it.

    Attributes:
        generation: counter of loads and swaps of the name.
        revision: counter of what the name has learned and deleted.
        entries: of the version and learned, those of deleted documents included.
        documents: without deleted ones.
        follows_current: whether it was loaded as `current`, and not as a version of its own.
        previous: the version that a rollback goes to.
        self_test: None for a version without canaries.
        key_drift: how far the running LM's keys are from those stored, in distances to a nearest entry; None for a
            version without canaries.
        calibration: what requests use that leave it open: `k`, `temperature`, `lambda`, `lambda_mode`, `gate`,
            `gate_threshold`; and how good it was.
    """

    object: Literal["datastore"]
    name: str
    version: str
    generation: int
    revision: int
    state: str
    entries: int
    bytes: int
    unit: str
    documents: int
    learned_documents: int
    deleted_documents: int
    leases: int
    aliases: list[str]
    follows_current: bool
    previous: str | None
    self_test: SelfTestReport | None
    key_drift: float | None = None
    calibration: dict[str, Any] | None
    model_fingerprint: str


class DatastoreProgress(ResponsePart):
    """How far a load has come: bytes while it verifies and warms, steps otherwise."""

    object: Literal["datastore.progress"]
    stage: str
    done: int
    total: int


LoadEvent: TypeAlias = DatastoreProgress | Datastore


class LoadEventBody(RootModel[Annotated[LoadEvent, Field(discriminator="object")]]):
    """One event of a streamed load; the last one is the datastore."""


class DatastoreListBody(ResponsePart):
    """The answer of `GET /v1/datastores`."""

    data: list[Datastore]
    published: list[str]
    aliases: dict[str, str]
    default: str | None
    bytes_used: int
    bytes_limit: int | None
    persistent: bool


@dataclass(frozen=True, slots=True)
class DatastoreList(Sequence[Datastore]):
    """The loaded datastores, as a sequence, and what else could be loaded.

    Attributes:
        loaded: the same, as a tuple.
        published: names that the server's root holds and that are not loaded.
        aliases: alias → name, loaded or not.
        default: the name that requests use which name none.
        bytes_used: of everything that is loaded, what drains included.
        bytes_limit: how many they may be; None for no limit.
        persistent: whether a restarted server finds versions, aliases and default as they are.
    """

    loaded: tuple[Datastore, ...]
    published: tuple[str, ...]
    aliases: Mapping[str, str]
    default: str | None
    bytes_used: int
    bytes_limit: int | None
    persistent: bool

    @overload
    def __getitem__(self, index: int) -> Datastore: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Datastore, ...]: ...
    def __getitem__(self, index: int | slice) -> Datastore | tuple[Datastore, ...]:
        return self.loaded[index]

    def __len__(self) -> int:
        return len(self.loaded)
