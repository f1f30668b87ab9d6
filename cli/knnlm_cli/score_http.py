"""Score on a server, over `/v1/score`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import numpy as np

from knnlm_builder.corpus import SourceDocument
from knnlm_cli.score_connection import Connection
from knnlm_cli.score_progress import Advance
from knnlm_cli.score_results import DocumentScores
from knnlm_cli.score_settings import ScoreSettings
from knnlm_cli.score_stored import stored_among
from knnlm_cli.score_used import Setting, Used, choose_retrieval, choose_windows
from knnlm_core.errors import DatastoreNotFound, InvalidParameter, ModelNotFound, NotReady, ServiceError
from knnlm_server.api.schemas.common import MAX_EXCLUDED_DOCUMENTS
from knnlm_server.api.trace_rendering import LOWEST

SEPARATOR = "@"
# Enough for the server to fill its passes; far below what it takes as one body.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 200_000
# Read ahead, so that documents that need no request of their own share one across those that do.
STRETCH_DOCUMENTS = 1024
STRETCH_CHARACTERS = 1_000_000
# A text without a scored token: the server checks everything else and computes nothing.
NOTHING = [[0]]


class HttpScorer:
    """Scores documents on one model of a server, by one combination of settings.

    Attributes:
        used: what the server will use.
    """

    def __init__(self, connection: Connection, settings: ScoreSettings) -> None:
        self._connection = connection
        self._settings = settings
        card = _card(connection, settings)
        windows = choose_windows(settings, int(self._needed(card, "max_model_len")))
        self._body = {
            "model": card["id"],
            **({"knn": settings.knn_given()} if settings.knn_given() else {}),
            **{name: setting.value for name, setting in windows.items()},
        }
        self._excluded = dict.fromkeys(settings.exclude_documents)
        answer = self._ask(self._excluded)
        self._fingerprint = str(self._needed(answer, "system_fingerprint"))
        # A server may have a default datastore: the answer says what the model's name meant.
        model = str(self._needed(answer, "model"))
        store = model.partition(SEPARATOR)[2] or None
        self.used = self._used(model, store, windows)
        self._exclude_self = store is not None and settings.exclude_self is not False
        self._overlap = store is not None and settings.overlap is not False

    def _needed(self, answer: Mapping[str, Any], field: str) -> Any:
        """A field that any knnlm server's answer has."""
        if field not in answer:
            raise ServiceError(f"{self._connection.url} does not answer as a knnlm server: there is no `{field}`")
        return answer[field]

    def _used(self, model: str, store: str | None, windows: Mapping[str, Setting]) -> Used:
        described = self._connection.get(f"/v1/datastores/{quote(store, safe='')}") if store is not None else {}
        calibration = described.get("calibration")
        return Used(
            model=model,
            model_fingerprint=self._fingerprint.partition("-")[0],
            datastore=store,
            version=described.get("version"),
            calibration=calibration["id"] if calibration is not None else None,
            retrieval=choose_retrieval(self._settings, store, calibration) if store is not None else {},
            windows=windows,
        )

    def score(self, documents: Iterable[SourceDocument], advance: Advance) -> Iterator[DocumentScores]:
        """Score documents, in their order; those that the datastore holds under their id without their own entries.

        Raises: KnnlmError: what the server answers; ServiceError: it ends an answer early, or swaps the datastore.
        """
        for stretch in _stretches(documents):
            stored = self._stored([document.id for document in stretch]) if self._exclude_self else set()
            ready: dict[int, DocumentScores] = {}
            told = 0
            for batch in _batches(stretch, stored):
                inside = [stretch[i] for i in batch]
                excluded = inside[0].id if inside[0].id in stored else None
                ready.update(zip(batch, self._score(inside, advance, excluded), strict=True))
                while told in ready:
                    yield ready.pop(told)
                    told += 1

    def _stored(self, ids: Sequence[str]) -> set[str]:
        """Those that the datastore holds, but for those that are excluded anyway."""
        most = max(1, MAX_EXCLUDED_DOCUMENTS - len(self._excluded))
        return stored_among([i for i in ids if i not in self._excluded], self._holds_all, most)

    def _holds_all(self, ids: Sequence[str]) -> bool:
        """To exclude a document that the datastore does not hold is refused."""
        try:
            self._ask([*self._excluded, *ids])
        except DatastoreNotFound:
            return False
        return True

    def _ask(self, excluded: Collection[str]) -> dict[str, Any]:
        """Have everything but the text checked."""
        body = {**self._body, "input": NOTHING, **({"exclude_documents": list(excluded)} if excluded else {})}
        return self._connection.post("/v1/score", body)

    def _score(self, batch: Sequence[SourceDocument], advance: Advance, excluded: str | None) -> list[DocumentScores]:
        exclude = [*self._excluded, *([] if excluded is None else [excluded])]
        body = {
            **self._body,
            "input": [document.text for document in batch],
            "per_token": True,
            "stream": True,
            **({"overlap": True} if self._overlap else {}),
            **({"exclude_documents": exclude} if exclude else {}),
        }
        results: dict[int, DocumentScores] = {}
        for line in self._lines(body, sum(len(document.text) for document in batch), advance):
            index = line["index"]
            results[index] = self._read(batch[index].id, line, excluded)
        if len(results) != len(batch):
            raise ServiceError(f"{self._connection.url} scored {len(results)} of {len(batch)} texts")
        return [results[index] for index in range(len(batch))]

    def _lines(self, body: Mapping[str, Any], characters: int, advance: Advance) -> Iterator[dict[str, Any]]:
        """The results of a request; progress goes to ``advance``."""
        done, ended = 0, False

        def reach(tokens: int, tokens_in_all: int) -> None:
            nonlocal done
            if tokens > done:
                advance(tokens - done, characters * (tokens - done) / tokens_in_all)
                done = tokens

        for line in self._connection.stream("/v1/score", body):
            match line.get("object"):
                case "score.progress":
                    reach(line["tokens_done"], line["tokens"])
                case "score.result":
                    yield line
                case "score.total":
                    ended = True
                    tokens = line["total"]["tokens"]
                    reach(tokens, tokens)
                    self._check_fingerprint(str(line["system_fingerprint"]))
        if not ended:
            raise ServiceError(f"{self._connection.url} ended its answer before the total")

    def _check_fingerprint(self, fingerprint: str) -> None:
        if fingerprint != self._fingerprint:
            raise ServiceError(
                f"the server changed what it serves while scoring, from {self._fingerprint} to {fingerprint}; "
                "scores of different versions do not add up: run it again"
            )

    def _read(self, document_id: str, result: Mapping[str, Any], excluded: str | None) -> DocumentScores:
        tokens = result["per_token"]
        matches = [token["longest_match"] for token in tokens] if self._overlap else None
        return DocumentScores(
            id=document_id,
            num_bytes=result["bytes"],
            searched=result["searched"],
            followed=result["followed"],
            excluded_itself=self._exclude_self and document_id in (excluded, *self._excluded),
            base=_log_probs(token["base"] for token in tokens),
            mixed=_log_probs(token["mixed"] for token in tokens),
            longest_match=None if matches is None else np.array(matches, np.uint8),
            per_token=tokens if self._settings.per_token is not None else None,
        )


def _stretches(documents: Iterable[SourceDocument]) -> Iterator[list[SourceDocument]]:
    """Documents as they come, so many at a time as may be held."""
    stretch: list[SourceDocument] = []
    characters = 0
    for document in documents:
        if len(stretch) == STRETCH_DOCUMENTS or (stretch and characters + len(document.text) > STRETCH_CHARACTERS):
            yield stretch
            stretch, characters = [], 0
        stretch.append(document)
        characters += len(document.text)
    if stretch:
        yield stretch


def _batches(stretch: Sequence[SourceDocument], alone: Collection[str]) -> list[list[int]]:
    """Positions of the documents of each request, by the first of them; those of the ids ``alone`` by themselves."""
    batches: list[list[int]] = []
    filling: list[int] = []
    characters = 0
    for i, document in enumerate(stretch):
        if document.id in alone:
            batches.append([i])
            continue
        is_full = len(filling) == BATCH_DOCUMENTS or characters + len(document.text) > BATCH_CHARACTERS
        if not filling or is_full:
            filling, characters = [], 0
            batches.append(filling)
        filling.append(i)
        characters += len(document.text)
    return batches


def _log_probs(values: Iterable[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    found = np.fromiter(values, np.float32)
    found[found <= LOWEST] = -np.inf
    return found


def _card(connection: Connection, settings: ScoreSettings) -> dict[str, Any]:
    """The card of the model that was asked for, from what the server lists."""
    cards = {card["id"]: card for card in connection.get("/v1/models").get("data", [])}
    if not cards:
        raise NotReady(f"{connection.url} lists no model")
    lm, _, by_model = (settings.model or next(iter(cards))).partition(SEPARATOR)
    store = settings.datastore or by_model
    if by_model and by_model != store:
        raise InvalidParameter(
            f"--model names datastore {by_model!r} but --datastore names {store!r}; they must agree", param="datastore"
        )
    wanted = f"{lm}{SEPARATOR}{store}" if store else lm
    if wanted in cards:
        card: dict[str, Any] = cards[wanted]
        return card
    if lm in cards:
        loaded = ", ".join(card["datastore"] for card in cards.values() if card.get("datastore")) or "none"
        raise DatastoreNotFound(f"datastore {store!r} is not loaded at {connection.url}; loaded: {loaded}")
    raise ModelNotFound(f"model {lm!r} is not served at {connection.url}; served: {', '.join(cards)}", param="model")


@contextmanager
def http_scorer(settings: ScoreSettings) -> Iterator[HttpScorer]:
    """Connect to the server that the settings name.

    Raises: KnnlmError: what it answers; ServiceError: it cannot be reached.
    """
    assert settings.url is not None
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    with Connection(settings.url, key) as connection:
        yield HttpScorer(connection, settings)
