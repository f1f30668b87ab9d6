"""Sampling against a slow reference: Python floats, one row and one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from knnlm_core.errors import EngineFailure
from knnlm_server.engine import sampler
from knnlm_server.engine.sampler import SampleRow, sample, top_logprobs, uniform
from knnlm_server.engine.sampling_params import SamplingParams

INF = math.inf


def log_probs_of(scores: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(scores, dtype=torch.float32).log_softmax(1)


def row(params: SamplingParams, seed: int = 0, position: int = 0, **fields: Any) -> SampleRow:
    return SampleRow(params, seed, fields.pop("choice", 0), position, **fields)


# ---- the reference ----------------------------------------------------------------------------------------------


def reference_scores(scores: list[float], r: SampleRow, eos: Sequence[int]) -> list[float]:
    p = r.params
    scores = [s + p.logit_bias.get(i, 0.0) for i, s in enumerate(scores)]
    if r.position < p.min_tokens:
        masked = [-INF if i in eos or i in p.stop_token_ids else s for i, s in enumerate(scores)]
        scores = scores if max(masked) == -INF else masked
    counts = Counter(int(t) for t in r.generated_ids)
    for i in set(counts) | {int(t) for t in r.prompt_ids}:
        scores[i] = scores[i] * p.repetition_penalty if scores[i] < 0 else scores[i] / p.repetition_penalty
    for i, count in counts.items():
        scores[i] -= count * p.frequency_penalty + p.presence_penalty
    return scores


def reference_weights(scores: list[float], p: SamplingParams) -> tuple[list[float], float]:
    """Unnormalised probabilities, and how close any comparison came to a tie that rounding could turn."""
    best = max(scores)
    weights = [math.exp((s - best) / p.temperature) for s in scores]
    margin = INF
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if p.top_k > 0:
        order = order[: p.top_k]
    if p.top_p < 1:
        total, before, kept = math.fsum(weights[i] for i in order), 0.0, []
        for i in order:
            if kept:
                margin = min(margin, abs(before - p.top_p * total))
            if not kept or before < p.top_p * total:
                kept.append(i)
            before += weights[i]
        order = kept
    if p.min_p > 0:
        margin = min([margin, *(abs(weights[i] - p.min_p) for i in order if weights[i] != 1)])
        order = [i for i in order if weights[i] >= p.min_p]
    survivors = set(order)
    return [w if i in survivors else 0.0 for i, w in enumerate(weights)], margin


def reference_token(log_probs: list[float], r: SampleRow, eos: Sequence[int] = ()) -> tuple[int, float]:
    scores = reference_scores(log_probs, r, eos)
    if r.params.temperature == 0:
        return scores.index(max(scores)), INF
    weights, margin = reference_weights(scores, r.params)
    target, cumulative = uniform(r.seed, r.choice, r.position) * math.fsum(weights), 0.0
    for i, weight in enumerate(weights):
        cumulative += weight
        margin = min(margin, abs(cumulative - target))
        if cumulative > target:
            return i, margin
    raise AssertionError("no token")


V = 9
SCORE = st.one_of(st.sampled_from([0.0, 0.0, -1.0, 2.0, -INF]), st.floats(-8, 3, width=32))
TOKENS = st.lists(st.integers(0, V - 1), max_size=12).map(tuple)


@st.composite
def params_(draw: st.DrawFn) -> SamplingParams:
    def maybe(off: Any, on: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(st.just(off), on))

    penalty = st.floats(-2, 2)
    return SamplingParams(
        max_tokens=100,
        temperature=maybe(1.0, st.sampled_from([0.0, 1e-300, 0.3, 0.7, 1.5, 1e6])),
        top_p=maybe(1.0, st.floats(0, 1)),
        top_k=maybe(0, st.integers(-1, V + 2)),
        min_p=maybe(0.0, st.floats(0, 1)),
        presence_penalty=maybe(0.0, penalty),
        frequency_penalty=maybe(0.0, penalty),
        repetition_penalty=maybe(1.0, st.floats(0.5, 3)),
        logit_bias=maybe({}, st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, 100.0, 1.5, -0.5]))),
        min_tokens=maybe(0, st.integers(0, 4)),
        stop_token_ids=maybe((), TOKENS),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[SampleRow]]:
    size = draw(st.integers(1, 5))
    scores = draw(
        st.lists(st.lists(SCORE, min_size=V, max_size=V).filter(lambda s: max(s) > -INF), min_size=size, max_size=size)
    )
    rows = [
        SampleRow(
            params=draw(params_()),
            seed=draw(st.integers(-(2**63), 2**63 - 1)),
            choice=draw(st.integers(0, 127)),
            position=draw(st.integers(0, 5)),
            prompt_ids=draw(TOKENS),
            generated_ids=draw(TOKENS),
        )
        for _ in range(size)
    ]
    return log_probs_of(scores), rows


@settings(max_examples=120, deadline=None)
@given(batches(), st.lists(st.integers(0, V - 1), max_size=2))
def test_a_batch_of_any_params_agrees_with_the_reference(batch: tuple[Tensor, list[SampleRow]], eos: list[int]) -> None:
    log_probs, rows = batch
    expected = [reference_token(lp.double().tolist(), r, eos) for lp, r in zip(log_probs, rows, strict=True)]
    assume(min(margin for _, margin in expected) > 1e-9)
    before = log_probs.clone()
    assert sample(log_probs, rows, eos_token_ids=eos).tolist() == [token for token, _ in expected]
    assert torch.equal(log_probs, before)


@settings(max_examples=60, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_row_depends_neither_on_its_batch_nor_on_its_place(
    batch: tuple[Tensor, list[SampleRow]], random: Any
) -> None:
    log_probs, rows = batch
    together = sample(log_probs, rows).tolist()
    order = list(range(len(rows)))
    random.shuffle(order)
    assert sample(log_probs[order], [rows[i] for i in order]).tolist() == [together[i] for i in order]
    assert [int(sample(log_probs[i : i + 1], [rows[i]])) for i in range(len(rows))] == together


@settings(max_examples=60, deadline=None)
@given(batches())
def test_an_impossible_token_is_never_sampled(batch: tuple[Tensor, list[SampleRow]]) -> None:
    log_probs, rows = batch
    chosen = sample(log_probs, rows, eos_token_ids=[0])
    assert bool((log_probs.gather(1, chosen[:, None]) > -INF).all())


# ---- the distribution -------------------------------------------------------------------------------------------

SCORES = [1.0, 0.2, -0.7, 2.0, -INF, 0.2, -3.0, 1.4]


def p_value(observed: list[int], weights: list[float]) -> float:
    """Of Pearson's chi-square; a count where nothing is expected is impossible."""
    total, draws = math.fsum(weights), sum(observed)
    if any(count and not weight for count, weight in zip(observed, weights, strict=True)):
        return 0.0
    expected = [draws * weight / total for weight in weights]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e)
    freedom = sum(e > 0 for e in expected) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def counts_of(params: SamplingParams, vary: str) -> list[int]:
    draws = 20_000
    log_probs = log_probs_of([SCORES]).expand(draws, -1)
    base = row(params, seed=11, position=3)
    rows = [dataclasses.replace(base, **{vary: i}) for i in range(draws)]
    return torch.bincount(sample(log_probs, rows), minlength=len(SCORES)).tolist()


@pytest.mark.parametrize("vary", ["position", "seed", "choice"])
def test_noise_is_independent_over_positions_seeds_and_choices(vary: str) -> None:
    params = SamplingParams()
    observed = counts_of(params, vary)
    weights, _ = reference_weights(log_probs_of([SCORES])[0].double().tolist(), params)
    assert p_value(observed, weights) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_k": 4},  # its border cuts through the tie of tokens 1 and 5
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"logit_bias": {6: 3.0, 3: -2.0}},
    ],
    ids=str,
)
def test_samples_follow_the_processed_distribution(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    observed = counts_of(params, "position")
    scores = reference_scores(log_probs_of([SCORES])[0].double().tolist(), row(params), ())
    weights, _ = reference_weights(scores, params)
    assert p_value(observed, weights) > 1e-3
    assert all(count > 0 for count, weight in zip(observed, weights, strict=True) if weight > 0.01)
    plain, _ = reference_weights(log_probs_of([SCORES])[0].double().tolist(), SamplingParams())
    assert p_value(observed, plain) < 1e-6  # the test can tell


@pytest.mark.parametrize(
    "fields", [{"top_p": 0.05}, {"top_p": 0.6}, {"top_p": 0.9999}, {"top_k": 700}, {"top_k": 700, "top_p": 0.97}]
)
def test_large_vocabularies_are_truncated_exactly(fields: dict[str, Any]) -> None:
    """Flat enough that top_p's border lies beyond the first tokens ranked, with many ties."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 40, (3, 6000), generator=generator) / 20
    log_probs = scores.log_softmax(1)
    log_probs[1] = torch.randn(6000, generator=generator).mul(4).log_softmax(0)
    rows = [row(SamplingParams(**fields), seed=seed) for seed in (1, 2, 3)]
    scores = log_probs.double() - log_probs.double().amax(1, keepdim=True)
    kept = sampler._truncate(scores, scores.exp(), rows) > 0
    for got, lp in zip(kept.tolist(), log_probs.double().tolist(), strict=True):
        weights, margin = reference_weights(lp, SamplingParams(**fields))
        assert margin > 1e-9
        assert got == [weight > 0 for weight in weights]


def test_top_p_and_min_p_at_their_ends() -> None:
    log_probs = log_probs_of([[0.0, 1.0, 1.0, 0.5]]).expand(200, -1)

    def seen(**fields: Any) -> set[int]:
        return set(sample(log_probs, [row(SamplingParams(**fields), position=i) for i in range(200)]).tolist())

    assert seen(top_p=0.0) == {1}  # one token is always left
    assert seen(min_p=1.0) == {1, 2}
    assert seen(top_k=1) == {1}
    assert seen(temperature=5e-324) == {1, 2}
    assert seen(top_p=1.0, top_k=4, min_p=0.0) == {0, 1, 2, 3}


# ---- noise ------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_seed_never_changes() -> None:
    assert uniform(0, 0, 0) == PINNED[0]
    assert uniform(1234, 1, 7) == PINNED[1]
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0) == PINNED[2]
    assert len({uniform(s, c, p) for s in range(5) for c in range(5) for p in range(5)}) == 125


def philox4x64(counter: list[int], key: list[int]) -> int:
    """First output word, straight from Salmon et al. 2011, table 2; NumPy counts up before each block."""
    mask = 2**64 - 1
    x, (k0, k1) = [counter[0] + 1, *counter[1:]], key
    for _ in range(10):
        m0, m1 = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(m1 >> 64) ^ x[1] ^ k0, m1 & mask, (m0 >> 64) ^ x[3] ^ k1, m0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x[0]


PINNED = [(philox4x64([p, 0, 0, 0], [s, c]) >> 11) / 2**53 for s, c, p in [(0, 0, 0), (1234, 1, 7), (2**64 - 1, 0, 0)]]


@pytest.mark.parametrize(
    "weights", [[0.0, 1.0, 0.0, 2.0, 0.0], [1.0], [0.0, 1e-30, 1.0, 1e-30, 0.0], [1.0, 1e-17, 0.0]]
)
def test_borders_of_the_cumulative_distribution_never_pick_an_impossible_token(weights: list[float]) -> None:
    w = torch.tensor([weights], dtype=torch.float64)
    total = sum(weights)
    borders = [c / total for c in np.cumsum(weights) if c < total]
    for u in [0.0, 5e-324, *borders, *(np.nextafter(b, d) for b in borders for d in (0, 1)), 1 - 2**-53]:
        token = int(sampler._invert(w, w.cumsum(1), torch.tensor([[u]], dtype=torch.float64)))
        assert weights[token] > 0


def test_a_token_owns_the_lower_border_of_its_share() -> None:
    weights = torch.tensor([[0.0, 1.0, 1.0, 0.0, 2.0]], dtype=torch.float64).expand(5, -1)
    uniforms = torch.tensor([[0.0], [0.25], [0.5], [np.nextafter(0.5, 0)], [0.75]], dtype=torch.float64)
    assert sampler._invert(weights, weights.cumsum(1), uniforms).tolist() == [1, 2, 4, 2, 4]


@given(st.floats(1, 1e6))
@settings(max_examples=200, deadline=None)
def test_the_largest_uniform_still_lies_below_any_total(total: float) -> None:
    weights = torch.tensor([[total, 0.0]], dtype=torch.float64)
    u = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    assert int(sampler._invert(weights, weights.cumsum(1), u)) == 0


def test_a_cumulative_sum_that_rounds_upwards_over_an_impossible_token_is_seen_through() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    cumulative = torch.tensor([[0.0, 1.0, 1.0, 1.1, 2.0], [0.1, 0.1, 1.0, 1.0, 1.0]], dtype=torch.float64)
    uniforms = torch.tensor([[0.51], [0.05]], dtype=torch.float64)
    assert sampler._invert(weights, cumulative, uniforms).tolist() == [1, 2]


# ---- greedy -----------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    log_probs = torch.full((4, 50_000), -12.0)
    for index, best in enumerate([(49_999, 3), (31_000, 17), (0, 49_999), (25_000, 24_999)]):
        log_probs[index, list(best)] = -1.0
    greedy = SamplingParams(temperature=0)
    adjusted = SamplingParams(temperature=0, logit_bias={5: -1.0})
    assert sample(log_probs, [row(greedy)] * 4).tolist() == [3, 17, 0, 24_999]
    assert sample(log_probs, [row(adjusted)] * 4).tolist() == [3, 17, 0, 24_999]


class _Operations(TorchDispatchMode):
    """Names of the operations that read or make a tensor as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.names = width, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        if any(self.width in t.shape for t in tensors):
            self.names.append(func.overloadpacket.__name__)
        return out


def test_a_plain_greedy_batch_reads_the_vocabulary_once() -> None:
    log_probs = log_probs_of([[float(i % 7) for i in range(501)]] * 3)
    with _Operations(501) as operations:
        sample(log_probs, [row(SamplingParams(temperature=0, max_tokens=9, logprobs=3, top_p=0.5))] * 3)
    assert operations.names == ["argmax", "gather"]  # gather reads one score per row


def test_rows_without_truncation_are_not_ranked() -> None:
    log_probs = log_probs_of([[float(i % 7) for i in range(501)]] * 3)
    with _Operations(501) as operations:
        sample(log_probs, [row(SamplingParams(temperature=0.5), position=i) for i in range(3)])
    assert not {"topk", "sort"} & set(operations.names)
    assert "cumsum" in operations.names


def test_how_rows_are_chunked_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = torch.randn(12, 300, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    kinds = [{"top_p": 0.7}, {"temperature": 0.4}, {"temperature": 0}, {"presence_penalty": 1.0, "temperature": 0}]
    rows = [
        row(SamplingParams(**kinds[i % 4]), position=i, generated_ids=[int(log_probs[i].argmax())]) for i in range(12)
    ]
    expected = sample(log_probs, rows).tolist()
    for elements in (1, 300, 700):
        monkeypatch.setattr(sampler, "_CHUNK_ELEMENTS", elements)
        assert sample(log_probs, rows).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, INF, None], ids=["nan", "inf", "no token"])
def test_a_broken_row_fails_the_step_by_name(temperature: float, bad: float | None) -> None:
    log_probs = log_probs_of([[0.0, 1.0, 2.0]] * 3)
    if bad is None:
        log_probs[1] = -INF
    else:
        log_probs[1, 0] = bad
    with pytest.raises(EngineFailure, match="in row 1 of the step"):
        sample(log_probs, [row(SamplingParams(temperature=temperature))] * 3)


# ---- penalties, bias, min_tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # tokens 1, 2, 2, 2 were generated, 0 and 1 stand in the prompt; log-probabilities are −1, −2, −3, −4
        ({"presence_penalty": 0.5}, [-1.0, -2.5, -3.5, -4.0]),
        ({"frequency_penalty": 0.5}, [-1.0, -2.5, -4.5, -4.0]),
        ({"frequency_penalty": -1.0, "presence_penalty": 0.25}, [-1.0, -1.25, -0.25, -4.0]),
        ({"repetition_penalty": 1.5}, [-1.5, -3.0, -4.5, -4.0]),
        ({"repetition_penalty": 0.5}, [-0.5, -1.0, -1.5, -4.0]),
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0}, [-2.0, -5.0, -9.0, -4.0]),
        ({"logit_bias": {0: 3.0, 3: 1.0}, "repetition_penalty": 2.0}, [1.0, -4.0, -6.0, -3.0]),
        ({"min_tokens": 5, "stop_token_ids": (0,)}, [-INF, -2.0, -3.0, -INF]),
        ({"min_tokens": 4, "stop_token_ids": (0,)}, [-1.0, -2.0, -3.0, -4.0]),
        ({"min_tokens": 9, "stop_token_ids": (0, 1, 2)}, [-1.0, -2.0, -3.0, -4.0]),  # nothing would be left
        ({"min_tokens": 9, "ignore_eos": True, "logit_bias": {3: 1.0}}, [-1.0, -2.0, -3.0, -INF]),
    ],
    ids=str,
)
def test_scores_computed_by_hand(fields: dict[str, Any], expected: list[float]) -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, -4.0]] * 2, dtype=torch.float64)
    this = row(SamplingParams(max_tokens=99, **fields), position=4, prompt_ids=[0, 1], generated_ids=[1, 2, 2, 2])
    other = row(SamplingParams(), position=4, prompt_ids=[0, 1, 2, 3], generated_ids=[0])
    scores = sampler._adjust(log_probs.clone(), [other, this], eos_token_ids=[3])
    assert scores.tolist() == [[-1.0, -2.0, -3.0, -4.0], expected]


def test_token_histories_may_be_arrays() -> None:
    log_probs = log_probs_of([[1.0, 0.9, 0.0]])
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    for history in ([0], (0,), np.array([0])):
        assert sample(log_probs, [row(params, generated_ids=history)]).tolist() == [1]


# ---- top_logprobs -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(SCORE, min_size=V, max_size=V), min_size=1, max_size=4), st.integers(0, V + 1), st.data())
def test_top_logprobs_are_the_best_tokens_in_order(scores: list[list[float]], n: int, data: st.DataObject) -> None:
    log_probs = torch.tensor(scores, dtype=torch.float32)
    chosen = data.draw(st.lists(st.integers(0, V - 1), min_size=len(scores), max_size=len(scores)))
    top = top_logprobs(log_probs, torch.tensor(chosen), n)
    assert top.log_probs.dtype == log_probs.dtype
    for index, lp in enumerate(log_probs.tolist()):
        order = sorted(range(V), key=lambda i: (-lp[i], i))[:n]
        assert top.token_ids[index].tolist() == order
        assert top.log_probs[index].tolist() == [lp[i] for i in order]
        assert float(top.chosen[index]) == lp[chosen[index]]


def test_the_greedy_token_leads_the_list_with_the_same_float() -> None:
    log_probs = torch.randn(64, 5000, generator=torch.Generator().manual_seed(3)).log_softmax(1)
    log_probs[:, 4000] = log_probs.amax(1)  # a tie at the top
    greedy = sample(log_probs, [row(SamplingParams(temperature=0))] * 64)
    top = top_logprobs(log_probs, greedy, 5)
    assert torch.equal(top.token_ids[:, 0], greedy)
    assert torch.equal(top.log_probs[:, 0], top.chosen)
