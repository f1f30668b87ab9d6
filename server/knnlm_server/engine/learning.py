"""Making keys of documents while serving, by the path that builds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.windows import WindowSizes
from knnlm_server.engine.window_queue import WindowQueue
from knnlm_server.engine.window_work import Searches
from knnlm_server.telemetry.timeline import Timeline


@dataclass(slots=True, eq=False)
class LearnRequest:
    """Tokenised documents whose keys are wanted.

    Attributes:
        texts: (T,) token ids each, BOS included where the tokenizer puts one.
        windows: how the datastore's own documents were cut.
        on_end: called exactly once when the request leaves the engine: with None, or with why it failed.
    """

    request_id: str
    texts: Sequence[NDArray[np.int32]]
    windows: WindowSizes
    on_end: Callable[[KnnlmError | None], None]
    timeline: Timeline = field(default_factory=Timeline)
    kind: ClassVar[str] = "learn"  # as metrics call it
    _queue: WindowQueue = field(init=False)
    _keys: list[list[NDArray[np.float32]]] = field(init=False)

    def __post_init__(self) -> None:
        self._queue = WindowQueue([len(ids) for ids in self.texts], *self.windows)
        self._keys = [[] for _ in self.texts]

    @property
    def is_done(self) -> bool:
        """Whether every window has been encoded."""
        return self._queue.is_empty

    def run(self, lm: CausalLM, token_budget: int) -> Searches:
        """Encode the next windows; documents of one token have none."""
        taken = self._queue.take(token_budget)
        if not taken:
            return Searches(0, 0, 0)
        # The row at position t predicts token t + 1, so a window's last token is never an input.
        inputs = [torch.from_numpy(self.texts[text][cut.begin : cut.end - 1].astype(np.int64)) for text, cut in taken]
        rows = lm.encode(inputs, [cut.first_target - 1 - cut.begin for _, cut in taken])  # type: ignore[arg-type]
        keys = torch.split(rows.keys.float().cpu(), [cut.num_targets for _, cut in taken])
        for (text, _), part in zip(taken, keys, strict=True):
            self._keys[text].append(part.numpy())
        return Searches(0, 0, 0)

    def keys(self, text: int, dim: int) -> NDArray[np.float32]:
        """(T − 1, D): the keys of a document's entries, once all windows are encoded."""
        return np.concatenate([np.empty((0, dim), np.float32), *self._keys[text]])
