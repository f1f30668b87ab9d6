"""A scored text as a heat map, with its totals."""

from __future__ import annotations

from markupsafe import Markup

from knnlm_client import Loss, ScoreResult
from knnlm_playground.rendering.parts import NOTHING, join, number
from knnlm_playground.rendering.tokens import render_tokens, shown_scored


def render_heat(text: str, result: ScoreResult) -> Markup:
    """The text, coloured by what the datastore gained or lost per token; what has no context is not scored."""
    tokens = result.per_token or []
    first = tokens[0].offset if tokens else None
    return render_tokens(shown_scored(text, tokens), before=text[:first] if first else "")


def render_totals(result: ScoreResult) -> Markup:
    """Perplexity and bits per byte, of the model alone and mixed."""
    rows = join((_row("Language model alone", result.base), _row("With the datastore", result.mixed)))
    note = f"{result.tokens} tokens, {result.bytes} bytes; {result.searched} searched"
    note += f", {result.followed} followed" if result.followed else ""
    return Markup(
        '<div class="knnlm-wide" tabindex="0" role="region" aria-label="Totals"><table class="knnlm-table"><thead>'
        "<tr><th></th><th>perplexity</th><th>bits per byte</th><th>nats</th></tr>"
        '</thead><tbody>{}</tbody></table></div><p class="knnlm-note">{}{}</p>'
    ).format(rows, note, _gain(result))


def _row(name: str, loss: Loss) -> Markup:
    cells = (number(value, 4) for value in (loss.perplexity, loss.bits_per_byte, loss.nll))
    return Markup("<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td></tr>").format(name, *cells)


def _gain(result: ScoreResult) -> Markup:
    base, mixed = result.base.perplexity, result.mixed.perplexity
    if not base or not mixed:
        return NOTHING
    change = 100 * (mixed / base - 1)
    return Markup("; perplexity {} %").format(f"{change:+.1f}".replace("-", "−"))
