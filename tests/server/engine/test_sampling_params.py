"""Limits of sampling parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from knnlm_core.errors import InvalidParameter
from knnlm_server.engine.sampling_params import SamplingParams

V = 100

AT_THE_LIMITS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 10**9},
    {"max_tokens": 5, "min_tokens": 5},
    {"temperature": 0.0},
    {"temperature": 1e6},
    {"temperature": 10**400},  # an int too large for a float is finite still
    {"top_p": 0.0},
    {"top_p": 1.0},
    {"top_k": -1},
    {"top_k": 10**9},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"n": 1},
    {"n": 128},
    {"stop": ("x",) * 32},
    {"stop": ("x" * 1024,)},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100.0},
    {"logit_bias": {0: -100.0, V - 1: 100.0}},
    {"logprobs": 0},
    {"logprobs": 20},
    {"stop_token_ids": (0, V - 1)},
]

BEYOND: list[tuple[str, Any, str]] = [  # field, value, what the message must name
    ("max_tokens", -1, "at least 0, got -1"),
    ("min_tokens", -1, "from 0 to 16, got -1"),
    ("min_tokens", 17, "from 0 to 16, got 17"),
    ("temperature", -0.1, "at least 0, got -0.1"),
    ("temperature", float("nan"), "finite"),
    ("temperature", float("inf"), "finite"),
    ("top_p", -0.01, "from 0 to 1, got -0.01"),
    ("top_p", 1.01, "from 0 to 1, got 1.01"),
    ("top_p", float("nan"), "got nan"),
    ("top_k", -2, "at least -1, got -2"),
    ("min_p", -0.5, "from 0 to 1, got -0.5"),
    ("min_p", float("nan"), "got nan"),
    ("n", 0, "from 1 to 128, got 0"),
    ("n", 129, "from 1 to 128, got 129"),
    ("stop", ("x",) * 33, "at most 32 strings, got 33"),
    ("stop", ("a", ""), "from 1 to 1024 characters, got 0"),
    ("stop", ("x" * 1025,), "from 1 to 1024 characters, got 1025"),
    ("seed", 2**63, f"got {2**63}"),
    ("seed", -(2**63) - 1, f"got {-(2**63) - 1}"),
    ("presence_penalty", 2.1, "from -2.0 to 2.0, got 2.1"),
    ("frequency_penalty", -2.1, "from -2.0 to 2.0, got -2.1"),
    ("frequency_penalty", float("nan"), "got nan"),
    ("repetition_penalty", 0.0, "from 0.01 to 100.0, got 0.0"),
    ("repetition_penalty", float("inf"), "got inf"),
    ("logit_bias", {V: 1.0}, f"from 0 to {V - 1}, got {V}"),
    ("logit_bias", {-1: 1.0}, "got -1"),
    ("logit_bias", {3: 100.5}, "from -100 to 100, got 100.5 for token 3"),
    ("logit_bias", {3: float("nan")}, "got nan for token 3"),
    ("logprobs", -1, "from 0 to 20, got -1"),
    ("logprobs", 21, "from 0 to 20, got 21"),
    ("stop_token_ids", (V,), f"got {V}"),
    ("stop_token_ids", (1,) * 1025, "at most 1024 ids, got 1025"),
]


@pytest.mark.parametrize("fields", AT_THE_LIMITS, ids=str)
def test_values_at_their_limits_are_accepted(fields: dict[str, Any]) -> None:
    SamplingParams(**fields).check(V)


@pytest.mark.parametrize(("field", "value", "said"), BEYOND, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(BEYOND)])
def test_values_beyond_a_limit_are_refused_by_field_limit_and_value(field: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{field: value}).check(V)
    assert caught.value.param == field
    assert caught.value.message.count(f"`{field}`") == 1
    assert said in caught.value.message


def test_too_many_logit_biases_are_refused() -> None:
    SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)).check(2000)
    with pytest.raises(InvalidParameter, match="at most 1024 entries, got 1025"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)).check(2000)


def test_every_field_but_the_switches_has_a_refused_value() -> None:
    switches = {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}
    assert {f.name for f in dataclasses.fields(SamplingParams)} - switches == {field for field, _, _ in BEYOND}


def test_params_are_frozen_hashable_and_share_no_default() -> None:
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert len({params, SamplingParams(logit_bias={1: 2.0}), SamplingParams()}) == 2
    assert params.logit_bias is not SamplingParams().logit_bias


def test_greedy_and_penalties_are_seen() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams().has_penalties
    for field in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{field: 0.5}).has_penalties
