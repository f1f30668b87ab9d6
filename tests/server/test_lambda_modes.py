"""λ set per token by the rules of a calibration: over HTTP, offline, and as a float64 recomputation has it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import LiveServer
from pydantic import ValidationError
from small_stores import Start, recalibrate

from knnlm_core.datastore.calibration import (
    BucketedLambda,
    LambdaRules,
    Layer,
    LearnedLambda,
    RrcLambda,
)
from knnlm_core.knn.lambdas import LAMBDA_FEATURES
from knnlm_core.lm.huggingface import HuggingFaceLM

PROMPT = "3. new: Der Käufer schuldet the goods. The café’s landlord must keep its value 🙂."
LAW = "tiny-lm@law"
MODES = ("fixed", "bucketed", "rrc", "learned")
_DRAW = torch.Generator().manual_seed(3)
_WIDTH = len(LAMBDA_FEATURES)
RULES = LambdaRules(
    bucketed=BucketedLambda(edges=(40.0, 50.0, 60.0), lambdas=(0.9, 0.6, 0.3, 0.05)),
    rrc=RrcLambda(alpha=0.8, scale=0.1),
    learned=LearnedLambda(
        features=LAMBDA_FEATURES,
        mean=tuple(torch.randn(_WIDTH, generator=_DRAW).tolist()),
        scale=tuple((1 + torch.rand(_WIDTH, generator=_DRAW)).tolist()),
        layers=(
            Layer(
                weight=tuple(map(tuple, torch.randn(4, _WIDTH, generator=_DRAW).tolist())), bias=(0.1, 0.0, -0.2, 0.3)
            ),
            Layer(weight=((1.0, -0.5, 0.7, 0.2),), bias=(-0.4,)),
        ),
    ),
)


@pytest.fixture
def server(own_root: Path, start_server: Start) -> LiveServer:
    """One whose store `law` has a calibration with every rule."""
    _calibrate(own_root, "law", "learned")
    return start_server(datastores=own_root, load=("law", "news"))


def _calibrate(root: Path, name: str, mode: str, rules: LambdaRules = RULES) -> None:
    recalibrate(root, name, lambda_mode=mode, lambda_rules=rules, k=4, knn_temperature=15.0)


def traced(server: LiveServer, **knn: Any) -> list[dict[str, Any]]:
    answer = server.complete(PROMPT, model=LAW, max_tokens=16, ignore_eos=True, knn={"trace": True, **knn})
    (choice,) = answer["choices"]
    return list(choice["knn"])


def test_the_card_says_which_modes_there_are(server: LiveServer) -> None:
    calibration = server.http.get("/v1/datastores/law").json()["calibration"]
    assert (calibration["lambda_mode"], calibration["lambda_modes"]) == ("learned", list(MODES))
    calibration = server.http.get("/v1/datastores/news").json()["calibration"]
    assert (calibration["lambda_mode"], calibration["lambda_modes"]) == ("fixed", ["fixed"])


def test_a_bucket_and_a_ratio_decide_as_their_formulas_do(server: LiveServer) -> None:
    seen = set()
    for entry in traced(server, lambda_mode="bucketed"):
        nearest = entry["neighbors"][0]["distance"]
        seen.add(entry["lambda"])
        assert entry["lambda"] == RULES.bucketed.lambdas[sum(edge < nearest for edge in RULES.bucketed.edges)]  # type: ignore[union-attr]
        assert entry["p"] == pytest.approx(entry["lambda"] * entry["p_knn"] + (1 - entry["lambda"]) * entry["p_lm"])
    assert len(seen) > 1
    for entry in traced(server, lambda_mode="rrc"):
        ratio = entry["neighbors"][0]["distance"] / entry["neighbors"][-1]["distance"]
        assert len(entry["neighbors"]) == 4
        assert entry["lambda"] == pytest.approx(1 / (1 + math.exp((ratio - 0.8) / 0.1)), rel=1e-5)


@pytest.mark.parametrize("gate", [{}, {"gate": "confidence", "gate_threshold": 0.14}], ids=["always", "confidence"])
@pytest.mark.parametrize("mode", MODES)
def test_a_greedy_generation_is_scored_as_it_was_generated(
    server: LiveServer, lm: HuggingFaceLM, mode: str, gate: dict[str, Any]
) -> None:
    trace = traced(server, lambda_mode=mode, **gate)
    ids = [*lm.tokenizer.encode(PROMPT), *(entry["token_id"] for entry in trace)]
    knn = {"lambda_mode": mode, **gate}
    scored = server.score([ids], model=LAW, per_token=True, window=256, knn=knn)["results"][0]["per_token"]
    for told, entry in zip(trace, scored[-len(trace) :], strict=True):
        assert entry["lambda"] == pytest.approx(told["lambda"], abs=1e-4)
        assert entry["mixed"] == pytest.approx(math.log(told["p"]), abs=1e-4)
    lambdas = {round(entry["lambda"], 6) for entry in trace if entry["searched"]}
    assert (len(lambdas) == 1) is (mode == "fixed")


def test_what_a_request_leaves_open_the_calibration_decides(server: LiveServer) -> None:
    def lambdas(**knn: Any) -> list[float]:
        return [entry["lambda"] for entry in traced(server, **knn)]

    learned = lambdas(lambda_mode="learned")
    assert lambdas() == pytest.approx(learned, abs=1e-4)
    assert lambdas(k=4, temperature=15.0) == pytest.approx(learned, abs=1e-4)  # the calibrated ones
    fixed = server.http.get("/v1/datastores/law").json()["calibration"]["lambda"]
    assert set(lambdas(lambda_mode="fixed")) == {fixed}
    # A rule holds for the k and τ that it was fitted for.
    assert set(lambdas(k=5)) == set(lambdas(temperature=9.0)) == {fixed}
    assert set(lambdas(**{"lambda": 0.125})) == {0.125}


@pytest.mark.parametrize(
    ("model", "knn", "message"),
    [
        (LAW, {"lambda_mode": "best"}, "must be one of fixed, bucketed, rrc, learned, got 'best'"),
        (LAW, {"lambda_mode": "rrc", "lambda": 0.5}, "must be fixed where `knn.lambda` is given, got 'rrc'"),
        (LAW, {"lambda_mode": "rrc", "k": 5}, "holds for the calibrated k and τ alone, k 4 and τ 15, got k 5 and τ 15"),
        ("tiny-lm@news", {"lambda_mode": "learned"}, "the calibration of datastore 'news' has (fixed), got 'learned'"),
    ],
)
def test_what_is_wrong_with_a_mode_is_refused(
    server: LiveServer, model: str, knn: dict[str, Any], message: str
) -> None:
    answer = server.post("/v1/completions", {"model": model, "prompt": PROMPT, "knn": knn})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_knn_params", "knn.lambda_mode")
    assert message in error["message"]


def test_every_store_of_a_mixture_has_its_own_mode(server: LiveServer) -> None:
    answer = server.complete(PROMPT, model="tiny-lm@law+news", max_tokens=12, ignore_eos=True, knn={"trace": True})
    (choice,) = answer["choices"]
    of_law, of_news = ({entry["datastores"][i]["lambda"] for entry in choice["knn"]} for i in (0, 1))
    assert len(of_law) > 1
    assert len(of_news) == 1
    for entry in choice["knn"]:
        parts = entry["datastores"]
        assert entry["lambda"] == pytest.approx(math.fsum(part["weight"] * part["lambda"] for part in parts))
        mixed = math.fsum(part["weight"] * part["lambda"] * part["p_knn"] for part in parts)
        assert entry["p"] == pytest.approx(mixed + (1 - entry["lambda"]) * entry["p_lm"], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_neighbours_are_mixed_with_the_lambda_of_their_context(
    server: LiveServer, lm: HuggingFaceLM, mode: str
) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    body = {"model": LAW, "input": [ids], "knn": {"lambda_mode": mode}, "limit": 4}
    answer = server.post("/v1/neighbors", body)
    assert answer.status_code == 200, answer.text
    (first,) = server.complete(ids, model=LAW, max_tokens=1, knn={"lambda_mode": mode, "trace": True})["choices"][0][
        "knn"
    ]
    (result,) = answer.json()["results"]
    for token in result["next_tokens"]:
        mixed = first["lambda"] * token["p_knn"] + (1 - first["lambda"]) * token["p_lm"]
        assert token["p"] == pytest.approx(mixed, abs=1e-6)


def test_a_rule_over_features_that_are_not_known_is_refused_when_it_is_loaded(
    own_root: Path, start_server: Start
) -> None:
    learned = RULES.learned
    assert learned is not None
    strange = RULES.model_copy(
        update={"learned": learned.model_copy(update={"features": ("the weather", *LAMBDA_FEATURES[1:])})}
    )
    _calibrate(own_root, "law", "learned", strange)
    server = start_server(datastores=own_root, load=("news",))
    answer = server.http.put("/v1/datastores/law", json={})
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"]["code"] == "datastore_mismatch"
    message = answer.json()["error"]["message"]
    assert "'law' does not fit: lambda_rules.learned.features is" in message
    assert "the weather, " in message
    assert [store["name"] for store in server.http.get("/v1/datastores").json()["data"]] == ["news"]


ONE_FEATURE: dict[str, Any] = {"features": ["a"], "mean": [0.0], "scale": [1.0]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rrc": {"alpha": 1e300, "scale": 0.1}},
        {"rrc": {"alpha": 0.5, "scale": 1e-300}},
        {"bucketed": {"edges": [3.0, 1.0], "lambdas": [0.1, 0.2, 0.3]}},
        {"bucketed": {"edges": [3.0], "lambdas": [0.1, 1.2]}},
        {"bucketed": {"edges": [3.0], "lambdas": [0.1]}},
        {"learned": {**ONE_FEATURE, "layers": [{"weight": [[1e300]], "bias": [0.0]}]}},
        {"learned": {**ONE_FEATURE, "scale": [0.0], "layers": [{"weight": [[1.0]], "bias": [0.0]}]}},
        {"learned": {**ONE_FEATURE, "layers": [{"weight": [[1.0, 2.0]], "bias": [0.0]}]}},
        {"learned": {**ONE_FEATURE, "layers": [{"weight": [[1.0], [1.0]], "bias": [0.0, 0.0]}]}},
    ],
)
def test_rules_that_are_no_rules_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LambdaRules.model_validate(changes)
