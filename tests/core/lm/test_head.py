"""The output head is the model's own arithmetic, not `lm_head` alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from knnlm_core.lm import head
from knnlm_core.lm.head import OutputHead, log_probs_of_targets
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import FAMILIES, VOCAB, tiny_model, tiny_tokenizer

IDS = torch.randint(1, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (T, H) and logits (T, V) as the model computes them."""
    hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[0]
    return hidden, model(input_ids=IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])  # one caps the logits, two scale them
def test_the_head_is_right_where_its_matrix_alone_is_wrong(family: str) -> None:
    model = tiny_model(family)
    hidden, need = run(model)
    with torch.inference_mode():
        by_hand = model.get_output_embeddings()(hidden)
        have = OutputHead(model)(hidden)
    assert (by_hand - need).abs().max() > 0.1
    torch.testing.assert_close(have, need, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_models_own_in_every_family(family: str) -> None:
    model = tiny_model(family)
    hidden, need = run(model)
    with torch.inference_mode():
        torch.testing.assert_close(OutputHead(model)(hidden), need, atol=1e-5, rtol=1e-5)


def test_the_head_shares_its_parameters_with_the_model() -> None:
    model = tiny_model("llama")
    hidden, before = run(model)
    apply = OutputHead(model)
    body = model.base_model
    with torch.inference_mode():
        apply(hidden)
        assert model.base_model is body
        assert torch.equal(run(model)[1], before)
        model.lm_head.weight.mul_(2)  # seen by the head: it is the same tensor
        torch.testing.assert_close(apply(hidden), 2 * before, atol=1e-4, rtol=1e-5)


def test_a_half_precision_model_gives_float32_logits() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    hidden, need = run(model)
    have = OutputHead(model)(hidden)
    assert hidden.dtype == torch.bfloat16
    assert have.dtype == torch.float32
    torch.testing.assert_close(have, need.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
def test_target_log_probs_are_a_float64_log_softmax(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGIT_ELEMENTS_PER_CHUNK", rows_per_chunk * VOCAB)
    lm = HuggingFaceLM(tiny_model("gemma2"), Tokenizer(tiny_tokenizer()), name="tiny")
    rows = lm.encode(IDS.tolist(), [0])
    targets = torch.randint(0, VOCAB, (len(rows.hidden),), generator=torch.Generator().manual_seed(1))
    have = log_probs_of_targets(lm, rows.hidden, targets)
    logits = run(tiny_model("gemma2"))[1].double().numpy()
    need = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(axis=1))
    assert have.dtype == torch.float32
    np.testing.assert_allclose(have.numpy(), need, atol=1e-5)


def test_no_rows_give_no_log_probs() -> None:
    lm = HuggingFaceLM(tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="tiny")
    none = log_probs_of_targets(lm, torch.empty(0, 64), torch.empty(0, dtype=torch.int64))
    assert (none.shape, none.dtype) == ((0,), torch.float32)
