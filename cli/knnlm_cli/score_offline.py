"""Score in this process, with the engine's own scoring."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm_builder.corpus import SourceDocument
from knnlm_cli.score_progress import Advance
from knnlm_cli.score_results import DocumentScores
from knnlm_cli.score_settings import ScoreSettings
from knnlm_cli.score_used import COMMAND_LINE, Setting, Used, choose_retrieval, choose_windows
from knnlm_core.datastore import layout
from knnlm_core.datastore.exclusion import merge_ranges
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.overlap import longest_matches
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreNotFound, InvalidParameter
from knnlm_core.knn.lambdas import LambdaMode, parse_lambda_mode
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import TextLM
from knnlm_core.retrieval import Retrieval, Source, with_gate, with_lambda_mode
from knnlm_core.types import EntryRange
from knnlm_server.api.score_inputs import TextToScore, bytes_of_text
from knnlm_server.api.score_rendering import TokenRenderer
from knnlm_server.engine.scoring import ScoreRequest, TokenScores, no_scores

PASS_TOKENS = 4096  # padded tokens per forward pass
BATCH_TOKENS = 1 << 18  # held at once; overlap reads the whole datastore for each batch


class _Document(NamedTuple):
    """A document, tokenised."""

    id: str
    characters: int
    text: TextToScore


class OfflineScorer:
    """Scores documents by one LM and perhaps one datastore.

    Args:         datastore: None for the LM alone.
    Attributes:   used: what it will use.
    Raises:       DatastoreMismatch: the datastore is another model's. InvalidParameter: windows or retrieval settings
                  are out of bounds, or a setting is given by nobody. DatastoreNotFound: no document of an excluded id.
    """

    def __init__(self, lm: TextLM, datastore: Snapshot | None, settings: ScoreSettings) -> None:
        self._lm = lm
        self._datastore = datastore
        self._settings = settings
        windows = choose_windows(settings, lm.max_length)
        self._window, self._stride = int(windows["window"].value), int(windows["stride"].value)
        self._retrieval: Retrieval | None = None
        retrieval: Mapping[str, Setting] = {}
        calibration = datastore.calibration if datastore is not None else None
        if datastore is not None:
            datastore.require_fits(lm.identity)
            if calibration is not None:
                calibration.require_numerics(datastore.name, lm.numerics)
            retrieval = choose_retrieval(
                settings, datastore.name, calibration.settings() if calibration is not None else None
            )
            self._retrieval = _retrieval(datastore, retrieval, settings.exclude_documents)
        name = lm.identity.model_name
        self.used = Used(
            model=name if datastore is None else f"{name}@{datastore.name}",
            model_fingerprint=lm.identity.model_fingerprint,
            datastore=datastore.name if datastore is not None else None,
            version=datastore.version if datastore is not None else None,
            calibration=calibration.id if calibration is not None else None,
            retrieval=retrieval,
            windows=windows,
        )

    def score(self, documents: Iterable[SourceDocument], advance: Advance) -> Iterator[DocumentScores]:
        """Score documents, in their order; those that the datastore holds under their id without their own entries."""
        batch: list[_Document] = []
        tokens = 0
        for document in documents:
            batch.append(self._tokenise(document))
            tokens += batch[-1].text.num_scored
            if tokens >= BATCH_TOKENS:
                yield from self._score(batch, advance)
                batch, tokens = [], 0
        yield from self._score(batch, advance)

    def _tokenise(self, document: SourceDocument) -> _Document:
        tokenizer = self._lm.tokenizer
        encoding = tokenizer.encode_with_spans(document.text)
        text = TextToScore(
            encoding.token_ids,
            starts=encoding.char_spans[1:, 0],
            num_bytes=bytes_of_text(tokenizer, document.text, encoding),
            own=self._own_entries(document.id),
        )
        return _Document(document.id, len(document.text), text)

    def _own_entries(self, document_id: str) -> EntryRange | None:
        if self._datastore is None or self._settings.exclude_self is False:
            return None
        try:
            return self._datastore.document_entries(document_id)
        except DatastoreNotFound:
            return None

    def _score(self, batch: Sequence[_Document], advance: Advance) -> Iterator[DocumentScores]:
        matches = self._longest_matches(batch)
        scores = self._token_scores(batch, advance)
        for i, (document_id, _, text) in enumerate(batch):
            found = scores.get(i, no_scores())
            longest = None if matches is None else matches[i][text.first :]
            yield DocumentScores(
                id=document_id,
                num_bytes=text.num_bytes,
                searched=int(found.searched.sum()),
                followed=int(found.followed.sum()),
                excluded_itself=text.own is not None,
                base=found.base,
                mixed=found.mixed,
                longest_match=longest,
                per_token=self._per_token(text, found, longest),
            )

    def _longest_matches(self, batch: Sequence[_Document]) -> list[NDArray[np.uint8]] | None:
        if self._datastore is None or self._retrieval is None or self._settings.overlap is False:
            return None
        texts, own = [text.token_ids for _, _, text in batch], [text.own for _, _, text in batch]
        return longest_matches(self._datastore, texts, exclude=self._retrieval.only.exclude, own=own)

    def _token_scores(self, batch: Sequence[_Document], advance: Advance) -> dict[int, TokenScores]:
        """Scores by position in the batch; texts without a scored token are absent."""
        tokens = sum(text.num_scored for _, _, text in batch)
        characters = sum(document.characters for document in batch)
        scores: dict[int, TokenScores] = {}
        scored = [i for i, document in enumerate(batch) if document.text.num_scored]
        request = ScoreRequest(
            request_id="score",
            texts=[batch[i].text.token_ids for i in scored],
            retrieval=self._retrieval,
            window=self._window,
            stride=self._stride,
            on_text=lambda at, found: scores.__setitem__(scored[at], found),
            on_end=lambda error: None,
            own=[batch[i].text.own for i in scored],
        )
        while not request.is_done:
            before = request.tokens_done
            request.run(self._lm, PASS_TOKENS)
            done = request.tokens_done - before
            advance(done, characters * done / tokens)
        return scores

    def _per_token(
        self, text: TextToScore, scores: TokenScores, longest_match: NDArray[np.uint8] | None
    ) -> list[dict[str, Any]] | None:
        """As the server renders it, so that both kinds of run write the same file."""
        if self._settings.per_token is None:
            return None
        return list(TokenRenderer(self._lm.tokenizer, self._retrieval).entries(text, scores, longest_match))


def _retrieval(datastore: Snapshot, settings: Mapping[str, Setting], excluded: Sequence[str]) -> Retrieval:
    source = Source(
        datastore=datastore,
        k=int(settings["k"].value),
        knn_temperature=float(settings["temperature"].value),
        lmbda=float(settings["lambda"].value),
        exclude=merge_ranges(datastore.document_entries(document_id) for document_id in excluded),
    )
    # What the command line leaves open is settled as a server settles it, which `choose_retrieval` reports.
    given = {name: setting.value for name, setting in settings.items() if setting.source == COMMAND_LINE}
    mode = LambdaMode.FIXED if "lambda" in given else None
    if "lambda_mode" in given:
        mode = parse_lambda_mode(str(given["lambda_mode"]), beside="lambda" in given)
    gate = None
    if "gate" in given:
        gate = str(given["gate"]), float(given["gate_threshold"]) if "gate_threshold" in given else None
    source = with_lambda_mode(source, datastore.calibration, mode, datastore.name)
    source = with_gate(source, datastore.calibration, datastore.gate_trees, gate, datastore.name)
    retrieval = Retrieval((source,))
    retrieval.check()
    return retrieval


@contextmanager
def offline_scorer(settings: ScoreSettings) -> Iterator[OfflineScorer]:
    """Open the datastore, then load the LM, whose key is read where the datastore's keys were.

    Raises: KnnlmError: of many kinds, when either cannot be used or they do not fit each other.
    """
    assert settings.model is not None
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with nullcontext() if settings.datastore is None else _open_datastore(settings.datastore) as datastore:
        options = LoadOptions(
            dtype=settings.dtype or "auto",
            weights=settings.weights or "full",
            device=settings.device or "auto",
            key_tap=datastore.manifest.key.tap if datastore is not None else None,
            progress=sys.stderr.isatty(),
        )
        lm = load_lm(settings.model, options)
        try:
            yield OfflineScorer(lm, datastore, settings)
        finally:
            lm.close()


@contextmanager
def _open_datastore(given: str) -> Iterator[Snapshot]:
    """``ROOT/NAME`` or ``ROOT/NAME@VERSION``, with what was learned and without what was deleted since.

    Raises: as `Datastore.open` and `LivingName`.
    """
    path, _, version = given.rpartition("@") if "@" in Path(given).name else (given, "", None)
    folder = Path(path).expanduser()
    if not folder.name or folder.name == "..":
        raise InvalidParameter(f"--datastore must be ROOT/NAME or ROOT/NAME@VERSION, got {given!r}", param="datastore")
    try:
        datastore = Datastore.open(folder.parent, folder.name, version)
    except DatastoreNotFound as error:
        inside = layout.published_names(folder) if folder.is_dir() else []
        if not inside:
            raise
        found = ", ".join(inside)
        raise DatastoreNotFound(f"{folder} is a folder of datastores; add the name of one: {found}") from error
    with datastore:
        yield LivingName(folder.parent, folder.name).snapshot(datastore)
