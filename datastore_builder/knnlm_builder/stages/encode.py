"""Encode windows: the LM's keys for every scored token, in corpus order and bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm_builder.progress import Advance
from knnlm_builder.stages.plan import Plan, PlannedDocument
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.windows import Window

# Windows looked at together, to batch those of similar length; bounds the keys held at once.
LOOKAHEAD = 64


class EncodedWindow(NamedTuple):
    """What one window adds: N scored tokens."""

    document: PlannedDocument
    window: Window
    keys: Tensor  # (N, D) float32
    hidden: Tensor  # (N, H)
    values: NDArray[np.int32]  # (N,)
    spans: NDArray[np.int32]  # (N, 2)


def encode_windows(
    lm: CausalLM, plan: Plan, windows: Iterable[tuple[PlannedDocument, Window]], batch_tokens: int, advance: Advance
) -> Iterator[EncodedWindow]:
    """Encode windows in passes of similar length and yield them in the order given; progress after every pass.

    The row at position t predicts token t + 1, so a window's last token is never fed to the LM.
    """
    source = iter(windows)
    while ahead := list(islice(source, LOOKAHEAD)):
        inputs = [plan.tokens(document)[window.begin : window.end - 1] for document, window in ahead]
        done: list[EncodedWindow | None] = [None] * len(ahead)
        for batch in batches_by_length([len(ids) for ids in inputs], batch_tokens):
            first_rows = [ahead[i][1].first_target - 1 - ahead[i][1].begin for i in batch]
            rows = lm.encode([torch.from_numpy(inputs[i].astype(np.int64)) for i in batch], first_rows)  # type: ignore[misc]
            sizes = [ahead[i][1].num_targets for i in batch]
            for i, keys, hidden in zip(
                batch, torch.split(rows.keys, sizes), torch.split(rows.hidden, sizes), strict=True
            ):
                document, window = ahead[i]
                targets = slice(window.first_target, window.end)
                done[i] = EncodedWindow(
                    document, window, keys, hidden, plan.tokens(document)[targets], plan.spans(document)[targets]
                )
            advance(sum(sizes))
        yield from (item for item in done if item is not None)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in passes of similar length, each at most ``batch_tokens`` with its padding (or a single window)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
