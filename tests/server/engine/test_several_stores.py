"""Requests over several datastores in the engine: what they are told does not depend on company, and adds up."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import Run, prompts, running_engine
from exact_reference import ExactReference, Knn
from live_server import wait_until
from small_stores import Published

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreCorrupt, KnnlmError
from knnlm_core.knn.fusion import Fusion
from knnlm_core.knn.gates import NEVER, Confidence
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.mixture import find
from knnlm_core.retrieval import Retrieval, Source
from knnlm_core.types import Neighbors
from knnlm_server.engine import prompt_weights
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.events import TokenEvent, TokenTrace
from knnlm_server.engine.prompt_weights import EPSILON, PromptWeightsRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.scoring import ScoreRequest, TokenScores
from knnlm_server.engine.tracing import ranked

PARAMS = SamplingParams(max_tokens=8, seed=8, ignore_eos=True)


@pytest.fixture(scope="module")
def running(lm: HuggingFaceLM) -> Iterator[tuple[Engine, HuggingFaceLM]]:
    with running_engine("llama", slots=8, step_tokens=64) as (engine, own):
        assert own.identity.model_fingerprint == lm.identity.model_fingerprint
        yield engine, own


def kinds(law: Datastore, news: Datastore) -> dict[str, Retrieval | None]:
    of_law, of_news = Source(law, 8, 10.0, 0.5, weight=0.75), Source(news, 5, 30.0, 0.9, weight=0.25)
    return {
        "base": None,
        "law": Retrieval((Source(law, 12, 20.0, 0.6),)),
        "both": Retrieval((of_law, of_news)),
        "swapped": Retrieval((of_news, of_law)),
        "never": Retrieval((of_law, of_news)).gated(NEVER),
        "unsure": Retrieval((of_law, replace(of_news, gate=Confidence(0.12)))),
        "merged": Retrieval(
            tuple(Source(store, 6, 15.0, 0.7, weight=0.5) for store in (news, law)), fusion=Fusion.NEIGHBORS
        ),
    }


def traced(run: Run) -> list[TokenTrace]:
    traces = [event.trace for event in run.wait().events if isinstance(event, TokenEvent)]
    assert all(trace is not None for trace in traces)
    return traces  # type: ignore[return-value]


def new_run(lm: HuggingFaceLM, prompt: list[int], retrieval: Retrieval | None) -> Run:
    run = Run(lm, prompt, PARAMS, retrieval)
    run.request.trace_neighbors, run.request.attribute = 6, True
    return run


def decisions(run: Run) -> tuple[int, int, int]:
    counts = run.request.counts
    return counts.searched, counts.followed, counts.skipped


def test_mixtures_come_out_alone_as_in_company(
    running: tuple[Engine, HuggingFaceLM], law: Datastore, news: Datastore
) -> None:
    engine, lm = running
    hows = list(kinds(law, news).values())
    cases = [(prompt, hows[i % len(hows)]) for i, prompt in enumerate(prompts(2 * len(hows), seed=5))]
    alone = []
    for prompt, how in cases:
        alone.append(new_run(lm, prompt, how))
        engine.submit(alone[-1].request)
        alone[-1].wait()
    together = [new_run(lm, prompt, how) for prompt, how in cases]
    for run in together:
        engine.submit(run.request)
    for run, need in zip(together, alone, strict=True):
        assert run.wait().tokens() == need.tokens()
        assert run.log_probs() == pytest.approx(need.log_probs(), abs=1e-4)
        assert decisions(run) == decisions(need)
        for have, other in zip(traced(run), traced(need), strict=True):
            assert (have.searched, have.decision) == (other.searched, other.decision)
            assert [(n.source, n.entry_id) for n in have.neighbors] == [(n.source, n.entry_id) for n in other.neighbors]
            assert (have.lmbda, len(have.sources)) == (other.lmbda, len(other.sources))
            mine, others = have.attribution, other.attribution
            assert mine is not None
            assert others is not None
            assert mine.entry_ids.tolist() == others.entry_ids.tolist()
            assert mine.shares == pytest.approx(others.shares, abs=1e-4)


def test_traces_of_mixtures_add_up(running: tuple[Engine, HuggingFaceLM], law: Datastore, news: Datastore) -> None:
    engine, lm = running
    for name, retrieval in kinds(law, news).items():
        run = new_run(lm, [7, 30, 200], retrieval)
        engine.submit(run.request)
        for token, trace in zip(run.wait().tokens(), traced(run), strict=True):
            assert trace.p == pytest.approx((1 - trace.lmbda) * trace.p_lm + trace.lmbda * trace.p_knn, abs=1e-5)
            shares = trace.attribution
            assert shares is not None
            assert shares.model.sum() + shares.shares.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
            assert shares.model[0] == pytest.approx((1 - trace.lmbda) * trace.p_lm / trace.p, abs=1e-5)
            for source, entry_id in zip(shares.sources.tolist(), shares.entry_ids.tolist(), strict=True):
                assert retrieval is not None
                store = retrieval.sources[source].datastore
                assert store.values(torch.tensor([entry_id])).item() == token  # type: ignore[attr-defined]
            if name in ("base", "law"):
                assert not trace.sources
                continue
            assert retrieval is not None
            assert len(trace.sources) == 2
            if name == "never":
                assert {(s.lmbda, s.p_knn) for s in trace.sources} == {(0.0, 0.0)}
                continue
            assert trace.sources[0].lmbda == retrieval.sources[0].lmbda
            assert trace.sources[1].lmbda in ({0.0, 0.9} if name == "unsure" else {retrieval.sources[1].lmbda})
            assert math.fsum(s.weight for s in trace.sources) == pytest.approx(1, abs=1e-9)
            assert math.fsum(s.weight * s.lmbda for s in trace.sources) == pytest.approx(trace.lmbda, abs=1e-9)
            mixed = math.fsum(s.weight * s.lmbda * s.p_knn for s in trace.sources)
            assert mixed == pytest.approx(trace.lmbda * trace.p_knn, abs=1e-5)
            near = trace.neighbors
            assert len(near) == 6
            order = [n.distance for n in near] if name == "merged" else [-n.weight for n in near]
            assert order == sorted(order)


def test_neighbours_without_mass_come_before_no_neighbours(law: Datastore, news: Datastore) -> None:
    silent = Source(law, 3, 1e-6, 0.0, weight=0.5)
    loud = Source(news, 4, 20.0, 0.5, weight=0.5, exclude=(news.document_entries(news.document_ids()[0]),))
    keys = law.keys(torch.tensor([3, 40]))
    found = find(keys, [Retrieval((silent, loud))] * 2)
    order = ranked(found, Fusion.DISTRIBUTIONS)
    assert found.sources[order][:, :4].tolist() == [[1] * 4] * 2
    assert found.sources[order][:, 4:].tolist() == [[0] * 3] * 2
    assert (found.neighbors.entry_ids.gather(1, order) >= 0).all()


# -- scoring -----------------------------------------------------------------------------------------------------------


def scored(lm: HuggingFaceLM, texts: Sequence[list[int]], retrieval: Retrieval, budget: int = 128) -> list[TokenScores]:
    done: dict[int, TokenScores] = {}
    request = ScoreRequest("test", texts, retrieval, 32, 16, done.__setitem__, lambda error: None, attribute=True)
    while not request.is_done:
        request.run(lm, budget)
    return [done[index] for index in range(len(texts))]


@pytest.mark.parametrize("how", ["both", "merged", "law"])
def test_scores_and_attributions_of_a_text_do_not_depend_on_the_batch(
    lm: HuggingFaceLM, law: Datastore, news: Datastore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    retrieval = kinds(law, news)[how]
    assert retrieval is not None
    texts = [[(i * j) % 400 + 1 for i in range(length)] for j, length in enumerate((90, 3, 70), start=1)]
    need = [scored(lm, [text], retrieval)[0] for text in texts]
    monkeypatch.setattr("knnlm_server.engine.scoring.ROWS_AT_ONCE", 40)
    monkeypatch.setattr("knnlm_server.engine.scoring.NEIGHBORS_AT_ONCE", 7 * retrieval.k)
    for have, other in zip(scored(lm, texts, retrieval, budget=64), need, strict=True):
        assert have.mixed == pytest.approx(other.mixed, abs=1e-4)
        mine, others = have.attribution, other.attribution
        assert mine is not None
        assert others is not None
        assert len(mine.model) == len(mine.counts) == len(have.base)
        assert mine.counts.sum() == len(mine.entry_ids) == len(mine.shares) == len(mine.sources)
        assert mine.counts.tolist() == others.counts.tolist()
        assert mine.entry_ids.tolist() == others.entry_ids.tolist()
        assert mine.shares == pytest.approx(others.shares, abs=1e-4)
        token = np.repeat(np.arange(len(mine.model)), mine.counts)
        total = mine.model + np.bincount(token, mine.shares, len(mine.model))
        assert total == pytest.approx(np.ones(len(total)), abs=1e-6)


# -- weights by the prompt ---------------------------------------------------------------------------------------------


def weigh(lm: HuggingFaceLM, texts: Sequence[list[int]], retrieval: Retrieval) -> list[list[float]]:
    weights: list[list[float]] = []
    request = PromptWeightsRequest("test", texts, retrieval, weights, lambda error: None)
    passes = 0
    while not request.is_done:
        request.run(lm, 1)
        passes += 1
    assert passes == len(texts)
    return weights


def test_prompt_weights_equal_a_float64_recomputation(
    lm: HuggingFaceLM, law: Datastore, news: Datastore, reference: ExactReference
) -> None:
    retrieval = kinds(law, news)["both"]
    assert retrieval is not None
    texts = [lm.tokenizer.encode("3. new: The court may refuse the goods. A buyer must keep"), [5, 17]]
    texts.append(lm.tokenizer.encode(law.document("new-1").text)[:60])
    for text, have in zip(texts, weigh(lm, texts, retrieval), strict=True):
        seen = reference.run(text)
        vocab = seen.log_probs.shape[1]
        means = []
        for source in retrieval.sources:
            knn = Knn(source.k, source.knn_temperature, source.lmbda)
            store = source.datastore
            assert isinstance(store, Datastore)
            p = [reference.knn_probs(store, seen.keys[t], knn, vocab)[0][text[t + 1]] for t in range(len(text) - 1)]
            means.append(np.log((1 - EPSILON) * np.array(p) + EPSILON / vocab).mean())
        need = np.exp(means) / np.exp(means).sum()
        assert have == pytest.approx(need, abs=1e-3)
        assert math.fsum(have) == pytest.approx(1, abs=1e-12)
    assert have[0] > 0.9  # its own document


def test_prompt_weights_need_two_tokens_and_look_at_the_last_ones_alone(
    lm: HuggingFaceLM, law: Datastore, news: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = kinds(law, news)["both"]
    assert retrieval is not None
    assert weigh(lm, [[5]], retrieval) == [[0.5, 0.5]]
    text = list(range(20, 60))
    monkeypatch.setattr(prompt_weights, "MAX_CONTEXT", 12)
    monkeypatch.setattr(prompt_weights, "MAX_TARGETS", 5)
    read = []
    encode = lm.encode
    monkeypatch.setattr(lm, "encode", lambda *given: (read.append(given), encode(*given))[1])
    assert weigh(lm, [text], retrieval) == weigh(lm, [[9, *text]], retrieval)
    assert [(len(windows[0]), first) for windows, first in read] == [(11, [6])] * 2
    assert prompt_weights.prompt_weights(lm, text[:4], retrieval) == prompt_weights.prompt_weights(
        lm, text[:4], retrieval
    )


def test_prompt_weights_do_not_depend_on_other_work(
    running: tuple[Engine, HuggingFaceLM], law: Datastore, news: Datastore
) -> None:
    engine, lm = running
    retrieval = kinds(law, news)["both"]
    assert retrieval is not None
    texts = prompts(6, seed=9)
    need = [weigh(lm, [text], retrieval)[0] for text in texts]
    busy = [Run(lm, prompt, SamplingParams(max_tokens=30, ignore_eos=True), retrieval) for prompt in prompts(4)]
    for run in busy:
        engine.submit(run.request)
    weights: list[list[float]] = []
    ended = threading.Event()
    engine.submit(PromptWeightsRequest("test", texts, retrieval, weights, lambda error: ended.set()))
    assert ended.wait(60)
    for run in busy:
        run.wait()
    assert weights == need
    wait_until(lambda: not any(engine.load()))


# -- failures ----------------------------------------------------------------------------------------------------------


class Damaged(Datastore):
    def search(self, *args: object, **kwargs: object) -> Neighbors:
        raise DatastoreCorrupt("values.arrow holds token 999999")


def test_one_of_two_stores_that_fails_ends_the_request_alone(
    running: tuple[Engine, HuggingFaceLM], law: Datastore, published: Published
) -> None:
    engine, lm = running
    with Damaged.open(published.root, "news") as damaged:
        bad = Retrieval((Source(law, 4, 5.0, 0.5, weight=0.5), Source(damaged, 4, 5.0, 0.5, weight=0.5)))
        good = Retrieval((Source(law, 4, 5.0, 0.5),))
        runs = [Run(lm, [7, 8, 9], PARAMS, how) for how in (bad, good, bad)]
        errors: list[KnnlmError | None] = []
        ended = threading.Event()

        def end(error: KnnlmError | None) -> None:
            errors.append(error)
            ended.set()

        engine.submit(PromptWeightsRequest("test", [[5, 6, 7]], bad, [], end))
        for run in runs:
            engine.submit(run.request)
        for run in runs:
            run.wait_end()
        assert ended.wait(60)
    assert [type(run.error) for run in runs] == [DatastoreCorrupt, type(None), DatastoreCorrupt]
    assert [run.ends for run in runs] == [1, 1, 1]
    assert len(runs[1].tokens()) == 8
    assert [type(error) for error in errors] == [DatastoreCorrupt]
    wait_until(lambda: not any(engine.load()) and lm.num_free_sequences == lm.num_sequences)
