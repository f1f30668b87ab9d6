"""What each token gains by retrieval, drawn: who wins and who loses, where in the text, and by overlap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_cli.score_report import Total, percent
from knnlm_cli.score_results import Scores
from knnlm_cli.score_used import Used
from knnlm_core.errors import InvalidParameter, UnsupportedFeature
from knnlm_core.scores import Bucket, bucket_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIN, LOSE, BASE = "#1b7f79", "#c2452d", "0.35"
MAX_POINTS = 2000  # of the curve of sorted gains
MIN_BIN_TOKENS = 8  # fewer say nothing about a mean

Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """Tokens that are drawn as one."""

    label: str
    tokens: int
    mean: float  # gain in nats per token; 0 where there are no tokens
    error: float  # standard error of the mean, tokens taken as independent; 0 for a single one


def position_bins(positions: NDArray[np.int64], gains: Floats) -> list[Bin]:
    """Tokens by position in the document, counted from 1, in bins that double: 1, 2–3, 4–7, …"""
    octaves = np.floor(np.log2(positions + 1)).astype(np.int64)
    last = int(octaves.max(initial=-1))
    bins = [_bin(_range(2**octave, 2 ** (octave + 1) - 1), gains[octaves == octave]) for octave in range(last + 1)]
    return [found for found in bins if found.tokens >= MIN_BIN_TOKENS]


def overlap_bins(matches: NDArray[np.uint8], gains: Floats, overlap: Sequence[Bucket]) -> list[Bin]:
    """Tokens by longest match, one bin for each bucket of the report, empty ones too."""
    which = bucket_of(matches)
    return [_bin(bucket.label, gains[which == i]) for i, bucket in enumerate(overlap)]


def _bin(label: str, gains: Floats) -> Bin:
    count = len(gains)
    error = float(gains.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return Bin(label, count, float(gains.mean()) if count else 0.0, error)


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def require_matplotlib() -> None:
    """Raises UnsupportedFeature: it is not installed, or does not start."""
    try:
        import matplotlib.figure  # noqa: F401  (an extra)
    except ImportError:
        raise UnsupportedFeature("--plot needs matplotlib: pip install 'knnlm[plot]'") from None
    except OSError as error:  # it wants a folder of its own to write to
        raise UnsupportedFeature(f"--plot: matplotlib does not start: {error}") from error


def draw_gains(scores: Scores, total: Total, used: Used) -> Figure:
    """Draw a run that has used a datastore; tokens of probability zero are left out, and counted in the title."""
    from matplotlib.figure import Figure

    with np.errstate(invalid="ignore"):
        gains = scores.mixed.astype(np.float64) - scores.base
    finite = np.isfinite(gains)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    figure.suptitle(_title(scores, total, used, int((~finite).sum())), fontsize=12, wrap=True)
    matches = scores.longest_match
    grid = figure.add_gridspec(1 if matches is None else 2, 2, width_ratios=(1.15, 1))
    _draw_sorted(figure.add_subplot(grid[:, 0]), gains[finite])
    _draw_positions(figure.add_subplot(grid[0, 1]), position_bins(scores.positions()[finite], gains[finite]))
    if matches is not None and total.overlap is not None:
        bins = overlap_bins(matches[finite], gains[finite], total.overlap)
        _draw_overlap(figure.add_subplot(grid[1, 1]), bins)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure; the suffix says how. Raises InvalidParameter: the file cannot be written."""
    try:
        figure.savefig(path, dpi=144)
    except OSError as error:
        raise InvalidParameter(f"--plot {str(path)!r} cannot be written: {error.strerror or error}") from error


def _title(scores: Scores, total: Total, used: Used, left_out: int) -> str:
    lm = used.model.partition("@")[0]
    base, mixed = total.base.perplexity, total.mixed.perplexity
    line = f"What datastore “{used.datastore}” adds to {lm}, token by token"
    line += f"\n{len(scores.rows):,} documents, {total.tokens:,} tokens"
    if base is not None and mixed is not None and total.change is not None:
        line += f": perplexity {base:.2f} → {mixed:.2f} ({percent(total.change)})"
        if total.interval is not None:
            line += f", 95 % interval {percent(total.interval.low)} … {percent(total.interval.high)}"
    return line + (f"\n{left_out:,} tokens of probability zero are not drawn" if left_out else "")


def _draw_sorted(axes: Any, gains: Floats) -> None:
    """The gains from the worst to the best: widths are shares of tokens, areas are nats."""
    ordered = np.sort(gains)
    count = len(ordered)
    at = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))
    share, shown = 100 * (at + 0.5) / count, ordered[at]
    lost, won = ordered[ordered < 0], ordered[ordered > 0]
    axes.fill_between(share, shown, 0, where=shown < 0, color=LOSE, alpha=0.75, linewidth=0)
    axes.fill_between(share, shown, 0, where=shown > 0, color=WIN, alpha=0.75, linewidth=0)
    axes.axhline(0, color=BASE, linewidth=0.8)
    # A few tokens gain ten nats; linear up to one, so that the many small ones are seen too.
    axes.set_yscale("symlog", linthresh=1.0, linscale=1.5)
    axes.set_ylim(min(1.15 * float(ordered[0]), -0.1), max(1.15 * float(ordered[-1]), 0.1))
    axes.set_yticks(
        [tick for tick in (-10, -5, -2, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10) if _inside(axes, tick)]
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlim(0, 100)
    axes.set_xlabel("tokens from the greatest loss to the greatest gain, %")
    axes.set_ylabel("gain in log-probability, nats (log scale beyond ±1)")
    for names, part, color, height in (("lose", lost, LOSE, 0.90), ("win", won, WIN, 0.97)):
        text = f"{len(part) / count:.1%} {names}: {part.sum() / count:+.4f} nats per token".replace("-", "−")
        axes.text(0.03, height, text, transform=axes.transAxes, color=color, va="top", fontweight="bold")
    axes.set_title("Who wins and who loses", loc="left", fontsize=10)


def _inside(axes: Any, value: float) -> bool:
    low, high = axes.get_ylim()
    return bool(low <= value <= high)


def _draw_positions(axes: Any, bins: Sequence[Bin]) -> None:
    places, means, errors = range(len(bins)), [b.mean for b in bins], [b.error for b in bins]
    axes.axhline(0, color=BASE, linewidth=0.8)
    axes.errorbar(places, means, yerr=errors, color=WIN, marker="o", markersize=4)
    axes.set_xticks(places, [b.label for b in bins], fontsize=8, rotation=30, ha="right")
    axes.set_xlabel("position of the token in its document")
    axes.set_ylabel("mean gain ± s.e., nats")
    axes.set_title("Where in the text", loc="left", fontsize=10)


def _draw_overlap(axes: Any, bins: Sequence[Bin]) -> None:
    tokens = sum(b.tokens for b in bins)
    places, means = range(len(bins)), [b.mean for b in bins]
    colors = [WIN if mean >= 0 else LOSE for mean in means]
    bars = axes.bar(places, means, yerr=[b.error for b in bins], color=colors, alpha=0.75, ecolor=BASE)
    axes.axhline(0, color=BASE, linewidth=0.8)
    shares = [f"{b.tokens / tokens:.1%}" if b.tokens else "none" for b in bins]
    axes.bar_label(bars, shares, fontsize=8, padding=2)
    axes.margins(y=0.18)
    axes.set_xticks(places, [b.label for b in bins])
    axes.set_xlabel("longest match with the datastore, tokens")
    axes.set_ylabel("mean gain ± s.e., nats")
    axes.set_title("By overlap, with each one’s share of the tokens", loc="left", fontsize=10)
