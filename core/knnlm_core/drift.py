"""How far the running LM's keys are from those that a datastore stores.

The same weights give slightly other keys in another dtype or runtime. A version therefore fits an LM not by its
fingerprint alone: some of its own documents are encoded again, and the keys are compared with the stored ones.

    drift = mean ‖key now − key stored‖²  /  median ‖canary − its nearest entry‖²

The denominator is how far apart a query and its nearest neighbour are in this very store, so the ratio says how much
of a neighbour's distance is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm_core.datastore.canaries import canaries_of
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreMismatch, DocumentNotFound
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.windows import WindowSizes

MAX_DOCUMENTS = 8
MAX_TOKENS = 48  # of each, BOS included: 376 keys in all, within a second
# SmolLM2-135M over a store of 234,000 entries that bfloat16 made: float32 0.001, int8 weights 0.006, llama.cpp on Q4_1
# 0.004, on Q8_0 0.006; over a store whose entries lie three times as close 0.004, 0.017, 0.013 and 0.018. The bound is
# five times the largest of these, and noise of a tenth of a neighbour's distance; other weights give more than 1.
MAX_DRIFT = 0.1
_CHARACTERS_PER_TOKEN = 64  # read of a text at first; a text that needs more gives fewer keys
_MIN_KEYS = 8
_CANDIDATES = 4 * MAX_DOCUMENTS  # looked at; some are of no use

# Token ids of several texts and how they are cut → (T − 1, D) keys of each, by the path that builds.
Encode = Callable[[Sequence[NDArray[np.int32]], WindowSizes], Sequence[NDArray[np.float32]]]


class Drift(NamedTuple):
    """What was measured."""

    ratio: float
    distance: float  # mean squared distance of keys made now to those stored
    nearest: float  # median squared distance of a canary to its nearest entry
    keys: int  # that were compared


class _Passage(NamedTuple):
    """The beginning of a stored document."""

    token_ids: NDArray[np.int32]  # (T,), BOS included
    first_entry: int  # the entries that it made are this one and the T − 2 after it


def measure_drift(datastore: Snapshot, tokenizer: Tokenizer, encode: Encode) -> Drift | None:
    """Encode the beginnings of up to MAX_DOCUMENTS documents of a version again, none of them deleted.

    Returns: None where nothing can be said: the version has no canaries, or too few keys are left to compare.
    Raises:  KnnlmError: of ``encode``.
    """
    version = datastore.datastore
    canaries = canaries_of(version)
    nearest = canaries.distances[:, 0] if canaries is not None else torch.empty(0)
    nearest = nearest[(nearest > 0) & torch.isfinite(nearest)]  # a canary that is in the store says nothing
    passages = list(_passages(datastore, tokenizer))
    count = sum(len(passage.token_ids) - 1 for passage in passages)
    if not len(nearest) or count < _MIN_KEYS:
        return None
    context = datastore.manifest.context
    made = encode([passage.token_ids for passage in passages], WindowSizes(context.window, context.stride))
    distances = [_distances(version.keys, passage, keys) for passage, keys in zip(passages, made, strict=True)]
    distance = float(torch.cat(distances).double().mean())
    median = float(nearest.double().median())
    return Drift(distance / median, distance, median, count)


def require_small(name: str, drift: Drift) -> None:
    """Raises DatastoreMismatch: keys have drifted by more than MAX_DRIFT, or are not numbers."""
    if not drift.ratio <= MAX_DRIFT:
        raise DatastoreMismatch(
            name,
            field="key_drift",
            have=_rounded(drift.ratio),
            need=f"at most {MAX_DRIFT}",
            needed_by="a search with the running model's keys",
        )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}") if math.isfinite(value) else value


def _passages(datastore: Snapshot, tokenizer: Tokenizer) -> Iterator[_Passage]:
    version = datastore.datastore
    ids = datastore.document_ids()
    count = min(_CANDIDATES, len(ids))
    rounds = _CANDIDATES // MAX_DOCUMENTS  # each of them evenly spread over the store
    taken = 0
    for number in sorted(range(count), key=lambda number: (number % rounds, number)):
        if taken == MAX_DOCUMENTS:
            break
        document_id = ids[number * len(ids) // count]
        try:
            first, stop = datastore.document_entries(document_id)
            whole = datastore.document(document_id).text
        except DocumentNotFound:  # deleted in this moment
            continue
        if stop > version.entries:  # learned since, by the LM that runs
            continue
        taken += 1
        text = whole[: MAX_TOKENS * _CHARACTERS_PER_TOKEN]
        token_ids = tokenizer.encode_with_spans(text).token_ids[: min(MAX_TOKENS, stop - first + 1)]
        if len(token_ids) < 2:
            continue
        # Where a text was cut, its last tokens may not be those of the whole; what follows them is another context.
        stored = version.values(torch.arange(first, first + len(token_ids) - 1)).numpy()
        differ = np.flatnonzero(stored != token_ids[1:])
        same = int(differ[0]) if len(differ) else len(stored)
        if same:
            yield _Passage(token_ids[: same + 1], first)


def _distances(stored: Callable[[Tensor], Tensor], passage: _Passage, keys: NDArray[np.float32]) -> Tensor:
    """(T − 1,) squared distances."""
    entries = torch.arange(passage.first_entry, passage.first_entry + len(keys))
    return (torch.from_numpy(keys) - stored(entries)).square().sum(dim=1)
