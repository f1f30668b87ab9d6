"""Every metric on the dashboard and in the alerts is there on a real server, and moves under a real load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from live_server import Brake, LiveServer, before_each_pass, wait_until
from prometheus_client.parser import text_string_to_metric_families
from small_stores import Published, Start

from knnlm_core.datastore.reader import Datastore
from knnlm_server.api.metrics import all_families

DOCKER = Path(__file__).parents[2] / "docker"
LAW = "tiny-lm@law"
METRIC = re.compile(r"\b(?:knnlm|process)_[a-z_]+\b")
# Sizes and limits: what they are is known when the server is ready.
FIXED = {"knnlm_sequences", "process_max_fds"}
# Counted where the shadow cannot keep up; that it is, is tested beside the shadow.
ONLY_IN_TROUBLE = {"knnlm_shadow_dropped_total"}

Samples = dict[str, dict[str, float]]  # by name, by labels


def shown() -> set[str]:
    """Names of the samples that the dashboard and the alerts ask for."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "knnlm.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    groups = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    asked += [rule["expr"] for group in groups for rule in group["rules"]]
    return {name for expr in asked for name in METRIC.findall(expr)}


def read(server: LiveServer) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[str(sorted(sample.labels.items()))] = sample.value
    return samples


class Watched:
    """A server under load, and every value that its metrics have had."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.values: dict[str, dict[str, set[float]]] = {}

    def look(self) -> None:
        for name, samples in read(self.server).items():
            for labels, value in samples.items():
                self.values.setdefault(name, {}).setdefault(labels, set()).add(value)

    def moved(self) -> set[str]:
        """Names of samples that had two values, or that came with what they count."""
        return {
            name
            for name, by_labels in self.values.items()
            if any(len(values) > 1 for values in by_labels.values())
            or (name.endswith(("_total", "_count", "_sum", "_bucket")) and any(max(v) > 0 for v in by_labels.values()))
        }


@pytest.fixture
def watched(own_root: Path, start_server: Start) -> Watched:
    server = start_server(
        datastores=own_root, wait=False, max_sequences=2, max_queued=1, draft_tokens=6, shadow_exact=1.0
    )
    watched = Watched(server)
    watched.look()  # not ready
    server.wait_ready()
    watched.look()
    return watched


def generate(watched: Watched, law: Datastore) -> None:
    """Completions whole and streamed, with drafts, with and without a datastore; scores; an invalid request."""
    server, text = watched.server, law.document("new-1").text
    by_heart = {"lambda": 0.999, "temperature": 0.5}
    for start in (0, 45, 0):
        server.complete(text[start : start + 80], model=LAW, max_tokens=50, ignore_eos=True, knn=by_heart)
    server.stream(text, model=LAW, max_tokens=20, knn={"gate": "automaton", "gate_threshold": 2})
    server.complete(text, model=LAW, max_tokens=3, knn={"gate": "never"})
    server.complete(text, max_tokens=3)
    with before_each_pass(server.lm, watched.look):
        server.score([text, "The tenant"], model=LAW)
    assert server.post("/v1/completions", {"prompt": ""}).status_code == 400
    watched.look()


def overload_and_swap(watched: Watched, published: Published) -> None:
    """All sequences taken, one request waiting, one refused; a swap while the old version is leased."""
    server = watched.server
    for version in (published.law_old, published.law_new):  # the engine compares keys once for a version
        assert server.http.put("/v1/datastores/law", json={"version": version}).status_code == 200
    body = {"model": LAW, "max_tokens": 4, "ignore_eos": True}
    with Brake(server.lm) as brake:
        connection = server.begin("/v1/completions", {**body, "prompt": ["The tenant", "The court", "A buyer"]})
        brake.wait_held()
        assert server.post("/v1/completions", {**body, "prompt": "An owner"}).status_code == 503
        swapped = server.http.put("/v1/datastores/law", json={"version": published.law_old})
        assert swapped.json()["generation"] == 4
        watched.look()
        brake.release()
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    wait_until(server.is_idle)
    watched.look()


def change(watched: Watched) -> None:
    """A document learned, one deleted, a load refused."""
    server, path = watched.server, "/v1/datastores/law/documents"
    learned = server.http.post(path, json={"documents": [{"id": "fact", "text": "The valve must be closed."}]})
    assert learned.status_code in (200, 201), learned.text
    assert server.http.delete(f"{path}/old-0").status_code == 200
    assert server.http.put("/v1/datastores/law", json={"version": "0" * 16}).status_code == 404
    watched.look()


def test_what_operators_look_at_moves(watched: Watched, law: Datastore, published: Published) -> None:
    generate(watched, law)
    overload_and_swap(watched, published)
    change(watched)
    recall = "knnlm_shadow_recall_count"
    wait_until(lambda: any(read(watched.server)[recall].values()))
    watched.look()
    asked = shown() - ONLY_IN_TROUBLE
    absent = sorted(asked - watched.values.keys())
    assert absent == []
    still = sorted(asked - watched.moved() - FIXED)
    assert still == []


def test_every_metric_of_a_server_is_documented_and_the_other_way_round(watched: Watched) -> None:
    text = watched.server.http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ours = {name: family.type for name, family in families.items() if name.startswith("knnlm_")}
    # prometheus_client tells when a counter was made as a gauge of its own.
    created = {name for name in ours if name.endswith("_created")}
    assert {name: kind for name, kind in ours.items() if name not in created} == {
        family.name: family.kind for family in all_families()
    }
    for family in all_families():
        assert families[family.name].documentation == family.text
        for sample in families[family.name].samples:
            assert sample.labels.keys() - {"le"} == set(family.labels), sample
