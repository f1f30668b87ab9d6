"""Held-out perplexity against λ, and against the searches that gates save: the pictures beside a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from knnlm_builder.progress import Reporter
from knnlm_builder.stages.fit import LMBDAS, Evidence, Fit, nll_by_lmbda
from knnlm_core.datastore.calibration import Calibration

CURVE, GATES = "curve.png", "gates.png"


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


def draw(folder: Path, curves: Sequence[Curve], calibration: Calibration, reporter: Reporter) -> None:
    """Draw what there is to see into a calibration's folder, or say why not."""
    try:
        from matplotlib.figure import Figure  # an extra: builds do without
    except ImportError:
        _say_not_drawn(reporter, "matplotlib is not installed (pip install 'knnlm[plot]')")
        return
    except OSError as error:  # it wants a folder of its own to write to
        _say_not_drawn(reporter, f"matplotlib does not start: {error}")
        return
    for name, draw_on in ((CURVE, partial(_draw_lambdas, curves=curves)), (GATES, _draw_gates)):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        draw_on(axes, calibration=calibration)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(folder / name, dpi=144, metadata={"Software": None})


def _say_not_drawn(reporter: Reporter, why: str) -> None:
    for name in (CURVE, GATES):
        reporter.say(f"{name} is not drawn: {why}")


def _draw_lambdas(axes: Any, *, curves: Sequence[Curve], calibration: Calibration) -> None:
    base = curves[0].perplexities[0]
    chosen = next(curve for curve in curves if curve.k == calibration.k)
    at = chosen.lmbdas.index(calibration.lmbda)

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
        by_rule = _perplexity_of_mode(calibration, calibration.lambda_mode)
        axes.axhline(by_rule, color="k", linewidth=1, label=f"λ per token, {calibration.lambda_mode}  {by_rule:.3f}")
        lowest = min(lowest, by_rule)
    axes.set_ylim(lowest - 0.08 * (base - lowest) - 1e-3 * base, base + 0.6 * (base - lowest) + 0.02 * base)
    axes.set_xlim(0, 1)
    axes.set_xlabel("λ, weight of p_knn")
    axes.set_ylabel("perplexity on held-out text not fitted on")


def _draw_gates(axes: Any, *, calibration: Calibration) -> None:
    report: Any = calibration.report
    points: dict[str, list[tuple[float, float]]] = {}
    for gate in report["gates"]:
        points.setdefault(gate["gate"], []).append((100 * (1 - gate["searched"]), gate["perplexity"]))
    (everything,) = points.pop("always")
    base, single = report["base"]["perplexity"], _perplexity_of_mode(calibration, "fixed")
    axes.axhline(base, color="0.4", linestyle="--", linewidth=1, label=f"base LM  {base:.3f}")
    axes.axhline(single, color="0.4", linestyle=":", linewidth=1, label=f"every search, one λ  {single:.3f}")
    axes.axhline(everything[1], color="k", linewidth=1, label=f"every search  {everything[1]:.3f}")
    for name, places in points.items():
        axes.plot(*zip(*sorted(places), strict=True), marker=".", label=name)
    axes.set_xlim(0, 100)
    axes.set_ylim(top=max(base, single) + 0.1 * abs(base - everything[1]))
    axes.set_xlabel("searches saved, %")
    axes.set_ylabel("perplexity on held-out text not fitted on")


def _perplexity_of_mode(calibration: Calibration, mode: str) -> float:
    report: Any = calibration.report
    return float(report["lambda_modes"][mode]["perplexity"])
