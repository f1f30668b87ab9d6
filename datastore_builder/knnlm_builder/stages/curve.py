"""Held-out perplexity against λ: the picture beside a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from knnlm_builder.stages.fit import LMBDAS, Evidence, Fit, nll_by_lmbda
from knnlm_core.datastore.calibration import Calibration

CURVE = "curve.png"


class Curve(NamedTuple):
    """Perplexity of some held-out tokens for one k and τ, at λ = 0 and every λ of the grid."""

    k: int
    knn_temperature: float
    lmbdas: tuple[float, ...]
    perplexities: tuple[float, ...]


def lmbda_curves(evidence: Evidence, fits: Sequence[Fit]) -> list[Curve]:
    """One curve per k, at the τ that was fitted to it; only λ varies."""
    lmbdas = (0.0, *LMBDAS)
    return [
        Curve(
            fit.k,
            fit.knn_temperature,
            lmbdas,
            tuple(nll_by_lmbda(evidence.nearest(fit.k), fit.knn_temperature, lmbdas).exp().tolist()),
        )
        for fit in fits
    ]


def draw_curves(path: Path, curves: Sequence[Curve], calibration: Calibration) -> str | None:
    """Draw the curves, the base LM and the point that was chosen; returns why not where matplotlib cannot be had."""
    try:
        from matplotlib.figure import Figure  # an extra: builds do without
    except ImportError:
        return "matplotlib is not installed (pip install 'knnlm[plot]')"
    except OSError as error:  # it wants a folder of its own to write to
        return f"matplotlib does not start: {error}"
    base = curves[0].perplexities[0]
    chosen = next(curve for curve in curves if curve.k == calibration.k)
    at = chosen.lmbdas.index(calibration.lmbda)

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(base, color="0.4", linestyle="--", linewidth=1, label=f"base LM  {base:.3f}")
    for curve in curves:
        axes.plot(curve.lmbdas, curve.perplexities, label=f"k = {curve.k}, τ = {curve.knn_temperature:.3g}")
    axes.plot(
        calibration.lmbda, chosen.perplexities[at], "ko", fillstyle="none", markersize=9,
        label=f"best single λ  {chosen.perplexities[at]:.3f} at {calibration.lmbda:.2f}",
    )  # fmt: skip
    # Where λ is far too large perplexity explodes and would flatten everything worth seeing.
    lowest = min(min(curve.perplexities) for curve in curves)
    if calibration.lambda_mode != "fixed":
        by_rule = float(calibration.report["mixed"]["perplexity"])  # type: ignore[index, call-overload, arg-type]
        axes.axhline(by_rule, color="k", linewidth=1, label=f"λ per token, {calibration.lambda_mode}  {by_rule:.3f}")
        lowest = min(lowest, by_rule)
    axes.set_ylim(lowest - 0.08 * (base - lowest) - 1e-3 * base, base + 0.6 * (base - lowest) + 0.02 * base)
    axes.set_xlim(0, 1)
    axes.set_xlabel("λ, weight of p_knn")
    axes.set_ylabel("perplexity on held-out text not fitted on")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=144, metadata={"Software": None})
    return None
