"""Write the Grafana dashboard, dashboards/knnlm.json, or check that it is up to date.

python docker/grafana/generate.py           write it
python docker/grafana/generate.py --check   exit 1 and say what to run if it is stale
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).parent / "dashboards" / "knnlm.json"
WIDTH, HEIGHT = 24, 8  # of the grid, and of a panel
SOURCE = {"type": "prometheus", "uid": "${source}"}
HERE = 'instance=~"$instance"'
RATE = "[$__rate_interval]"


class Curve(NamedTuple):
    """An expression and what its curves are called."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """A panel of curves, three to a row; of a histogram's buckets, a heat map."""

    title: str
    unit: str
    curves: Sequence[Curve]
    text: str = ""
    stacked: bool = False
    heatmap: bool = False


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, added up over servers."""
    labels = f"{HERE}, {where}" if where else HERE
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{RATE}))"


def share(part: str, whole: Sequence[str]) -> str:
    """Of what is counted by one counter, or by several."""
    return f"{rate(part)} / ({' + '.join(map(rate, whole))})"


def mean(histogram: str) -> str:
    """Of the observations."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def quantiles(histogram: str, *shares: float, where: str = "", name: str = "") -> list[Curve]:
    """p50 and others of a histogram."""
    return [
        Curve(
            f"histogram_quantile({share}, {rate(f'{histogram}_bucket', 'le', where)})",
            f"{name} p{share * 100:g}".strip(),
        )
        for share in shares
    ]


def gauge(metric: str, legend: str = "{{instance}}") -> Curve:
    """As it is."""
    return Curve(f"{metric}{{{HERE}}}", legend)


def heat(histogram: str) -> list[Curve]:
    """Observations per bucket."""
    return [Curve(rate(f"{histogram}_bucket", "le"), "{{le}}")]


PASS = "seconds of each second that the engine spends on it"
ROWS: dict[str, list[Panel]] = {
    "Service": [
        Panel("Ready", "bool_yes_no", [gauge("knnlm_ready")]),
        Panel(
            "Requests by route and status",
            "reqps",
            [Curve(rate("knnlm_http_requests_total", "route, status"), "{{route}} {{status}}")],
        ),
        Panel(
            "Under way",
            "short",
            [
                gauge("knnlm_requests_running", "generate {{instance}}"),
                gauge("knnlm_requests_waiting", "wait {{instance}}"),
                gauge("knnlm_requests_scoring", "score {{instance}}"),
            ],
        ),
        Panel("Time to first token", "s", quantiles("knnlm_time_to_first_token_seconds", 0.5, 0.95, 0.99)),
        Panel("Between tokens", "s", quantiles("knnlm_inter_token_latency_seconds", 0.5, 0.95, 0.99)),
        Panel(
            "Tokens",
            "short",
            [
                Curve(rate("knnlm_generation_tokens_total"), "generated per second"),
                Curve(rate("knnlm_prompt_tokens_total"), "prompts per second"),
            ],
        ),
        Panel(
            "Refused requests and failures",
            "reqps",
            [
                Curve(rate("knnlm_rejected_requests_total", "reason"), "refused: {{reason}}"),
                Curve(rate("knnlm_requests_total", "outcome", 'outcome!="finished"'), "ended: {{outcome}}"),
            ],
        ),
        # Streams of the page last as long as a tab is open.
        Panel("API requests", "s", quantiles("knnlm_http_request_seconds", 0.5, 0.95, where='route=~"/v1/.+"')),
        Panel(
            "Engine requests from submission to end",
            "s",
            [
                curve
                for kind in ("completion", "score")
                for curve in quantiles("knnlm_request_seconds", 0.5, 0.95, where=f'kind="{kind}"', name=kind)
            ],
        ),
    ],
    "Where a completion's time goes": [
        Panel(
            "Phases, 95 of 100 are faster",
            "s",
            [
                *quantiles("knnlm_request_queue_seconds", 0.95, where='kind="completion"', name="queue"),
                *quantiles("knnlm_request_prefill_seconds", 0.95, name="prefill"),
                *quantiles("knnlm_request_decode_seconds", 0.95, name="decode"),
            ],
        ),
        Panel(
            "Parts of passes",
            "percentunit",
            [Curve(rate(f"knnlm_{part}_seconds_sum"), part) for part in ("forward", "gate", "search", "mix")],
            text=PASS,
            stacked=True,
        ),
        Panel("Mean time per output token", "s", quantiles("knnlm_time_per_output_token_seconds", 0.5, 0.95)),
        Panel(
            "Lengths",
            "short",
            [
                *quantiles("knnlm_request_prompt_tokens", 0.5, 0.95, name="prompt"),
                *quantiles("knnlm_request_generation_tokens", 0.5, 0.95, name="completion"),
            ],
        ),
        Panel(
            "A step",
            "short",
            [
                Curve(mean("knnlm_step_tokens"), "tokens"),
                Curve(mean("knnlm_step_sequences"), "sequences"),
            ],
        ),
        Panel(
            "Sequences of the KV cache",
            "short",
            [gauge("knnlm_sequences_used", "used {{instance}}"), gauge("knnlm_sequences", "all {{instance}}")],
        ),
    ],
    "Retrieval": [
        Panel(
            "Decisions",
            "short",
            [Curve(rate("knnlm_retrievals_total", "decision"), "{{decision}}")],
            text="tokens with a datastore, per second",
            stacked=True,
        ),
        Panel(
            "Search for a step",
            "s",
            quantiles("knnlm_search_seconds", 0.5, 0.95, 0.99, where='kind="completion"'),
        ),
        Panel(
            "Drafts",
            "percentunit",
            [
                Curve(share("knnlm_accepted_tokens_total", ["knnlm_drafted_tokens_total"]), "accepted of drafted"),
                Curve(share("knnlm_accepted_tokens_total", ["knnlm_generation_tokens_total"]), "of all tokens"),
            ],
        ),
        Panel("λ", "short", heat("knnlm_lambda"), heatmap=True),
        Panel("Distance to the nearest entry", "short", heat("knnlm_nearest_distance"), heatmap=True),
        Panel(
            "Recall against exact search",
            "percentunit",
            [Curve(mean("knnlm_shadow_recall"), "recall")],
            text="of the tokens that --shadow-exact searches again",
        ),
        Panel(
            "Caches",
            "percentunit",
            [
                Curve(
                    share("knnlm_prefix_cache_hit_tokens_total", ["knnlm_prefix_cache_queried_tokens_total"]),
                    "prompt tokens from the prefix cache",
                ),
                Curve(
                    share(
                        "knnlm_query_cache_hits_total",
                        ["knnlm_query_cache_hits_total", "knnlm_query_cache_misses_total"],
                    ),
                    "searches from the query cache",
                ),
            ],
        ),
        Panel(
            "Not searched again",
            "short",
            [Curve(rate("knnlm_shadow_dropped_total", "reason"), "{{reason}}")],
            text="tokens per second that were to be searched exactly, and were not",
        ),
    ],
    "Datastores": [
        Panel("Generation", "short", [gauge("knnlm_datastore_generation", "{{datastore}} {{instance}}")]),
        Panel(
            "Leases",
            "short",
            [
                gauge("knnlm_datastore_leases", "{{datastore}} {{instance}}"),
                gauge("knnlm_datastore_draining_leases", "{{datastore}} {{instance}}, to drain"),
            ],
        ),
        Panel("Entries", "short", [gauge("knnlm_datastore_entries", "{{datastore}} {{instance}}")]),
        Panel(
            "Documents learned and deleted",
            "short",
            [
                gauge("knnlm_datastore_learned_documents", "{{datastore}} learned"),
                gauge("knnlm_datastore_deleted_documents", "{{datastore}} deleted"),
            ],
        ),
        Panel(
            "Swaps and refused loads",
            "short",
            [
                Curve(f"sum by (datastore) (increase(knnlm_datastore_swaps_total{{{HERE}}}{RATE}))", "{{datastore}}"),
                Curve(
                    f"sum by (datastore, code) (increase(knnlm_datastore_refused_loads_total{{{HERE}}}{RATE}))",
                    "{{datastore}} refused: {{code}}",
                ),
            ],
        ),
        Panel("Seconds of a load", "s", quantiles("knnlm_datastore_load_seconds", 0.5, 0.95)),
    ],
    "Process": [
        Panel("Processor", "short", [Curve(f"rate(process_cpu_seconds_total{{{HERE}}}{RATE})", "{{instance}}")]),
        Panel(
            "Memory",
            "bytes",
            [
                gauge("process_resident_memory_bytes", "all of {{instance}}"),
                gauge("knnlm_datastores_used_bytes", "datastores of {{instance}}"),
                gauge("knnlm_prefix_cache_used_bytes", "prefix cache of {{instance}}"),
                gauge("knnlm_query_cache_used_bytes", "query cache of {{instance}}"),
            ],
        ),
        Panel("Open files", "short", [gauge("process_open_fds")]),
    ],
}


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, members in ROWS.items():
        place = {"h": 1, "w": WIDTH, "x": 0, "y": top}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        top += 1
        for index, panel in enumerate(members):
            width = WIDTH // 3
            place = {"h": HEIGHT, "w": width, "x": index % 3 * width, "y": top + index // 3 * HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        top += -(-len(members) // 3) * HEIGHT
    return {
        "uid": "knnlm",
        "title": "knnlm",
        "tags": ["knnlm"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _instance_variable()]},
        "annotations": {"list": [_swaps()]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": curve.expr,
            "legendFormat": curve.legend,
            "format": "heatmap" if panel.heatmap else "time_series",
        }
        for index, curve in enumerate(panel.curves)
    ]
    common = {
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
    }
    if panel.heatmap:
        return {**common, "type": "heatmap", "options": {"calculate": False, "yAxis": {"unit": panel.unit}}}
    custom = {"fillOpacity": 40 if panel.stacked else 5, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        **common,
        "type": "timeseries",
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus", "hide": 0}


def _instance_variable() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(knnlm_ready, instance)", "refId": "instance"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _swaps() -> dict[str, Any]:
    return {
        "name": "Swaps",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": f"changes(knnlm_datastore_generation{{{HERE}}}[1m]) > 0",
        "titleFormat": "{{datastore}} swapped",
    }


def main() -> int:
    """Write or check."""
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    if "--check" not in sys.argv:
        DASHBOARD.write_text(text, encoding="utf-8")
        return 0
    if not DASHBOARD.exists() or DASHBOARD.read_text(encoding="utf-8") != text:
        print("dashboards/knnlm.json is stale; run `python docker/grafana/generate.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
