"""What the benchmark says of two runs that part: near-ties are told from differences that rounding does not make."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import Run, prompts
from small_trees import THRESHOLD, small_trees

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from partings import NEAR, Pair, Parting, partings, report

from knnlm_core.datastore.reader import Datastore
from knnlm_core.knn.gates import Confidence, LearnedGate
from knnlm_core.knn.lambdas import Bucketed
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.events import TokenEvent
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.speculation import Speculator
from tiny import tiny_model, tiny_tokenizer

COARSE = 0.02  # what float16 does to log-probabilities of the tiny model, at most
SAMPLED = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)


class Both:
    """A tiny LM under an engine without drafts, and under one that drafts whatever it costs."""

    def __init__(self, dtype: torch.dtype) -> None:
        tokenizer = Tokenizer(tiny_tokenizer())
        self.lm = HuggingFaceLM(tiny_model("llama").to(dtype), tokenizer, name="tiny", max_sequences=8)
        self.off, self.on = (Engine(self.lm, (), EngineConfig(draft_tokens=most)) for most in (0, 6))
        self.on._speculator = Eager(6, 1 << 20, 512)
        for engine in (self.off, self.on):
            engine.start()

    def close(self) -> None:
        for engine in (self.off, self.on):
            engine.stop(drain_timeout_s=0)
        self.lm.close()

    def run(
        self,
        engine: Engine,
        asked: Sequence[list[int]],
        how: Retrieval,
        params: SamplingParams = SAMPLED,
        seed: int = 0,
    ) -> list[list[TokenEvent]]:
        """The tokens of each prompt, which has a seed of its own."""
        runs = [Run(self.lm, prompt, replace(params, seed=seed + i), how) for i, prompt in enumerate(asked)]
        for run in runs:
            run.request.trace_neighbors = 1
            engine.submit(run.request)
        return [[e for e in run.wait().events if isinstance(e, TokenEvent)] for run in runs]


class Eager(Speculator):
    """To whom every width costs the same."""

    def learn_cost(self, *_: object) -> None:
        self._costs.learn(1, 1.0)
        self._costs.learn(1000, 1.0)


def pairs_of(
    asked: Sequence[list[int]], one: Sequence[list[TokenEvent]], other: Sequence[list[TokenEvent]],
    params: SamplingParams = SAMPLED,
) -> list[Pair]:  # fmt: skip
    columns = enumerate(zip(asked, one, other, strict=True))
    return [Pair(prompt, replace(params, seed=i), mine, others) for i, (prompt, mine, others) in columns]


@pytest.fixture(scope="module")
def half() -> Iterator[Both]:
    both = Both(torch.float16)
    yield both
    both.close()


@pytest.fixture(scope="module")
def single() -> Iterator[Both]:
    both = Both(torch.float32)
    yield both
    both.close()


@pytest.fixture(scope="module")
def asked(law: Datastore, half: Both) -> list[list[int]]:
    """Beginnings of stored text, and random ones."""
    texts = [half.lm.tokenizer.encode(law.document(f"new-{i}").text) for i in range(1, 6)]
    return [text[start : start + 30] for text in texts for start in (0, 20, 40)] + prompts(9, seed=3)


def hows(law: Datastore) -> dict[str, Retrieval]:
    rule = Bucketed(torch.tensor([5.0, 20.0]), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64))
    one = Source(law, 12, 20.0, 0.6)
    learned = replace(one, gate=LearnedGate(small_trees(), THRESHOLD), lambda_rule=rule, follow_rule=rule)
    return {"always": Retrieval((one,)), "learned": Retrieval((learned,))}


def test_every_difference_that_drafts_make_is_a_near_tie(half: Both, law: Datastore, asked: list[list[int]]) -> None:
    differences = 0
    for retrieval in hows(law).values():
        pairs = pairs_of(asked, half.run(half.off, asked, retrieval), half.run(half.on, asked, retrieval))
        found = partings(half.lm, retrieval, pairs, near=COARSE)
        told = report(found, pairs)
        assert told["near-ties"] == f"{len(found)} of {len(found)} differences", told
        assert told["same"] == len(asked) - len(found)
        assert told["rounding before, largest"] < 2 * COARSE
        differences += len(found)
    assert differences


def test_in_float32_drafts_make_no_difference(single: Both, law: Datastore, asked: list[list[int]]) -> None:
    retrieval, asked = hows(law)["learned"], asked[::3]
    pairs = pairs_of(asked, single.run(single.off, asked, retrieval), single.run(single.on, asked, retrieval))
    told = report(partings(single.lm, retrieval, pairs), pairs)
    assert (told["same"], told["near-ties"]) == (len(asked), "0 of 0 differences")
    assert told["rounding before, largest"] < 1e-4


def test_other_noise_is_not_taken_for_rounding(half: Both, law: Datastore, asked: list[list[int]]) -> None:
    retrieval, asked = hows(law)["always"], asked[::3]
    one, other = (half.run(half.off, asked, retrieval, seed=seed) for seed in (0, 1000))
    found = partings(half.lm, retrieval, pairs_of(asked, one, other), near=COARSE)
    assert len(found) == len(asked)
    assert sum(parting.is_near_tie for parting in found) < len(found) / 4
    assert {parting.cause for parting in found} == {"draw"}


@pytest.mark.parametrize(("apart", "is_near"), [(1e-4, True), (0.04, False)])
def test_a_gate_that_decides_otherwise_is_near_if_its_threshold_is(
    single: Both, law: Datastore, apart: float, is_near: bool
) -> None:
    """Two thresholds around a score that one run had stand for rounding."""
    greedy, prompt = replace(SAMPLED, temperature=0.0), prompts(1, seed=2)
    source = Source(law, 12, 20.0, 0.9)

    def gated(threshold: float) -> Retrieval:
        return Retrieval((replace(source, gate=Confidence(threshold)),))

    (base,) = single.run(single.off, prompt, gated(0.5), greedy)
    for event in base:
        assert event.trace is not None
        assert event.trace.gate_score is not None
        one, other = (gated(event.trace.gate_score + sign * apart) for sign in (-1, 1))
        pairs = pairs_of(
            prompt, single.run(single.off, prompt, one, greedy), single.run(single.off, prompt, other, greedy), greedy
        )
        found = partings(single.lm, one, pairs)
        if found and found[0].cause == "gate":
            break
    else:
        raise AssertionError("no threshold changes a token")
    (parting,) = found
    assert parting.is_near_tie is is_near
    assert parting.distance is not None
    assert (parting.distance < NEAR) is is_near


def test_a_rule_that_falls_into_another_bucket_is_told(single: Both, law: Datastore) -> None:
    greedy, asked = replace(SAMPLED, temperature=0.0), prompts(4, seed=2)
    found: list[Parting] = []
    lambdas = torch.tensor([0.95, 0.0], dtype=torch.float64)
    runs, edges = [], (1.0, 1e6)
    for edge in edges:
        rule = Bucketed(torch.tensor([edge]), lambdas)
        how = Retrieval((Source(law, 12, 20.0, 0.6, lambda_rule=rule),))
        runs.append(single.run(single.off, asked, how, greedy))
    found = partings(single.lm, how, pairs_of(asked, *runs, greedy))
    assert found
    assert {(parting.cause, parting.is_near_tie) for parting in found} == {("lambda", False)}
