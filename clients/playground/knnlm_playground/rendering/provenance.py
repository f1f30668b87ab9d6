"""Where one token came from."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from knnlm_client import ScoredToken, TraceEntry, TraceNeighbor
from knnlm_playground.rendering.parts import NOTHING, empty, figures, join, link, number, probability
from knnlm_playground.rendering.tokens import decision_of
from knnlm_playground.sources import Excerpt

_CHARS_BEFORE, _CHARS_AFTER = 160, 80  # of a source
_DECISIONS = {
    "searched": "searched: the neighbours are the nearest entries",
    "followed": "followed: the neighbours stand behind those of the token before",
    "skipped": "neither searched nor followed: the language model alone",
}


def render_provenance(text: str, trace: TraceEntry, excerpts: Sequence[Excerpt | None]) -> Markup:
    """A generated token: how likely it was by whom, what the gate decided, and the neighbours with their sources.

    Args:     excerpts: one per neighbour; None where the text is not to be had.
    """
    decision = decision_of(trace.searched, trace.followed)
    facts: list[tuple[str, object]] = [
        ("λ", number(trace.lmbda)),
        ("gate", trace.decision),
        ("decision", _DECISIONS[decision]),
    ]
    if trace.gate_score is not None:
        facts.append(("score against threshold", f"{number(trace.gate_score)} against {number(trace.gate_threshold)}"))
    if trace.pointers:
        facts.append(("entries to follow", str(trace.pointers)))
    for store in trace.datastores or ():
        facts.append((store.name, f"weight {number(store.weight)}, λ {number(store.lmbda)}, {_knn(store.p_knn)}"))
    return Markup('<section class="knnlm-panel">{}{}{}{}</section>').format(
        _heading(text or trace.token), _probabilities(trace), figures(facts), _neighbors(trace, excerpts)
    )


def render_scored(text: str, token: ScoredToken) -> Markup:
    """A scored token: what the model and the mixture gave it."""
    facts: list[tuple[str, object]] = [
        ("log p, model alone", f"{number(token.base, 4)} nats"),
        ("log p, mixed", f"{number(token.mixed, 4)} nats"),
        ("gain", f"{number(token.mixed - token.base)} nats"),
        ("λ", number(token.lmbda)),
        ("gate", token.decision),
        ("decision", _DECISIONS[decision_of(token.searched, token.followed)]),
    ]
    return Markup('<section class="knnlm-panel">{}{}</section>').format(_heading(text or token.token), figures(facts))


def _heading(token: str) -> Markup:
    return Markup('<h3>Token <code class="knnlm-code">{}</code></h3>').format(token.replace("\n", "↵"))


def _knn(p_knn: float) -> str:
    return f"p_knn {probability(p_knn)}"


def _probabilities(trace: TraceEntry) -> Markup:
    rows = (
        ("p, mixed", trace.p),
        ("p_knn, datastore", trace.p_knn),
        ("p_lm, model alone", trace.p_lm),
    )
    bars = (
        Markup('<div class="knnlm-bar"><span>{}</span><i style="--share:{:.4f}"></i><b>{}</b></div>').format(
            name, value or 0.0, probability(value)
        )
        for name, value in rows
    )
    return Markup('<div class="knnlm-bars">{}</div>').format(join(bars))


def _neighbors(trace: TraceEntry, excerpts: Sequence[Excerpt | None]) -> Markup:
    if not trace.neighbors:
        return empty("No neighbours: nothing from a datastore went into this token.")
    cards = (
        _neighbor(neighbor, excerpt, is_same=neighbor.token == trace.token)
        for neighbor, excerpt in zip(trace.neighbors, excerpts, strict=True)
    )
    return Markup('<h4>The strongest neighbours</h4><ol class="knnlm-neighbors">{}</ol>').format(join(cards))


def _neighbor(neighbor: TraceNeighbor, excerpt: Excerpt | None, *, is_same: bool) -> Markup:
    proposes = Markup('proposes {} <code class="knnlm-code">{}</code>').format(
        "this token," if is_same else "another,", neighbor.token.replace("\n", "↵")
    )
    head = Markup("<header><b>{}</b><span>of p_knn</span><span>distance {}</span><span>{}</span></header>").format(
        probability(neighbor.weight), number(neighbor.distance, 4), proposes
    )
    if excerpt is not None:
        before, after = excerpt.before[-_CHARS_BEFORE:].lstrip("\n"), excerpt.after[:_CHARS_AFTER].rstrip("\n")
        quote = Markup('<blockquote dir="auto">…{}<mark>{}</mark>{}…</blockquote>').format(
            before, excerpt.token.replace("\n", "↵\n"), after
        )
    else:
        quote = Markup('<p class="knnlm-note">Its text is not among what a search finds now.</p>')
    return Markup('<li class="{}">{}{}{}</li>').format("same" if is_same else "other", head, quote, _source(neighbor))


def _source(neighbor: TraceNeighbor) -> Markup:
    if neighbor.document_id is None:
        return Markup('<p class="knnlm-source">entry {}, of no known document</p>').format(neighbor.entry_id)
    parts = [Markup("<b>{}</b>").format(neighbor.title)] if neighbor.title else []
    parts.append(Markup("<span>document <code>{}</code></span>").format(neighbor.document_id))
    if neighbor.datastore is not None:
        parts.append(Markup("<span>in {}</span>").format(neighbor.datastore))
    parts.append(Markup("<span>{}</span>").format(neighbor.licence or "no licence given"))
    parts.append(link(neighbor.uri) if neighbor.uri else NOTHING)
    return Markup('<p class="knnlm-source">{}</p>').format(join(parts))
