"""Tokens as coloured spans, each of which can be chosen by mouse and keyboard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from knnlm_client import ScoredToken, TraceEntry
from knnlm_playground.rendering.parts import NOTHING, join, number, probability
from knnlm_playground.tokens import Generated, pieces

Decision = Literal["searched", "followed", "skipped"]

SATURATED_GAIN = 0.5  # p − p_lm whose colour is the strongest
SATURATED_NATS = 2.0  # log p − log p_lm whose colour is the strongest
_PROMPT_CHARS = 600
_UNREADABLE = "\ufffd"  # what a part of a character decodes to


class Shown(NamedTuple):
    """A token with what colours it.

    Attributes:
        text: its characters, perhaps none.
        name: what it is called where it has none.
        gain: −1 … 1; above 0 where the datastore made the token likelier.
        hint: what is said when a mouse rests on it.
    """

    text: str
    name: str
    lmbda: float
    gain: float
    decision: Decision
    hint: str


def shown_generated(tokens: Iterable[Generated]) -> list[Shown]:
    """Tokens of a completion; gain is p − p_lm."""
    return [_of_trace(token) for token in tokens]


def shown_scored(text: str, tokens: Sequence[ScoredToken]) -> list[Shown]:
    """Tokens of a scored text; gain is log p_mixed − log p_lm."""
    texts = scored_pieces(text, tokens)
    return [_of_score(piece, token) for piece, token in zip(texts, tokens, strict=True)]


def scored_pieces(text: str, tokens: Sequence[ScoredToken]) -> list[str]:
    """The characters of each scored token; where it has no offset, what the vocabulary calls it."""
    offsets = [token.offset for token in tokens if token.offset is not None]
    return pieces(text, offsets) if len(offsets) == len(tokens) else [token.token for token in tokens]


def decision_of(searched: bool | None, followed: bool) -> Decision:
    """How a token's neighbours were come by."""
    return "searched" if searched else "followed" if followed else "skipped"


def render_tokens(tokens: Sequence[Shown], *, before: str = "", after: str = "") -> Markup:
    """A paragraph of tokens.

    Args:
        before: text in front that is no token of its own, such as the prompt; only its end is shown.
        after: what stands behind the tokens, such as the sign that more will come.
    """
    if len(before) > _PROMPT_CHARS:
        before = "…" + before[-_PROMPT_CHARS:]
    head = Markup('<span class="knnlm-prompt">{}</span>').format(before) if before else NOTHING
    tail = Markup('<span class="knnlm-more">{}</span>').format(after) if after else NOTHING
    spans = join(_span(index, token) for index, token in enumerate(tokens))
    return Markup('<div class="knnlm-text" dir="auto">{}{}{}</div>').format(head, spans, tail)


def _span(index: int, token: Shown) -> Markup:
    classes = ["knnlm-token", token.decision, "gain" if token.gain >= 0 else "loss"]
    text = token.text
    if not text:
        classes.append("part")
        # Bytes of a character whose last token shows it have nothing to show themselves.
        text = "·" if _UNREADABLE in token.name or not token.name else token.name
    elif "\n" in text:
        classes.append("break")
    return Markup(
        '<span class="{}" data-token="{}" role="button" tabindex="{}" title="{}"'
        ' style="--lambda:{:.3f};--gain:{:.3f}">{}</span>'
    ).format(" ".join(classes), index, 0 if index == 0 else -1, token.hint, token.lmbda, abs(token.gain), text)


def _of_trace(token: Generated) -> Shown:
    trace: TraceEntry = token.trace
    decision = decision_of(trace.searched, trace.followed)
    hint = f"p {probability(trace.p)} · model alone {probability(trace.p_lm)} · λ {number(trace.lmbda, 2)} · {decision}"
    gain = _clipped((trace.p - trace.p_lm) / SATURATED_GAIN)
    return Shown(token.text, trace.token, trace.lmbda, gain, decision, hint)


def _of_score(text: str, token: ScoredToken) -> Shown:
    nats = token.mixed - token.base
    decision = decision_of(token.searched, token.followed)
    hint = f"{number(nats)} nats · λ {number(token.lmbda, 2)} · {decision}"
    return Shown(text, token.token, token.lmbda, _clipped(nats / SATURATED_NATS), decision, hint)


def _clipped(value: float) -> float:
    return min(1.0, max(-1.0, value))
