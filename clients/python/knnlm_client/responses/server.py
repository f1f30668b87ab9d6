"""What the server says about itself: its state, its models, its datastores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

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


class Datastore(ResponsePart):
    """A datastore as the server holds it."""

    object: str
    name: str
    version: str
    generation: int
    state: str
    entries: int
    bytes: int
    unit: str
    documents: int
    leases: int
    calibration: dict[str, Any] | None
    model_fingerprint: str


class DatastoreListBody(ResponsePart):
    """The answer of `GET /v1/datastores`."""

    data: list[Datastore]
    published: list[str]


@dataclass(frozen=True, slots=True)
class DatastoreList(Sequence[Datastore]):
    """The loaded datastores, as a sequence, and what else could be loaded.

    Attributes:
        loaded: the same, as a tuple.
        published: names that the server's root holds and that are not loaded.
    """

    loaded: tuple[Datastore, ...]
    published: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> Datastore: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Datastore, ...]: ...
    def __getitem__(self, index: int | slice) -> Datastore | tuple[Datastore, ...]:
        return self.loaded[index]

    def __len__(self) -> int:
        return len(self.loaded)
