"""Small parts that several views are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from urllib.parse import urlsplit

from markupsafe import Markup

from knnlm_playground.advice import Trouble

NOTHING = Markup("")


def join(parts: Iterable[Markup], between: str = "") -> Markup:
    """Put markup together."""
    return Markup(between).join(parts)


def heading(words: str) -> Markup:
    """What stands above a part of the page."""
    return Markup('<h2 class="knnlm-heading">{}</h2>').format(words)


def empty(words: str) -> Markup:
    """What stands where there is nothing yet."""
    return Markup('<p class="knnlm-empty">{}</p>').format(words)


def done(words: str) -> Markup:
    """That something worked."""
    return Markup('<p class="knnlm-done" role="status">{}</p>').format(words)


def trouble(what: Trouble) -> Markup:
    """An error, and what to do next."""
    return Markup('<div class="knnlm-trouble" role="alert"><p>{}</p><p>{}</p></div>').format(*what)


def progress(words: str, share: float | None = None) -> Markup:
    """How far something has come; the share is in 0 … 1, None where it is unknown."""
    bar = NOTHING
    if share is not None:
        percent = round(100 * min(1.0, max(0.0, share)))
        bar = Markup('<progress max="100" value="{}"></progress>').format(percent)
    return Markup('<div class="knnlm-progress" role="status"><span>{}</span>{}</div>').format(words, bar)


def figures(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names and values in two columns."""
    rows = (Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in pairs)
    return Markup('<dl class="knnlm-figures">{}</dl>').format(join(rows))


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it; None and infinity have a sign of their own."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return shown.replace("-", "−")


def probability(value: float | None) -> str:
    """A probability in per cent; what rounds to nothing is not nothing."""
    if value is None:
        return "–"
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return f"{100 * value:.1f} %"


def size(num_bytes: int) -> str:
    """Bytes in a unit that keeps the number short."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def link(uri: str) -> Markup:
    """A URI, to be followed only if it leads to the web: others could run code."""
    try:
        is_web = urlsplit(uri).scheme in ("http", "https")
    except ValueError:
        is_web = False
    if not is_web:
        return Markup("<span>{}</span>").format(uri)
    return Markup('<a href="{}" target="_blank" rel="noopener noreferrer nofollow">{}</a>').format(uri, uri)
