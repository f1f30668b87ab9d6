"""Signals of the language model against float64."""

from __future__ import annotations

import math

import torch

from knnlm_core.signals import MAX_MARGIN, join_signals, lm_signals


def test_signals_are_those_of_a_float64_recomputation() -> None:
    log_probs = torch.log_softmax(4 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0)), dim=1)
    found = lm_signals(log_probs)
    for row, values in enumerate(log_probs.double().tolist()):
        ordered = sorted(values, reverse=True)
        assert found.guess[row] == values.index(ordered[0])
        assert math.isclose(found.max_log_prob[row], ordered[0], abs_tol=1e-6)
        assert math.isclose(found.margin[row], ordered[0] - ordered[1], abs_tol=1e-5)
        assert math.isclose(found.entropy[row], -math.fsum(v * math.exp(v) for v in values), rel_tol=1e-5)


def test_tokens_that_cannot_come_make_nothing_infinite() -> None:
    found = lm_signals(torch.tensor([[0.0, -math.inf, -math.inf], [math.log(0.5), math.log(0.5), -math.inf]]))
    assert found.margin.tolist() == [MAX_MARGIN, 0.0]
    assert torch.allclose(found.entropy, torch.tensor([0.0, math.log(2)]))


def test_parts_are_joined_and_taken_in_order() -> None:
    log_probs = torch.log_softmax(torch.randn(7, 9), dim=1)
    whole = lm_signals(log_probs)
    joined = join_signals([lm_signals(log_probs[:3]), lm_signals(log_probs[3:])])
    assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))
    assert all(torch.equal(a, b[2:5]) for a, b in zip(joined.take(slice(2, 5)), whole, strict=True))
