"""Plan a build: read and tokenise every document once, choose what is held out, fix the order of entries.

What comes out stays on disk (token ids, character spans, texts), so that memory does not grow with the corpus and every
later stage can start from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_builder.corpus import (
    CorpusStats,
    NearDuplicateFilter,
    SourceDocument,
    SourceLocation,
    is_candidate,
    read_documents,
    split_tail,
)
from knnlm_builder.progress import Reporter
from knnlm_builder.settings import BuildSettings
from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import EmptyCorpus
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import EntryRange
from knnlm_core.windows import Window, WindowSizes, rolling_windows

# A held-out document that shares more of its 13-grams with the store than this goes into the store instead.
MAX_CONTAINMENT = 0.5
# With fewer held-out tokens than this, whole documents are too coarse: the tails of documents are held out.
MIN_HELD_OUT_TOKENS = 1024
TAIL_SUFFIX = "#tail"  # of the id of a held-out tail

_TOKENS, _SPANS, _TEXTS = "tokens.i32", "spans.i32", "texts.utf8"


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A tokenised document, or a part of one.

    Attributes:
        digest: hex sha256 of the whole source document's id and text.
        first_token: where its tokens begin in the plan's token file.
        text_bytes: (start, size) of the whole source text in the plan's text file.
        char_start, char_end: which characters of the source text are this document's; None for its end.
    """

    id: str
    uri: str | None
    title: str | None
    licence: str | None
    tags: tuple[str, ...]
    digest: str
    first_token: int
    num_tokens: int
    text_bytes: tuple[int, int]
    char_start: int = 0
    char_end: int | None = None

    @property
    def num_entries(self) -> int:
        """Tokens with a context: all but the first."""
        return max(0, self.num_tokens - 1)


class ShardPlan(NamedTuple):
    """Which windows make a shard, in order."""

    number: int
    entries: EntryRange
    windows: Sequence[tuple[PlannedDocument, Window]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What later stages need to know about the corpus.

    Attributes:
        documents: those of the store, in the order of their entries.
        held_out_unit: ``documents``, or ``tails`` for a corpus of few documents.
        near_duplicates: held-out candidates that went into the store.
        left_out: documents of the corpus whose copy nobody could ever find, see `make_plan`.
        windowing: how documents are cut.
    """

    folder: Path
    windowing: WindowSizes
    documents: Sequence[PlannedDocument]
    held_out: Sequence[PlannedDocument]
    held_out_unit: str
    near_duplicates: int
    left_out: int
    stats: CorpusStats

    @property
    def num_entries(self) -> int:
        """Entries of the store."""
        return sum(document.num_entries for document in self.documents)

    def tokens(self, document: PlannedDocument) -> NDArray[np.int32]:
        """(T,) token ids of a document, mapped from disk."""
        return _read(self.folder / _TOKENS, document.first_token, document.num_tokens)

    def spans(self, document: PlannedDocument) -> NDArray[np.int32]:
        """(T, 2) character spans of a document's tokens in its own text."""
        flat = _read(self.folder / _SPANS, 2 * document.first_token, 2 * document.num_tokens)
        return np.maximum(flat.reshape(-1, 2) - document.char_start, 0)

    def text(self, document: PlannedDocument) -> str:
        """The document's own text."""
        start, size = document.text_bytes
        with (self.folder / _TEXTS).open("rb") as texts:
            texts.seek(start)
            return texts.read(size).decode()[document.char_start : document.char_end]

    def windows(self, document: PlannedDocument) -> Iterator[Window]:
        """The windows of a document, each of its tokens but the first scored in one of them."""
        return rolling_windows(document.num_tokens, *self.windowing)

    def shards(self, shard_entries: int) -> Iterator[ShardPlan]:
        """Cut the store's windows into shards; a shard ends with the window that fills it."""
        windows: list[tuple[PlannedDocument, Window]] = []
        number = first = entries = 0
        for document in self.documents:
            for window in self.windows(document):
                windows.append((document, window))
                entries += window.num_targets
                if entries - first >= shard_entries:
                    yield ShardPlan(number, EntryRange(first, entries), windows)
                    windows, number, first = [], number + 1, entries
        if windows:
            yield ShardPlan(number, EntryRange(first, entries), windows)


def make_plan(
    settings: BuildSettings,
    windowing: WindowSizes,
    tokenizer: Tokenizer,
    folder: Path,
    reporter: Reporter,
    *,
    dead: Collection[str] = frozenset(),
) -> Plan:
    """Read, tokenise and split the corpus.

    Documents are held out by a hash of their content, so that the choice depends neither on their order nor on their
    number; those that the store nearly contains go into the store after all. Where whole documents are too coarse (too
    little is held out, or more than is left) the tails of all documents are held out instead. Entries are in the order
    in which documents were read.

    Args:
        dead: ids that were deleted or learned while serving: no copy in this version would be found, so that none is
            written, least of all of what was purged.

    Raises: CorpusError: of any kind, from reading; EmptyCorpus when no token has a context.
    """
    stats = CorpusStats()
    documents: list[PlannedDocument] = []
    candidates: list[PlannedDocument] = []
    store: list[PlannedDocument] = []
    room = settings.max_tokens
    num_candidate_tokens = 0
    turned_away = False
    left_out = 0
    # Whole documents seldom fill what may be held out to the last token.
    enough = min(MIN_HELD_OUT_TOKENS, settings.held_out_max_tokens // 2)
    # A corpus that is cut short still gives the held-out share of what it fills.
    share = min(settings.held_out_max_tokens, int(settings.held_out_fraction * (settings.max_tokens or 0)))
    with reporter.stage("Read and tokenise", None, "tokens") as advance, _Spool(folder) as spool:
        for source in read_documents(settings.inputs, stats=stats):
            if source.id in dead:
                left_out += 1
                continue
            document = spool.add(source, tokenizer)
            advance(document.num_tokens)
            documents.append(document)
            is_drawn = is_candidate(source.digest, settings.held_out_fraction, settings.seed)
            if is_drawn and num_candidate_tokens + document.num_tokens <= settings.held_out_max_tokens:
                candidates.append(document)
                num_candidate_tokens += document.num_tokens
            else:
                turned_away |= is_drawn
                room = room if room == 0 else _append(store, [document], room, spool)
            if room == 0 and num_candidate_tokens >= (enough if turned_away else max(enough, share)):
                break
    plan = Plan(folder, windowing, store, [], "documents", 0, left_out, stats)
    if not any(document.num_entries for document in documents):
        besides = f" besides {left_out} documents that were deleted or learned while serving" if left_out else ""
        raise EmptyCorpus(f"the inputs hold fewer than 2 tokens{besides}, so no token has a context")
    held_out, returned = _without_near_duplicates(plan, candidates)
    _append(store, returned, room, plan)
    store.sort(key=lambda document: document.first_token)
    wanted_tokens = min(enough, int(plan.num_entries * settings.held_out_fraction))  # less of a corpus that is tiny
    if wanted_tokens <= sum(document.num_tokens for document in held_out) <= plan.num_entries:
        return replace(plan, held_out=held_out, near_duplicates=len(returned))
    return _with_tails(replace(plan, near_duplicates=len(returned)), documents, settings)


def plan_held_out(datastore: Datastore, tokenizer: Tokenizer, folder: Path, dead: Collection[str]) -> Plan:
    """A plan of the documents alone that a version's build held out.

    Without those deleted or learned since, and without those whose text the version has taken in since.
    """
    alive = (
        document
        for document in datastore.held_out_documents()
        if not {document.id, document.id.removesuffix(TAIL_SUFFIX)} & set(dead)
    )
    plan = plan_documents(alive, datastore, tokenizer, folder)
    if datastore.manifest.revision:
        plan = replace(plan, held_out=_not_contained(plan.held_out, folder, datastore))
    tails = any(document.id.endswith(TAIL_SUFFIX) for document in plan.held_out)
    return replace(plan, held_out_unit="tails" if tails else "documents")


def plan_documents(documents: Iterable[Document], datastore: Datastore, tokenizer: Tokenizer, folder: Path) -> Plan:
    """A plan of some documents as if they had been held out, cut as the datastore's were."""
    with _Spool(folder) as spool:
        place = SourceLocation(datastore.folder)
        held_out = [spool.add(SourceDocument(d.id, d.text, place), tokenizer) for d in documents]
    context = datastore.manifest.context
    windows = WindowSizes(context.window, context.stride)
    return Plan(folder, windows, [], held_out, "documents", 0, 0, CorpusStats())


def _not_contained(held_out: Sequence[PlannedDocument], folder: Path, datastore: Datastore) -> list[PlannedDocument]:
    """Those that no more than MAX_CONTAINMENT of is in the entries."""
    tokens = {d.id: _read(folder / _TOKENS, d.first_token, d.num_tokens) for d in held_out}
    near = NearDuplicateFilter(tokens)
    values, starts = datastore.tokens()
    for document in np.split(values, starts[1:]):
        near.observe(document)
    share = near.containment()
    return [document for document in held_out if share[document.id] <= MAX_CONTAINMENT]


class _Spool:
    """Appends tokenised documents to the plan's files."""

    def __init__(self, folder: Path) -> None:
        self._tokens = (folder / _TOKENS).open("wb")
        self._spans = (folder / _SPANS).open("wb")
        self._texts = (folder / _TEXTS).open("wb")
        self._folder = folder
        self._num_tokens = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._spans, self._texts):
            file.close()

    def add(self, source: SourceDocument, tokenizer: Tokenizer) -> PlannedDocument:
        encoding = tokenizer.encode_with_spans(source.text)
        text = source.text.encode()
        document = PlannedDocument(
            id=source.id,
            uri=source.uri,
            title=source.title,
            licence=source.licence,
            tags=source.tags,
            digest=source.digest.hex(),
            first_token=self._num_tokens,
            num_tokens=len(encoding.token_ids),
            text_bytes=(self._texts.tell(), len(text)),
        )
        self._tokens.write(encoding.token_ids.astype("<i4").tobytes())
        self._spans.write(encoding.char_spans.astype("<i4").tobytes())
        self._texts.write(text)
        self._num_tokens += document.num_tokens
        return document

    def spans(self, document: PlannedDocument) -> NDArray[np.int32]:
        self._spans.flush()
        return _read(self._folder / _SPANS, 2 * document.first_token, 2 * document.num_tokens).reshape(-1, 2)


def _read(path: Path, start: int, count: int) -> NDArray[np.int32]:
    if not count:  # an empty range cannot be mapped
        return np.empty(0, np.int32)
    return np.memmap(path, dtype="<i4", mode="r", offset=4 * start, shape=(count,))


def _head(document: PlannedDocument, num_tokens: int, spans: NDArray[np.int32]) -> PlannedDocument:
    """The first tokens of a document and the text that they cover."""
    return replace(document, num_tokens=num_tokens, char_end=document.char_start + int(spans[num_tokens - 1, 1]))


def _append(
    store: list[PlannedDocument], documents: Sequence[PlannedDocument], room: int | None, source: _Spool | Plan
) -> int | None:
    """Add documents to the store until it is full, cutting the one that fills it; returns the room left."""
    for document in documents:
        if room is not None and document.num_entries > room:
            if room:
                store.append(_head(document, room + 1, source.spans(document)))
            return 0
        store.append(document)
        room = None if room is None else room - document.num_entries
    return room


def _without_near_duplicates(
    plan: Plan, candidates: Sequence[PlannedDocument]
) -> tuple[list[PlannedDocument], list[PlannedDocument]]:
    """Split candidates into those to hold out and those that the store nearly contains.

    A candidate that returns to the store may itself contain another candidate, hence the rounds.
    """
    held_out, returned = list(candidates), list[PlannedDocument]()
    passing: Sequence[PlannedDocument] = plan.documents
    while passing and held_out:
        near = NearDuplicateFilter({document.id: plan.tokens(document) for document in held_out})
        for document in (*plan.documents, *returned):
            near.observe(plan.tokens(document))
        share = near.containment()
        passing = [document for document in held_out if share[document.id] > MAX_CONTAINMENT]
        held_out = [document for document in held_out if share[document.id] <= MAX_CONTAINMENT]
        returned += passing
    return held_out, returned


def _with_tails(plan: Plan, documents: Sequence[PlannedDocument], settings: BuildSettings) -> Plan:
    """Hold out the end of every document, as a document of its own, and fill the store with what stands before.

    A document whose tail the store nearly contains stays whole; that may make the store contain another tail.
    """
    whole: set[str] = set()
    while True:
        split = _split_tails(plan, documents, settings, whole)
        _, near = _without_near_duplicates(split, split.held_out)
        if not near:
            return replace(split, near_duplicates=plan.near_duplicates + len(whole))
        whole |= {tail.id.removesuffix(TAIL_SUFFIX) for tail in near}


def _split_tails(
    plan: Plan, documents: Sequence[PlannedDocument], settings: BuildSettings, whole: Collection[str]
) -> Plan:
    """Split every document but those that stay whole."""
    heads, tails = list[PlannedDocument](), []
    room, budget = settings.max_tokens, settings.held_out_max_tokens
    for document in documents:
        if room == 0:
            break
        cut = max(2, split_tail(document.num_tokens, settings.held_out_fraction))
        cut = max(cut, document.num_tokens - budget)
        if document.id in whole or document.num_tokens - cut < 2:
            room = _append(heads, [document], room, plan)
            continue
        spans = plan.spans(document)
        room = _append(heads, [_head(document, cut, spans)], room, plan)
        tails.append(
            replace(
                document,
                id=f"{document.id}{TAIL_SUFFIX}",
                first_token=document.first_token + cut,
                num_tokens=document.num_tokens - cut,
                char_start=document.char_start + int(spans[cut, 0]),
            )
        )
        budget -= tails[-1].num_tokens
    return replace(plan, documents=heads, held_out=tails, held_out_unit="tails")
