"""How many guessed tokens to verify in a step: as many as promise the most tokens per second, often none.

A guess is worth what guesses like it were worth before: its chance is the share of them that came true. That is learned
from every token, verified as a draft or not, since the guess that was made for it is held against what came. A wider
pass costs what wider passes were seen to cost. Neither touches what is generated, only how soon.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, takewhile
from operator import mul
from typing import NamedTuple

from knnlm_core.drafts import NO_OUTLOOK, Guess, Outlook, guess, look_ahead
from knnlm_server.engine.draft_reading import read_for_drafts
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.scheduler import Batch, Decode

SHARES = (0.5, 0.8, 0.99)  # borders between cells, of `Guess.share`
SUPPORTS = (0.01, 0.03, 0.1, 0.3, 0.6)  # of `Guess.support`
STREAKS = (1, 4, 16)  # of guesses that came true in a row just before
_PRIOR_GUESSES = 4.0  # how many guesses an unseen cell counts for
_MEMORY = 1024.0  # guesses after which a cell has half forgotten
_COST_PASSES = 15  # of one width
_COST_MEMORY = 512  # passes after which a width that did not come again is forgotten
_PRIOR_COST = 0.1  # of a token in a pass, in units of a pass without any; beyond the widths that were seen


class Acceptance:
    """The share of guesses that came true, by what was known of them."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, ...], tuple[float, float]] = {}  # guesses, and how many of them came true

    def chance(self, guessed: Guess, streak: int) -> float:
        """That a guess comes true: the mean of its cell, which begins at the guess's own share of its datastore."""
        guesses, true = self._cells.get(_cell(guessed, streak), (0.0, 0.0))
        prior = guessed.share * math.sqrt(math.sqrt(guessed.support))
        return (true + _PRIOR_GUESSES * prior) / (guesses + _PRIOR_GUESSES)

    def learn(self, guessed: Guess, streak: int, came_true: bool) -> None:
        """Take one more outcome into account."""
        cell = _cell(guessed, streak)
        guesses, true = self._cells.get(cell, (0.0, 0.0))
        fade = 0.5 if guesses >= _MEMORY else 1.0
        self._cells[cell] = (guesses * fade + 1, true * fade + came_true)


def _cell(guessed: Guess, streak: int) -> tuple[int, ...]:
    return (
        bisect_right(SHARES, guessed.share),
        bisect_right(SUPPORTS, guessed.support),
        bisect_right(STREAKS, streak),
    )


class PassCosts:
    """What a pass over T tokens takes: the median of the last ones, so that one that was held up changes nothing.

    Widths not seen lie on the line between those around them. One not seen for long is forgotten, so that what was
    slow once is tried again.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._seconds: dict[int, deque[float]] = {}
        self._medians: dict[int, tuple[int, float]] = {}  # which pass was the last one, and the median

    def learn(self, tokens: int, seconds: float) -> None:
        """Take one more pass into account."""
        self._passes += 1
        self._medians = {t: seen for t, seen in self._medians.items() if self._passes - seen[0] <= _COST_MEMORY}
        if tokens not in self._medians:
            self._seconds[tokens] = deque(maxlen=_COST_PASSES)
        self._seconds[tokens].append(seconds)
        self._medians[tokens] = (self._passes, statistics.median(self._seconds[tokens]))

    def seconds(self, tokens: int) -> float:
        """Of a pass over so many tokens; relative only, before any was seen."""
        if tokens in self._medians:
            return self._medians[tokens][1]
        below = max((t for t in self._medians if t < tokens), default=None)
        above = min((t for t in self._medians if t > tokens), default=None)
        if below is not None and above is not None:
            part = (tokens - below) / (above - below)
            return (1 - part) * self._medians[below][1] + part * self._medians[above][1]
        nearest = below or above
        scale = self._medians[nearest][1] / (1 + _PRIOR_COST * nearest) if nearest else 1.0
        return scale * (1 + _PRIOR_COST * tokens)


class Outlined(NamedTuple):
    """The guesses for a choice, and the chance that all up to each come true."""

    guesses: list[Guess]
    chances: list[float]


class Speculator:
    """Drafts for the choices of a step.

    Args:
        most: tokens of one draft; 0 never drafts.
        most_rows: rows of one pass, drafts included.
        step_tokens: tokens of one step; drafts get what decoding and prompts leave over.
    """

    def __init__(self, most: int, most_rows: int, step_tokens: int) -> None:
        self.most = most
        self._most_rows = most_rows
        self._step_tokens = step_tokens
        self._acceptance = Acceptance()
        self._costs = PassCosts()
        self._draws: deque[float] = deque([0.0], maxlen=_COST_PASSES)  # seconds

    def draft(self, batch: Batch, eos_token_ids: Sequence[int]) -> Batch:
        """The same batch with the drafts that pay."""
        guessing = [decode for decode in batch.decodes if decode.request.retrieval is not None]
        if not self.most or not guessing:
            return batch
        self._look_ahead(guessing)
        outlined = [self._outline(decode, eos_token_ids) for decode in batch.decodes]
        width = self._best_width(outlined, self._step_tokens - batch.num_tokens)
        decodes = [
            Decode(request, choice, [guessed.token_id for guessed in guesses[:width]])
            for (request, choice, _), (guesses, _) in zip(batch.decodes, outlined, strict=True)
        ]
        return batch._replace(decodes=decodes)

    def learn_cost(self, batch: Batch, pass_seconds: float, draw_seconds: float) -> None:
        """What a batch without prompts took: the pass itself, and after it each token of the longest row of them."""
        if batch.decodes and not batch.chunks:
            tokens = len(batch.decodes) * (1 + max(len(decode.draft) for decode in batch.decodes))
            self._costs.learn(tokens, pass_seconds)
            self._draws.append(draw_seconds)

    def learn(self, choice: Choice, tokens: Sequence[int]) -> None:
        """Hold the guesses that were made for a choice against the tokens that came."""
        for guessed, token in zip(choice.guesses, tokens, strict=False):
            came_true = guessed.token_id == token
            self._acceptance.learn(guessed, choice.streak, came_true)
            choice.streak = choice.streak + 1 if came_true else 0
            if not came_true:
                break
        choice.guesses = []

    def _look_ahead(self, decodes: Sequence[Decode]) -> None:
        leads = [decode.choice.leads for decode in decodes]
        retrievals = [decode.request.retrieval for decode in decodes if decode.request.retrieval is not None]

        def read(members: Sequence[int]) -> list[Outlook]:
            return look_ahead([leads[i] for i in members], [retrievals[i] for i in members], self.most + 2)

        outlooks = read_for_drafts([decode.request for decode in decodes], read, NO_OUTLOOK)
        for decode, outlook in zip(decodes, outlooks, strict=True):
            decode.choice.outlook = outlook

    def _outline(self, decode: Decode, eos_token_ids: Sequence[int]) -> Outlined:
        request, choice, _ = decode
        choice.guesses = guess(choice.outlook, self.most)
        # A pass gives one more token than its draft has.
        room = request.params.max_tokens - len(choice.token_ids) - 1
        useful = _before_the_end(choice.guesses, request, eos_token_ids)[:room]
        each = [self._acceptance.chance(guessed, choice.streak + i) for i, guessed in enumerate(useful)]
        return Outlined(useful, list(accumulate(each, mul)))

    def _best_width(self, outlined: Sequence[Outlined], spare: int) -> int:
        """Tokens of the longest draft: where tokens expected per second of the pass are most.

        Args:   spare: tokens that all drafts together may have.
        """
        rows, draw = len(outlined), statistics.median(self._draws)
        best, best_rate = 0, rows / (self._costs.seconds(rows) + draw)
        tokens, rounds = float(rows), 1.0  # expected; tokens at one depth are drawn together, one depth after the other
        for width in range(1, self.most + 1):
            if rows * (1 + width) > self._most_rows:
                break
            chances = [each.chances[width - 1] for each in outlined if len(each.chances) >= width]
            spare -= len(chances)
            if spare < 0:
                break
            tokens += sum(chances)
            rounds += 1 - math.prod(1 - chance for chance in chances)
            rate = tokens / (self._costs.seconds(rows * (1 + width)) + rounds * draw)
            if rate > best_rate:
                best, best_rate = width, rate
        return best


def _before_the_end(guesses: list[Guess], request: CompletionRequest, eos_token_ids: Sequence[int]) -> list[Guess]:
    """Whether a token comes is seen without drafting it, and after one that ends the completion nothing is drawn."""
    ends = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else eos_token_ids)}
    return list(takewhile(lambda guessed: guessed.token_id not in ends, guesses))
