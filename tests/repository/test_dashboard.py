"""Claims about what operators are given: the dashboard is generated, and it and the alerts name metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from knnlm_server.api.metrics import all_families

ROOT = Path(__file__).parents[2]
PROMETHEUS, GRAFANA = ROOT / "docker" / "prometheus", ROOT / "docker" / "grafana"
PROMTOOL = shutil.which("promtool")
# Added by Prometheus, which scrapes, and by every histogram.
COMMON_LABELS = {"instance", "job", "le"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
METRIC = re.compile(r"\b(?:knnlm|process)_[a-z_]+\b|\bup\b")
SELECTOR = re.compile(r"\b(knnlm_[a-z_]+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"by \(([^)]*)\) \(")


def dashboard() -> dict[str, Any]:
    shown: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "knnlm.json").read_text(encoding="utf-8"))
    return shown


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in dashboard()["annotations"]["list"])
    yield from (alert["expr"] for alert in alerts())


def known() -> dict[str, set[str]]:
    """Samples that a server can show, with the names of their labels."""
    return {family.name + suffix: set(family.labels) for family in all_families() for suffix in SUFFIXES[family.kind]}


def test_the_dashboard_is_what_its_generator_writes() -> None:
    command = [sys.executable, str(GRAFANA / "generate.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


def test_every_metric_that_is_shown_or_judged_is_one_of_the_servers() -> None:
    metrics = known()
    named = {name for expr in expressions() for name in METRIC.findall(expr)}
    unknown = {name for name in named if name != "up" and not name.startswith("process_") and name not in metrics}
    assert not unknown
    assert len(named) > 40


def test_every_label_that_is_asked_for_is_one_of_the_metrics() -> None:
    metrics = known()
    for expr in expressions():
        for name, inside in SELECTOR.findall(expr):
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
            assert asked <= metrics[name] | COMMON_LABELS, expr
        labels = {label for name, _ in SELECTOR.findall(expr) for label in metrics[name]}
        for grouped in GROUPED.findall(expr):
            assert {label.strip() for label in grouped.split(",")} <= labels | COMMON_LABELS, expr


def test_expressions_are_whole() -> None:
    for expr in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expr.count(opening) == expr.count(closing), expr
        assert expr.count('"') % 2 == 0, expr


def test_panels_are_told_apart_and_do_not_cover_each_other() -> None:
    all_panels = dashboard()["panels"]
    assert len({panel["id"] for panel in all_panels}) == len(all_panels)
    assert len({panel["title"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in all_panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) < 24


def test_every_alert_says_how_bad_it_is_what_it_is_and_what_to_do() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning", "info"), alert["alert"]
        assert alert["annotations"].keys() == {"summary", "description"}, alert["alert"]


def test_prometheus_scrapes_the_server_of_the_compose_file() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    ((host, port),) = (target.split(":") for target in job["static_configs"][0]["targets"])
    server = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"][host]
    assert f"--port={port}" in server["command"]
    assert all((PROMETHEUS / name).is_file() for name in config["rule_files"])
    # Alerts that ask for a job ask for this one.
    assert {name for expr in expressions() for name in re.findall(r'job="(\w+)"', expr)} == {job["job_name"]}


def test_grafana_finds_its_source_and_its_dashboards() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/knnlm.yml").read_text())["providers"]
    assert (source["type"], source["isDefault"], provider["type"]) == ("prometheus", True, "file")


# -- with Prometheus' own tool, where there is one ---------------------------------------------------------------------

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (it comes with Prometheus)")


def promtool(*arguments: str) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@needs_promtool
def test_prometheus_can_parse_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    shown = [expr.replace("$__rate_interval", "1m").replace("$instance", ".*") for expr in expressions()]
    rules = [{"record": f"shown:{number}", "expr": expr} for number, expr in enumerate(shown)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


ON = 'instance="a"'
BUCKETS = '{{instance="a",kind="completion",le="{}"}}'
# What a server reports, minute by minute, when it is time for each alert.
TROUBLE: dict[str, dict[str, str]] = {
    "KnnlmDown": {'up{instance="a",job="knnlm"}': "0x60"},
    "KnnlmNotReady": {f"knnlm_ready{{{ON}}}": "0x60"},
    "KnnlmErrors": {
        f'knnlm_http_requests_total{{{ON},method="POST",route="/v1/completions",status="200"}}': "0+90x60",
        f'knnlm_http_requests_total{{{ON},method="POST",route="/v1/completions",status="500"}}': "0+10x60",
    },
    "KnnlmRefusesRequests": {f'knnlm_rejected_requests_total{{{ON},reason="overloaded"}}': "0+1x60"},
    "KnnlmQueueGrows": {f"knnlm_requests_waiting{{{ON}}}": "1+1x60"},
    "KnnlmCacheFull": {
        f"knnlm_sequences_used{{{ON}}}": "8x60",
        f"knnlm_sequences{{{ON}}}": "8x60",
        f"knnlm_requests_waiting{{{ON}}}": "1x60",
    },
    "KnnlmSlowFirstToken": {
        f'knnlm_time_to_first_token_seconds_bucket{{{ON},le="{bound}"}}': f"0+{count}x60"
        for bound, count in (("10.0", 50), ("30.0", 100), ("+Inf", 100))
    },
    "KnnlmSlowTokens": {
        f'knnlm_inter_token_latency_seconds_bucket{{{ON},le="{bound}"}}': f"0+{count}x60"
        for bound, count in (("1.2", 50), ("2.5", 100), ("+Inf", 100))
    },
    "KnnlmManyOpenFiles": {
        'process_open_fds{instance="a",job="knnlm"}': "900x60",
        'process_max_fds{instance="a",job="knnlm"}': "1024x60",
    },
    "KnnlmSlowSearch": {
        f"knnlm_search_seconds_bucket{BUCKETS.format(bound)}": f"0+{count}x60"
        for bound, count in (("0.1", 50), ("0.25", 100), ("+Inf", 100))
    },
    "KnnlmShadowRecallLow": {
        f"knnlm_shadow_recall_sum{{{ON}}}": "0+80x60",
        f"knnlm_shadow_recall_count{{{ON}}}": "0+100x60",
    },
    "KnnlmLoadRefused": {
        f'knnlm_datastore_refused_loads_total{{{ON},datastore="law",code="datastore_mismatch"}}': "_x50 1x10"
    },
    "KnnlmLeasesDoNotDrain": {f'knnlm_datastore_draining_leases{{{ON},datastore="law"}}': "1x60"},
    "KnnlmNoDraftAccepted": {
        f"knnlm_drafted_tokens_total{{{ON}}}": "0+10x60",
        f"knnlm_accepted_tokens_total{{{ON}}}": "5x60",
    },
}
# The same figures of a server that does its work.
CALM: dict[str, str] = {
    'up{instance="a",job="knnlm"}': "1x60",
    f"knnlm_ready{{{ON}}}": "1x60",
    f'knnlm_http_requests_total{{{ON},method="POST",route="/v1/completions",status="200"}}': "0+90x60",
    f'knnlm_http_requests_total{{{ON},method="POST",route="/v1/completions",status="400"}}': "0+50x60",
    f'knnlm_rejected_requests_total{{{ON},reason="overloaded"}}': "3x60",
    f"knnlm_requests_waiting{{{ON}}}": "0x20 5x5 0x35",
    f"knnlm_sequences_used{{{ON}}}": "8x60",
    f"knnlm_sequences{{{ON}}}": "8x60",
    **{f'knnlm_time_to_first_token_seconds_bucket{{{ON},le="{le}"}}': "0+100x60" for le in ("5.0", "10.0", "+Inf")},
    **{f'knnlm_inter_token_latency_seconds_bucket{{{ON},le="{le}"}}': "0+100x60" for le in ("0.6", "1.2", "+Inf")},
    **{f"knnlm_search_seconds_bucket{BUCKETS.format(le)}": "0+100x60" for le in ("0.05", "0.1", "+Inf")},
    'process_open_fds{instance="a",job="knnlm"}': "90x60",
    'process_max_fds{instance="a",job="knnlm"}': "1024x60",
    f"knnlm_shadow_recall_sum{{{ON}}}": "0+97x60",
    f"knnlm_shadow_recall_count{{{ON}}}": "0+100x60",
    f'knnlm_datastore_refused_loads_total{{{ON},datastore="law",code="datastore_mismatch"}}': "1x60",
    f'knnlm_datastore_draining_leases{{{ON},datastore="law"}}': "0x20 1x5 0x35",
    f"knnlm_drafted_tokens_total{{{ON}}}": "0+10x60",
    f"knnlm_accepted_tokens_total{{{ON}}}": "0+4x60",
}


@needs_promtool
def test_every_alert_fires_in_the_trouble_that_it_is_for_and_none_on_a_calm_day(tmp_path: Path) -> None:
    names = [alert["alert"] for alert in alerts()]
    assert TROUBLE.keys() == set(names)

    def firing(name: str, figures: dict[str, str]) -> dict[str, Any]:
        """That at some time in the hour there is an alert; Prometheus' tests compare it whole, so it is counted."""
        return {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in figures.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)',
                    "eval_time": "55m",
                    "exp_samples": [{"labels": "{}", "value": 1 if figures is not CALM else 0}],
                }
            ],
        }

    tests = [firing(name, figures) for name, figures in TROUBLE.items()] + [firing(name, CALM) for name in names]
    file = tmp_path / "alerts_test.yml"
    rules = {"rule_files": [str(PROMETHEUS / "alerts.yml")], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(rules, sort_keys=False))
    promtool("test", "rules", str(file))
