"""From entries' shares of probabilities to the documents that they stand in, as JSON.

An entry is looked up when its share is rendered. A document that has been deleted by then keeps its share and nothing
else: no id, no title, no text of it is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm_core.datastore.documents import EntryLocation
from knnlm_core.datastore.entries import Entries
from knnlm_core.errors import InvalidParameter
from knnlm_core.retrieval import Retrieval
from knnlm_server.engine.attribution import Attributions

# Of one answer: 13 bytes each until it is rendered. Fewer hold the token that they are attributed than are retrieved.
MAX_ATTRIBUTED_NEIGHBORS = 4_000_000
_LOOKED_UP_AT_ONCE = 1 << 15
UNKNOWN = "unknown"  # licence

Json = dict[str, Any]


def check_attributed(tokens: int, retrieval: Retrieval | None) -> None:
    """Raises InvalidParameter: attributing so many tokens could take more memory than a server can be asked for."""
    if retrieval is not None and (count := tokens * retrieval.k) > MAX_ATTRIBUTED_NEIGHBORS:
        raise InvalidParameter(
            f"`knn.attribution` may attribute at most {MAX_ATTRIBUTED_NEIGHBORS} neighbours in one answer, "
            f"got {tokens} tokens × {retrieval.k} = {count}",
            param="knn.attribution",
        )


@dataclass(slots=True)
class _OfDocument:
    """What one document has in a token, or in all of them."""

    entry_id: int  # one of the document's
    share: float = 0.0
    spans: list[tuple[int, int]] = field(default_factory=list)


class AnswerAttribution:
    """Adds up the shares of an answer's tokens: the choice's of a completion, or the text's of a score.

    Args:   stores: in the order of the retrieval's sources.
    """

    def __init__(self, stores: Sequence[Entries]) -> None:
        self._stores = stores
        self._num_tokens = 0
        self._model = 0.0
        self._documents: dict[tuple[int, str], _OfDocument] = {}
        self._deleted: defaultdict[int, float] = defaultdict(float)  # by source

    def add(self, attributions: Attributions) -> None:
        """Take in some tokens."""
        self._count(attributions)
        for source in np.unique(attributions.sources).tolist():
            mine = attributions.sources == source
            # A document's entry may be behind many tokens; it is looked up once.
            entry_ids, of_entry = np.unique(attributions.entry_ids[mine], return_inverse=True)
            shares = np.bincount(of_entry, attributions.shares[mine])
            for first in range(0, len(entry_ids), _LOOKED_UP_AT_ONCE):
                some = slice(first, first + _LOOKED_UP_AT_ONCE)
                for place, entry_id, share in self._locate(source, entry_ids[some], shares[some]):
                    self._add(source, place, entry_id, share)

    def tokens(self, attributions: Attributions) -> Iterator[Json]:
        """Take in some tokens, and give the sources of each."""
        self._count(attributions)
        stop = 0
        for model, count in zip(attributions.model.tolist(), attributions.counts.tolist(), strict=True):
            itself = slice(stop, stop + count)
            stop += count
            columns = (attributions.sources[itself], attributions.entry_ids[itself], attributions.shares[itself])
            yield {"model": model, "sources": self._sources(*columns)}

    def whole(self) -> Json:
        """The mean over all tokens taken in; without any, everything is the model's."""
        tokens = max(1, self._num_tokens)
        shown: list[Json] = []
        licences: defaultdict[str, float] = defaultdict(float)
        by_source: defaultdict[int, list[_OfDocument]] = defaultdict(list)
        for (source, _), document in self._documents.items():
            by_source[source].append(document)
        deleted = defaultdict(float, self._deleted)
        for source, documents in by_source.items():
            # What was there when its tokens were rendered may be gone by now.
            columns = ([d.entry_id for d in documents], [d.share for d in documents])
            for place, _, share in self._locate(source, *map(np.array, columns)):
                if place is None:
                    deleted[source] += share
                    continue
                licences[place.licence or UNKNOWN] += share / tokens
                shown.append(
                    {
                        "datastore": self._stores[source].name,
                        "document_id": place.document_id,
                        "title": place.title,
                        "licence": place.licence,
                        "share": share / tokens,
                    }
                )
        for source, share in deleted.items():
            licences[UNKNOWN] += share / tokens
            shown.append(self._gone(source, share / tokens))
        return {
            "model": self._model / tokens if self._num_tokens else 1.0,
            "documents": _largest_first(shown),
            "licences": dict(sorted(licences.items(), key=lambda item: (-item[1], item[0]))),
        }

    def _count(self, attributions: Attributions) -> None:
        self._num_tokens += len(attributions.model)
        self._model += float(attributions.model.sum())

    def _locate(
        self, source: int, entry_ids: NDArray[np.int64], shares: NDArray[Any]
    ) -> Iterable[tuple[EntryLocation | None, int, float]]:
        ids = entry_ids.tolist()
        return zip(self._stores[source].locate(ids), ids, shares.tolist(), strict=True)

    def _add(self, source: int, place: EntryLocation | None, entry_id: int, share: float) -> None:
        if place is None:
            self._deleted[source] += share
        else:
            self._documents.setdefault((source, place.document_id), _OfDocument(entry_id)).share += share

    def _sources(
        self, sources: NDArray[np.int8], entry_ids: NDArray[np.int64], shares: NDArray[np.float32]
    ) -> list[Json]:
        shown = []
        for source in np.unique(sources).tolist():
            mine = sources == source
            documents: dict[str, tuple[EntryLocation, _OfDocument]] = {}
            deleted: float | None = None
            for place, entry_id, share in self._locate(source, entry_ids[mine], shares[mine]):
                self._add(source, place, entry_id, share)
                if place is None:
                    deleted = (deleted or 0.0) + share
                    continue
                _, document = documents.setdefault(place.document_id, (place, _OfDocument(entry_id)))
                document.share += share
                document.spans.append((place.char_start, place.char_end))
            shown += [self._source(source, *found) for found in documents.values()]
            if deleted is not None:
                shown.append(self._gone(source, deleted))
        return _largest_first(shown)

    def _source(self, source: int, place: EntryLocation, document: _OfDocument) -> Json:
        return {
            "datastore": self._stores[source].name,
            "document_id": place.document_id,
            "uri": place.uri,
            "title": place.title,
            "licence": place.licence,
            "share": document.share,
            "spans": merge_spans(document.spans),
        }

    def _gone(self, source: int, share: float) -> Json:
        return {"datastore": self._stores[source].name, "document_id": None, "deleted": True, "share": share}


def merge_spans(spans: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The same characters in as few spans as can be, in order; spans that touch become one."""
    merged: list[list[int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return merged


def _largest_first(shown: list[Json]) -> list[Json]:
    return sorted(shown, key=lambda entry: (-entry["share"], entry["datastore"], entry["document_id"] or ""))
