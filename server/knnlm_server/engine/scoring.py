"""Scoring a batch of texts by rolling windows: each token once, base and mixed side by side, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.head import log_probs_of_targets
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.mixture import Retrieval, mix_targets
from knnlm_core.windows import Window, rolling_windows

SEARCH_ROWS = 512  # queries per search: bounds the neighbours held at once to SEARCH_ROWS × k


class TokenScores(NamedTuple):
    """Log-probabilities (natural log) of the scored tokens of a text, position 1 onwards; T − 1 of each."""

    base: NDArray[np.float32]
    mixed: NDArray[np.float32]
    lmbda: NDArray[np.float32]
    searched: NDArray[np.bool_]


@dataclass(slots=True)
class _TextInWork:
    token_ids: Sequence[int]
    scores: TokenScores
    windows_left: int


class WindowOfText(NamedTuple):
    """One window and the text that it belongs to."""

    text: int
    window: Window


@dataclass(slots=True, eq=False)
class ScoreRequest:
    """A batch of tokenised texts to score.

    Attributes:
        texts: token ids, at least two each; position 0 is context only.
        window, stride: in tokens, see `rolling_windows`.
        on_text: called on the engine's thread when a text is done, in the order of completion.
        on_end: called exactly once when the request leaves the engine: with None, or with why it failed.
    """

    request_id: str
    texts: Sequence[Sequence[int]]
    retrieval: Retrieval | None
    window: int
    stride: int
    on_text: Callable[[int, TokenScores], None]
    on_end: Callable[[KnnlmError | None], None]
    _pending: Iterator[WindowOfText] = field(init=False)
    _next: WindowOfText | None = field(init=False)
    _in_work: dict[int, _TextInWork] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._pending = self._windows()
        self._next = next(self._pending, None)

    def _windows(self) -> Iterator[WindowOfText]:
        for index, token_ids in enumerate(self.texts):
            count = len(token_ids)
            windows = list(rolling_windows(count, self.window, self.stride))
            base, mixed, lmbda = (np.zeros(count - 1, np.float32) for _ in range(3))
            scores = TokenScores(base, mixed, lmbda, np.zeros(count - 1, np.bool_))
            self._in_work[index] = _TextInWork(token_ids, scores, len(windows))
            for window in windows:
                yield WindowOfText(index, window)

    @property
    def is_done(self) -> bool:
        """Whether every window has been scored."""
        return self._next is None and not self._in_work

    def take(self, token_budget: int) -> list[WindowOfText]:
        """The next windows, at least one, of together at most ``token_budget`` padded tokens if possible."""
        taken: list[WindowOfText] = []
        widest = 0
        while self._next is not None:
            widest = max(widest, self._next.window.end - self._next.window.begin)
            if taken and widest * (len(taken) + 1) > token_budget:
                break
            taken.append(self._next)
            self._next = next(self._pending, None)
        return taken

    def score(self, lm: CausalLM, taken: Sequence[WindowOfText]) -> None:
        """Score windows that `take` handed out and report the texts that they complete."""
        inputs: list[Sequence[int]] = []
        first_rows: list[int] = []
        targets: list[int] = []
        for index, window in taken:
            ids = self._in_work[index].token_ids
            # The row at position t predicts token t + 1, so the last token is never an input.
            inputs.append(ids[window.begin : window.end - 1])
            first_rows.append(window.first_target - 1 - window.begin)
            targets.extend(ids[window.first_target : window.end])
        scores = score_windows(lm, inputs, first_rows, targets, self.retrieval)
        start = 0
        for index, window in taken:
            work = self._in_work[index]
            into = slice(window.first_target - 1, window.end - 1)
            for whole, part in zip(work.scores, scores, strict=True):
                whole[into] = part[start : start + window.num_targets]
            start += window.num_targets
            work.windows_left -= 1
            if not work.windows_left:
                del self._in_work[index]
                self.on_text(index, work.scores)


def score_windows(
    lm: CausalLM,
    inputs: Sequence[Sequence[int]],
    first_rows: Sequence[int],
    targets: Sequence[int],
    retrieval: Retrieval | None,
) -> TokenScores:
    """Score the tokens that follow the last rows of some windows.

    Args:
        inputs: token ids of each window.
        first_rows: per window, the first row whose next token is scored.
        targets: those next tokens, window after window.
    """
    rows = lm.encode(inputs, first_rows)
    target_ids = torch.as_tensor(targets, dtype=torch.long, device=rows.keys.device)
    base = log_probs_of_targets(lm, rows.hidden, target_ids)
    parts = []
    for start in range(0, len(target_ids), SEARCH_ROWS):
        rows_here = slice(start, start + SEARCH_ROWS)
        keys = rows.keys[rows_here]
        mixed, found = mix_targets(base[rows_here], keys, target_ids[rows_here], [retrieval] * len(keys))
        parts.append((mixed, found.lmbda, found.searched))
    columns = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return TokenScores(base.cpu().numpy(), *columns)
