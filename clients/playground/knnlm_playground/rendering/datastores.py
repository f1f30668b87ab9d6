"""Datastores: the list, and one of them in detail."""

from __future__ import annotations

from markupsafe import Markup

from knnlm_client import Datastore, DatastoreList
from knnlm_playground.rendering.calibration import Calibration, GatePoint, read_calibration
from knnlm_playground.rendering.charts import Chart, render_chart
from knnlm_playground.rendering.parts import NOTHING, empty, figures, join, number, size


def render_list(stores: DatastoreList) -> Markup:
    """All loaded datastores in a table, and what else could be loaded."""
    if not stores.loaded and not stores.published:
        return empty("No datastores. Build one with “knnlm build”, and start the server with --datastores.")
    rows = join(_row(store, is_default=store.name == stores.default) for store in stores.loaded)
    head = join(
        Markup("<th>{}</th>").format(name)
        for name in ("name", "state", "version", "revision", "entries", "documents", "size", "in use")
    )
    table = (
        Markup(
            '<div class="knnlm-wide" tabindex="0" role="region" aria-label="Datastores"><table class="knnlm-table">'
            "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
        ).format(head, rows)
        if rows
        else NOTHING
    )
    others = Markup('<p class="knnlm-note">Published, not loaded: {}</p>').format(", ".join(stores.published))
    return table + (others if stores.published else NOTHING)


def render_details(store: Datastore) -> Markup:
    """One datastore: its calibration with the curve, and what is known of its index."""
    calibration = read_calibration(store.calibration)
    parts = [_calibration(store, calibration), _index(store, calibration)]
    if calibration is not None and calibration.report.gates:
        parts.append(render_chart(gates_chart(calibration)))
    return Markup('<div class="knnlm-details">{}</div>').format(join(parts))


def gates_chart(calibration: Calibration) -> Chart:
    """Perplexity on held-out text against searches saved, one line per gate."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for gate in calibration.report.gates:
        saved = 100 * (1 - gate.searched)
        series.setdefault(gate.gate, []).append((saved, gate.perplexity, _words(gate, saved)))
    # That searches everywhere, so it is a point on the left edge, and more useful as a level.
    always = series.pop("always", None)
    levels = {"language model alone": calibration.report.base.perplexity}
    if always:
        levels["every search"] = always[0][1]
    return Chart("Perplexity against searches saved", "searches saved, %", "perplexity", series, levels)


def _words(gate: GatePoint, saved: float) -> str:
    threshold = f" {number(gate.threshold)}" if gate.threshold is not None else ""
    return f"{gate.gate}{threshold}: perplexity {number(gate.perplexity, 4)}, {saved:.0f} % of the searches saved"


def _row(store: Datastore, *, is_default: bool) -> Markup:
    names = store.name + (" (default)" if is_default else "")
    aliases = Markup('<br><span class="knnlm-note">also {}</span>').format(", ".join(store.aliases))
    changes = [f"{store.learned_documents} learned"] if store.learned_documents else []
    changes += [f"{store.deleted_documents} deleted"] if store.deleted_documents else []
    documents = f"{store.documents:,}" + (f" ({', '.join(changes)})" if changes else "")
    return Markup(
        "<tr><th>{}{}</th><td>{}</td><td><code>{}</code></td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>"
        "</tr>"
    ).format(
        names, aliases if store.aliases else NOTHING, store.state, store.version,
        f"{store.generation}.{store.revision}", f"{store.entries:,}", documents, size(store.bytes), store.leases,
    )  # fmt: skip


def _calibration(store: Datastore, calibration: Calibration | None) -> Markup:
    heading = Markup("<h3>Calibration</h3>")
    if store.calibration is None:
        return heading + empty("None: requests must say k, τ and λ themselves. “knnlm calibrate” makes one.")
    if calibration is None:
        return heading + empty("This server describes it in a way that this page does not know.")
    report = calibration.report
    change = 100 * (report.mixed.perplexity / report.base.perplexity - 1)
    threshold = f" at {number(calibration.gate_threshold)}" if calibration.gate_threshold is not None else ""
    return heading + figures(
        (
            ("k", str(calibration.k)),
            ("τ", number(calibration.temperature, 4)),
            ("λ", f"{number(calibration.lmbda)}, {calibration.lambda_mode}"),
            ("gate", f"{calibration.gate}{threshold}"),
            (
                f"perplexity on {report.tokens:,} held-out tokens",
                f"{number(report.base.perplexity, 4)} → {number(report.mixed.perplexity, 4)} ({change:+.1f} %)".replace(
                    "-", "−"
                ),
            ),
            ("helps", "yes" if calibration.helps else "no: the model alone was as good"),
        )
    )


def _index(store: Datastore, calibration: Calibration | None) -> Markup:
    facts: list[tuple[str, object]] = []
    test = store.self_test
    if test is not None:
        facts.append((f"recall@32 of {test.queries} queries at loading", _meter(test.recall_at_32, test.needed)))
    nprobe = calibration.report.nprobe if calibration is not None else None
    if nprobe is not None:
        facts.append(("lists visited per search (nprobe)", str(nprobe) if nprobe else "none: searched exactly"))
    if store.key_drift is not None:
        facts.append(("drift of keys", number(store.key_drift, 2)))
    heading = Markup("<h3>Index</h3>")
    return heading + (figures(facts) if facts else empty("The version keeps no queries to test its index with."))


def _meter(recall: float, needed: float) -> Markup:
    return Markup(
        '<span class="knnlm-meter"><i style="--share:{:.4f};--needed:{:.4f}"></i>{:.3f}, at least {:.3f} needed</span>'
    ).format(recall, needed, recall, needed)
