"""Drafts change how soon tokens come, and nothing else: against decoding without them, token by token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from engine_runs import Run, prompts, running_engine
from live_server import Brake
from scipy.stats import chisquare
from small_trees import THRESHOLD, small_trees

from knnlm_core.datastore.reader import Datastore
from knnlm_core.drafts import Guess
from knnlm_core.errors import DatastoreCorrupt
from knnlm_core.knn.fusion import Fusion
from knnlm_core.knn.gates import NEVER, Automaton, Confidence, EveryN, LearnedGate
from knnlm_core.knn.lambdas import Bucketed
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.protocol import Rows, Span
from knnlm_core.retrieval import Retrieval, Source
from knnlm_core.types import EntryRange, Neighbors
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.events import TokenEvent, TokenTrace
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.scheduler import Batch, Decode
from knnlm_server.engine.speculation import Acceptance, Outlined, PassCosts, Speculator
from knnlm_server.engine.stopping import StopMatcher

MOST = 5
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def running(lm: HuggingFaceLM) -> Iterator[tuple[Engine, HuggingFaceLM]]:
    with running_engine("llama", slots=8, step_tokens=64) as (engine, own):
        assert own.identity.model_fingerprint == lm.identity.model_fingerprint
        yield engine, own


class Dictated(Speculator):
    """Drafts by dictation: what a request is going to generate, with mistakes."""

    def __init__(self, texts: dict[str, list[list[int]]], mistakes: float, seed: int = 0, least: int = 0) -> None:
        super().__init__(MOST, 1 << 20, 1 << 20)
        self.texts = texts  # by request id, of each choice
        self.mistakes = mistakes
        self.least = least  # tokens of a draft
        self.random = random.Random(seed)
        self.drafted = 0

    def draft(self, batch: Batch, eos_token_ids: Sequence[int]) -> Batch:
        decodes = []
        for request, choice, _ in super().draft(batch, eos_token_ids).decodes:
            at = len(choice.token_ids)
            length = min(self.random.randint(self.least, MOST), request.params.max_tokens - at - 1)
            text = self.texts[request.request_id][choice.index][at : at + length]
            draft = [self.random.randint(1, 400) if self.random.random() < self.mistakes else t for t in text]
            self.drafted += len(draft)
            decodes.append(Decode(request, choice, draft))
        return batch._replace(decodes=decodes)


class Without(Speculator):
    """No drafts."""

    def __init__(self) -> None:
        super().__init__(0, 1, 1)


@contextmanager
def speculating(engine: Engine, speculator: Speculator) -> Iterator[None]:
    before, engine._speculator = engine._speculator, speculator
    try:
        yield
    finally:
        engine._speculator = before


def retrievals(law: Datastore, news: Datastore) -> dict[str, Retrieval | None]:
    rule = Bucketed(torch.tensor([5.0, 20.0]), torch.tensor([0.7, 0.5, 0.2], dtype=torch.float64))
    one = Source(law, 12, 20.0, 0.6)
    of_law, of_news = Source(law, 8, 10.0, 0.5, weight=0.75), Source(news, 5, 30.0, 0.9, weight=0.25)
    walking = replace(one, gate=LearnedGate(small_trees(), THRESHOLD), lambda_rule=rule, follow_rule=rule)
    excluded = (EntryRange(0, law.entries // 2),)
    return {
        "base": None,
        "always": Retrieval((one,)),
        "bucketed": Retrieval((replace(one, lambda_rule=rule),)),
        "never": Retrieval((one,)).gated(NEVER),
        "every third": Retrieval((replace(one, gate=EveryN(3)),)),
        "unsure": Retrieval((replace(one, gate=Confidence(0.12)),)),
        "automaton": Retrieval((replace(one, gate=Automaton(3.0)),)),
        "learned": Retrieval((walking,)),
        "excluded": Retrieval((replace(walking, exclude=excluded),)),
        "both": Retrieval((of_law, of_news)),
        "both walk": Retrieval((replace(of_law, gate=Automaton(2.0)), replace(of_news, gate=EveryN(2)))),
        "merged": Retrieval(
            tuple(Source(store, 6, 15.0, 0.7, weight=0.5, gate=Automaton(1.0)) for store in (news, law)),
            fusion=Fusion.NEIGHBORS,
        ),
    }


def new_run(
    lm: HuggingFaceLM, prompt: list[int], params: SamplingParams, retrieval: Retrieval | None, number: int = 0
) -> Run:
    run = Run(lm, prompt, params, retrieval)
    run.request.request_id = str(number)
    run.request.trace_neighbors = 4
    return run


def traces(run: Run, choice: int) -> list[TokenTrace]:
    found = [e.trace for e in run.events if isinstance(e, TokenEvent) and e.choice == choice]
    assert all(trace is not None for trace in found)
    return found  # type: ignore[return-value]


def assert_same(have: Run, need: Run) -> None:
    """Tokens, text, probabilities, reasons and decisions."""
    for choice in range(need.request.params.n):
        assert have.tokens(choice) == need.tokens(choice)
        assert have.text(choice) == need.text(choice)
        assert have.log_probs(choice) == pytest.approx(need.log_probs(choice), abs=1e-4)
        for one, other in zip(traces(have, choice), traces(need, choice), strict=True):
            assert (one.searched, one.followed, one.num_pointers) == (
                other.searched,
                other.followed,
                other.num_pointers,
            )
            assert (one.lmbda, one.p_knn) == pytest.approx((other.lmbda, other.p_knn), abs=1e-4)
            assert [n.entry_id for n in one.neighbors] == [n.entry_id for n in other.neighbors]
        assert have.request.choices[choice].finish_reason == need.request.choices[choice].finish_reason
    params = need.request.params
    for name in ("searched", "followed", "skipped"):
        counted, needed = getattr(have.request.counts, name), getattr(need.request.counts, name)
        # What was decided behind the end of a choice, in the same draft, is counted too.
        assert counted == needed or (counted > needed and (params.stop or params.stop_token_ids))


PARAMS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True, n=2),
    "cut": SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=3, ignore_eos=True),
    "penalised": SamplingParams(
        max_tokens=20, temperature=0.7, seed=5, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4,
        presence_penalty=0.2, logit_bias={7: 3.0, 30: -2.0}, min_tokens=4,
    ),
    "short": SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
    "ends": SamplingParams(max_tokens=40, temperature=1.0, seed=9, stop_token_ids=(5, 17, 40, 99, 203), n=2),
}  # fmt: skip


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_whatever_is_drafted_the_same_is_generated(
    running: tuple[Engine, HuggingFaceLM], law: Datastore, news: Datastore, params: SamplingParams, mistakes: float
) -> None:
    engine, lm = running
    hows = list(retrievals(law, news).values())
    cases = [(prompt, hows[i % len(hows)]) for i, prompt in enumerate(prompts(len(hows), seed=5))]

    def runs() -> list[Run]:
        started = [new_run(lm, prompt, params, how, i) for i, (prompt, how) in enumerate(cases)]
        for run in started:
            engine.submit(run.request)
        return [run.wait() for run in started]

    with speculating(engine, Without()):
        plain = runs()
    assert sum(run.request.counts.drafted for run in plain) == 0
    texts = {run.request.request_id: [run.tokens(i) for i in range(params.n)] for run in plain}
    dictated = Dictated(texts, mistakes)
    with speculating(engine, dictated):
        drafted = runs()
    for have, need in zip(drafted, plain, strict=True):
        assert_same(have, need)
    counts = [run.request.counts for run in drafted]
    assert sum(c.drafted for c in counts) <= dictated.drafted
    assert bool(dictated.drafted) == (params.max_tokens > 1)
    if params.max_tokens > 1 and mistakes < 1:
        assert sum(c.accepted for c in counts) > 0
    if mistakes == 0 and params.ignore_eos:
        assert [c.accepted for c in counts] == [c.drafted for c in counts]


def test_a_text_that_is_stored_is_drafted(running: tuple[Engine, HuggingFaceLM], law: Datastore) -> None:
    """The drafts that a server makes by itself, on what the datastore knows and on what it does not."""
    engine, lm = running
    ids = lm.tokenizer.encode(law.document("new-2").text)
    retrieval = Retrieval((Source(law, 8, 0.5, 0.999),))
    for prompt in (ids[:20], *prompts(6, seed=8)):
        with speculating(engine, Without()):
            need = new_run(lm, prompt, replace(GREEDY, max_tokens=60), retrieval)
            engine.submit(need.request)
            need.wait()
        have = new_run(lm, prompt, replace(GREEDY, max_tokens=60), retrieval)
        with speculating(engine, AllOfThem()):
            engine.submit(have.request)
            have.wait()
        assert_same(have, need)
        if prompt == ids[:20]:
            assert have.tokens() == ids[20:80]
            assert have.request.counts.accepted >= 45


class AllOfThem(Speculator):
    """As long drafts as can be, whatever they cost."""

    def __init__(self) -> None:
        super().__init__(MOST, 1 << 20, 1 << 20)

    def _best_width(self, outlined: Sequence[Outlined], spare: int) -> int:
        return self.most


def test_a_stop_string_in_the_middle_of_a_draft_ends_the_completion(
    running: tuple[Engine, HuggingFaceLM], law: Datastore
) -> None:
    engine, lm = running
    retrieval = Retrieval((Source(law, 12, 20.0, 0.6),))
    prompt = prompts(1, seed=3)[0]
    with speculating(engine, Without()):
        whole = new_run(lm, prompt, GREEDY, retrieval)
        engine.submit(whole.request)
        whole.wait()
        text = whole.text()
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        params = replace(GREEDY, stop=(stop,))
        need = new_run(lm, prompt, params, retrieval)
        engine.submit(need.request)
        need.wait()
    with speculating(engine, Dictated({"0": [whole.tokens()]}, mistakes=0.0)):
        have = new_run(lm, prompt, params, retrieval)
        engine.submit(have.request)
        have.wait()
    assert_same(have, need)
    assert len(have.tokens()) < len(whole.tokens())
    assert have.request.choices[0].finish_reason == "stop"
    assert lm.num_free_sequences == lm.num_sequences


class Counting:
    """A datastore that counts the rows that it is searched for."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore, self.rows = datastore, 0

    def search(self, queries: Any, k: int, *, exclude: Any = ()) -> Neighbors:
        self.rows += len(queries)
        return self.datastore.search(queries, k, exclude=exclude)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.datastore, name)


def test_searches_behind_a_stop_string_are_counted(running: tuple[Engine, HuggingFaceLM], law: Datastore) -> None:
    engine, lm = running
    counting = Counting(law)
    retrieval = Retrieval((Source(counting, 12, 20.0, 0.6, gate=EveryN(2)),))
    prompt = prompts(1, seed=3)[0]
    with speculating(engine, Without()):
        whole = new_run(lm, prompt, GREEDY, retrieval)
        engine.submit(whole.request)
        whole.wait()
    # A pass gives a token and its draft: 1, 6, 6, … tokens. The stop string ends with the ninth of them.
    text = [event.text for event in whole.events if isinstance(event, TokenEvent)]
    counting.rows = 0
    before = retrieval_metrics(engine)
    with speculating(engine, Dictated({"0": [whole.tokens()]}, mistakes=0.0, least=MOST)):
        have = new_run(lm, prompt, replace(GREEDY, stop=("".join(text[:9]),)), retrieval)
        engine.submit(have.request)
        have.wait()
    counts = have.request.counts
    assert len(have.tokens()) == 9
    assert (counts.searched, counts.searched + counts.skipped) == (counting.rows, 13)
    after = retrieval_metrics(engine)
    assert [b - a for a, b in zip(before, after, strict=True)] == [counts.searched, counts.skipped]


def retrieval_metrics(engine: Engine) -> list[float]:
    """Tokens searched for and skipped so far."""
    value = engine.metrics.registry.get_sample_value
    return [value("knnlm_retrievals_total", {"decision": name}) or 0 for name in ("searched", "skipped")]


class FailsAt:
    """A datastore whose search fails at a certain call."""

    def __init__(self, datastore: Datastore, call: int) -> None:
        self.datastore, self.call, self.calls = datastore, call, 0

    def search(self, queries: Any, k: int, *, exclude: Any = ()) -> Neighbors:
        self.calls += 1
        if self.calls == self.call:
            raise DatastoreCorrupt("a shard is gone")
        return self.datastore.search(queries, k, exclude=exclude)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.datastore, name)


def test_a_search_that_fails_behind_a_draft_takes_its_own_request_along(
    running: tuple[Engine, HuggingFaceLM], law: Datastore
) -> None:
    engine, lm = running
    fine = Retrieval((Source(law, 12, 20.0, 0.6),))
    first, second = prompts(2, seed=4)
    with speculating(engine, Without()):
        plain = [new_run(lm, prompt, GREEDY, fine, i) for i, prompt in enumerate((first, second))]
        for run in plain:
            engine.submit(run.request)
            run.wait()
    texts = {str(i): [run.tokens()] for i, run in enumerate(plain)}
    with speculating(engine, Dictated(texts, mistakes=0.0)):
        failing = Retrieval((Source(FailsAt(law, call=7), 12, 20.0, 0.6),))
        runs = [new_run(lm, first, GREEDY, failing, 0), new_run(lm, second, GREEDY, fine, 1)]
        for run in runs:
            engine.submit(run.request)
        for run in runs:
            run.wait_end()
    assert isinstance(runs[0].error, DatastoreCorrupt)
    assert runs[0].ends == 1
    assert runs[0].tokens() == plain[0].tokens()[:6]
    assert_same(runs[1], plain[1])
    assert lm.num_free_sequences == lm.num_sequences


class FailsToDraft:
    """A datastore that can be searched, and not be read on from where something was found."""

    def __init__(self, datastore: Datastore, method: str) -> None:
        self.datastore, self.method = datastore, method

    def __getattr__(self, name: str) -> Any:
        return self._fail if name == self.method else getattr(self.datastore, name)

    def _fail(self, *args: Any) -> Any:
        raise DatastoreCorrupt("a shard is gone")


@pytest.mark.parametrize("method", ["next_entry", "continuations"])
def test_a_datastore_that_fails_while_drafting_is_told_once_and_stops_only_its_own_drafts(
    running: tuple[Engine, HuggingFaceLM], law: Datastore, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    engine, lm = running
    text = lm.tokenizer.encode(law.document("new-2").text)
    params = replace(GREEDY, n=2, max_tokens=30)
    fine = Source(law, 8, 0.5, 0.999)
    damaged = replace(fine, datastore=FailsToDraft(law, method))
    with speculating(engine, AllOfThem()):
        runs = [new_run(lm, text[:20], params, Retrieval((source,)), i) for i, source in enumerate((fine, damaged))]
        with Brake(lm) as brake:  # so that both run side by side
            for run in runs:
                engine.submit(run.request)
            brake.wait_held()
        for run in runs:
            run.wait()
    assert runs[0].tokens() == runs[1].tokens() == text[20:50]
    assert runs[0].request.counts.accepted > 0
    assert runs[1].request.counts.drafted == 0
    told = [record.getMessage() for record in caplog.records if "drafts" in record.getMessage()]
    assert told == ["no more drafts request=1 a shard is gone"]


def test_a_fork_beside_a_request_that_fails_draws_from_its_own_row(
    running: tuple[Engine, HuggingFaceLM], law: Datastore
) -> None:
    engine, lm = running
    first, second = prompts(2, seed=9)
    twice = replace(GREEDY, max_tokens=4, n=2)
    alone = new_run(lm, second, twice, None)
    engine.submit(alone.request)
    alone.wait()
    failing = new_run(lm, first, GREEDY, Retrieval((Source(FailsAt(law, call=2), 12, 20.0, 0.6),)))
    forked = new_run(lm, second, twice, None)
    with Brake(lm) as brake:
        engine.submit(failing.request)
        brake.wait_held()
        engine.submit(forked.request)  # its prompt is read in the step in which the other one's search fails
    failing.wait_end()
    assert isinstance(failing.error, DatastoreCorrupt)
    assert [forked.wait().tokens(choice) for choice in (0, 1)] == [alone.tokens(0)] * 2


def test_samples_are_distributed_as_without_drafts(running: tuple[Engine, HuggingFaceLM], law: Datastore) -> None:
    """Every completion of three tokens out of three, against its probability under the mixture."""
    engine, lm = running
    how = Retrieval((Source(law, 12, 20.0, 0.4),))
    prompt, width, length, count = prompts(1, seed=6)[0], 3, 3, 3000
    best = replace(GREEDY, max_tokens=1, logprobs=width)
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(length):
        for path in [path for path in probability if len(path) == depth]:
            run = Run(lm, [*prompt, *path], best, how)
            engine.submit(run.request)
            (event,) = (e for e in run.wait().events if isinstance(e, TokenEvent))
            chances = torch.tensor([value for _, value in event.top[:width]]).softmax(0).tolist()
            for (token, _), chance in zip(event.top, chances, strict=False):
                probability[(*path, token)] = probability[path] * chance
    texts = [list(path) for path in probability if len(path) == length]
    expected = [probability[tuple(path)] for path in texts]
    assert sum(expected) == pytest.approx(1)

    draw = random.Random(1)
    runs = []
    with speculating(engine, Dictated({str(i): [draw.choice(texts)] for i in range(count)}, mistakes=0.1)):
        for i in range(count):
            params = SamplingParams(max_tokens=length, temperature=1.0, top_k=width, seed=i, ignore_eos=True)
            runs.append(Run(lm, prompt, params, how))
            runs[-1].request.request_id = str(i)
            engine.submit(runs[-1].request)
            if i % 50 == 49:
                for run in runs[-50:]:
                    run.wait()
    seen = Counter(tuple(run.tokens()) for run in runs)
    assert set(seen) <= {tuple(text) for text in texts}
    assert sum(run.request.counts.accepted for run in runs) > count // 20
    # Sets of completions that are expected often enough, and one of all others.
    observed, needed, rest = [], [], [0.0, 0.0]
    for text, chance in zip(texts, expected, strict=True):
        if chance * count >= 5:
            observed.append(float(seen[tuple(text)]))
            needed.append(chance * count)
        else:
            rest[0] += seen[tuple(text)]
            rest[1] += chance * count
    if rest[1]:
        observed.append(rest[0])
        needed.append(rest[1])
    assert len(observed) >= 10
    total = sum(observed) / sum(needed)
    assert chisquare(observed, [value * total for value in needed]).pvalue > 1e-3


# -- how much to draft -------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_passes_seen() -> None:
    costs = PassCosts()
    assert costs.seconds(8) > costs.seconds(1) > 0
    draw = random.Random(0)
    for i in range(400):
        tokens = draw.choice([1, 2, 4, 9])
        held_up = 50.0 if i % 40 == 0 else 1.0
        costs.learn(tokens, (0.040 + 0.003 * tokens) * draw.uniform(0.95, 1.05) * held_up)
    for tokens in (1, 3, 4, 7, 9):
        assert costs.seconds(tokens) == pytest.approx(0.040 + 0.003 * tokens, rel=0.1)
    assert 0.068 < costs.seconds(12) < 0.1


def test_a_width_that_was_slow_once_is_tried_again() -> None:
    costs = PassCosts()
    costs.learn(1, 0.04)
    for _ in range(20):
        costs.learn(9, 5.0)
    assert costs.seconds(9) == 5.0
    assert 0.04 < costs.seconds(5) < 5.0
    for _ in range(600):
        costs.learn(1, 0.04)
    assert costs.seconds(9) < 0.1


def test_chances_are_learned_from_guesses_like_it() -> None:
    acceptance = Acceptance()
    near, far = Guess(1, 1.0, 0.9), Guess(1, 0.3, 0.005)
    assert acceptance.chance(near, 0) > acceptance.chance(far, 0)
    for i in range(5000):
        acceptance.learn(near, 0, came_true=i % 10 == 0)
        acceptance.learn(far, 0, came_true=i % 2 == 0)
    assert acceptance.chance(near, 0) == pytest.approx(0.1, abs=0.02)
    assert acceptance.chance(far, 0) == pytest.approx(0.5, abs=0.02)
    for _ in range(5000):
        acceptance.learn(near, 0, came_true=True)
    assert acceptance.chance(near, 0) > 0.95


@pytest.mark.parametrize("chances", list(product([0.0, 0.2, 0.7, 0.98], repeat=2)))
@pytest.mark.parametrize("slope", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("draw", [0.0, 0.3, 3.0])
def test_the_width_promises_the_most_tokens_per_second(chances: tuple[float, ...], slope: float, draw: float) -> None:
    speculator = Speculator(MOST, most_rows=12, step_tokens=100)
    for tokens in (1, 2, 6, 12) * 100:
        speculator.learn_cost(decoding(tokens), 1 + slope * tokens, draw)
    outlined = [
        Outlined([Guess(1, 1.0, 1.0)] * length, [chance**i for i in range(1, length + 1)])
        for length, chance in zip((MOST, 3), chances, strict=True)
    ]

    def rate(width: int) -> float:
        tokens = 2 + sum(sum(each.chances[:width]) for each in outlined)
        neither = [
            (1 - chances[0] ** depth) * (1 - chances[1] ** depth if depth <= 3 else 1) for depth in range(1, width + 1)
        ]
        rounds = 1 + sum(1 - chance for chance in neither)
        return tokens / (speculator._costs.seconds(2 * (1 + width)) + rounds * draw)

    best = max(range(MOST + 1), key=lambda width: (rate(width), -width))
    assert speculator._best_width(outlined, spare=100) == best
    if max(chances) == 0.0:
        assert best == 0
    if min(chances) > 0.9 and slope <= 0.1 and draw == 0.0:
        assert best >= 3


@pytest.mark.parametrize(("spare", "width"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 3), (6, 4), (7, 5), (99, 5)])
def test_drafts_are_cut_to_what_a_step_has_left(spare: int, width: int) -> None:
    """The second choice has two guesses, so that widths 1 to 5 take 2, 4, 5, 6 and 7 tokens."""
    sure = [Outlined([Guess(1, 1.0, 1.0)] * length, [1.0] * length) for length in (MOST, 2)]
    speculator = Speculator(MOST, most_rows=100, step_tokens=100)
    for tokens in (2, 12):
        speculator.learn_cost(decoding(tokens), 1.0, 0.0)
    assert speculator._best_width(sure, spare) == width


def test_a_step_with_drafts_stays_within_its_budget(law: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored text, which is drafted, beside prompts that are read: decoding first, then prompts, then drafts."""
    step_tokens = 12
    retrieval = Retrieval((Source(law, 8, 0.5, 0.999),))
    with running_engine("llama", slots=5, step_tokens=step_tokens) as (engine, lm):
        texts = [lm.tokenizer.encode(law.document(f"new-{i}").text)[:40] for i in range(1, 5)]
        engine._speculator = Speculator(MOST, 1 << 20, step_tokens)
        monkeypatch.setattr(engine._speculator, "learn_cost", lambda *args: None)  # a wider pass always seems to pay
        widths: list[int] = []
        forward = lm.forward

        def counted(batch: Sequence[Span]) -> Rows:
            widths.append(sum(len(span.tokens) for span in batch))
            return forward(batch)

        monkeypatch.setattr(lm, "forward", counted)
        runs = [Run(lm, text[:20], replace(GREEDY, max_tokens=20), retrieval) for text in texts * 2]
        for run in runs:
            engine.submit(run.request)
        for run in runs:
            run.wait()
    assert sum(run.request.counts.accepted for run in runs) > 20
    assert max(widths) == step_tokens


def decoding(count: int) -> Batch:
    """A batch of choices that decode a token each."""
    request = CompletionRequest(
        "", [1], GREEDY, None, [], seed=0, emit=lambda event: None, on_end=lambda: None
    )  # fmt: skip
    choice = Choice(0, IncrementalDetokenizer(lambda ids: ""), StopMatcher(()))
    return Batch([], [Decode(request, choice)] * count)
