"""Both clients against the real server: chat, streamed and overlapping scores, neighbours, the tokenizer."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import pytest
from live_server import Brake, LiveServer, before_each_pass, slowed, wait_until
from small_stores import Published, Start
from test_client_end_to_end import (
    LAW,
    LM,
    OTHER,
    PARAMETER,
    PROMPT,
    TEXTS,
    TIMEOUT_S,
    AsyncCaller,
    Operation,
    SyncCaller,
    fails,
    same_but_for_the_request,
    undeclared,
    written,
)

import knnlm_client as kc
from knnlm_client import ChatMessage, DocumentInput, KnnOptions, StreamOptions
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM

ASK = [ChatMessage(role="developer", content="Be brief."), {"role": "user", "content": "Who must keep the goods?"}]
ASK_ON_THE_WIRE = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Who must keep the goods?"},
]


class StreamingCaller(Protocol):
    """A client of either kind."""

    def call(self, operation: Operation) -> Any:
        """What one operation returns."""

    def events(self, open_stream: Operation, leave_after: float = math.inf) -> list[Any]:
        """The events of a stream, read as the documentation says: in a with block."""

    def close(self) -> None: ...


class SyncStreamingCaller(SyncCaller):
    def events(self, open_stream: Operation, leave_after: float = math.inf) -> list[Any]:
        received: list[Any] = []
        with open_stream(self._client) as stream:
            for event in stream:
                received.append(event)
                if len(received) >= leave_after:
                    break
        return received


class AsyncStreamingCaller(AsyncCaller):
    def events(self, open_stream: Operation, leave_after: float = math.inf) -> list[Any]:
        async def run() -> list[Any]:
            received: list[Any] = []
            async with open_stream(self._client) as stream:
                async for event in stream:
                    received.append(event)
                    if len(received) >= leave_after:
                        break
            return received

        return self._loop.run(run())


@pytest.fixture(params=[SyncStreamingCaller, AsyncStreamingCaller], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StreamingCaller]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    kind: Callable[..., StreamingCaller] = request.param
    return kind


@pytest.fixture
def caller(kind: Callable[..., StreamingCaller], live_server: LiveServer) -> Iterator[StreamingCaller]:
    caller = kind(live_server.url)
    yield caller
    caller.close()


# -- completions -----------------------------------------------------------------------------------------------------


def test_an_echoed_prompt_comes_with_its_logprobs(caller: StreamingCaller, lm: HuggingFaceLM) -> None:
    answer = caller.call(
        lambda client: client.completions(PROMPT, model=LAW, echo=True, max_tokens=0, logprobs=2, temperature=0)
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert len(choice.logprobs.tokens) == len(lm.tokenizer.encode(PROMPT)) == answer.usage.prompt_tokens
    assert (choice.logprobs.token_logprobs[0], choice.logprobs.top_logprobs[0]) == (None, None)
    assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset[0] == 0
    assert undeclared(answer) == set()


def test_an_echo_and_a_score_give_a_text_the_same_probability(caller: StreamingCaller) -> None:
    knn = KnnOptions(k=9, temperature=12.5, lmbda=0.4)
    echoed = caller.call(
        lambda client: client.completions(PROMPT, model=LAW, echo=True, max_tokens=0, logprobs=0, knn=knn)
    )
    scored = caller.call(lambda client: client.score(PROMPT, model=LAW, knn=knn))
    total = -sum(value for value in echoed.choices[0].logprobs.token_logprobs if value is not None)
    assert total == pytest.approx(scored.total.mixed.nll, rel=1e-4)


def test_the_best_of_several_are_returned_and_all_are_counted(caller: StreamingCaller) -> None:
    options: dict[str, Any] = {"model": LM, "temperature": 1.5, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    best = caller.call(lambda client: client.completions(PROMPT, n=2, best_of=4, logprobs=0, **options))
    every = caller.call(lambda client: client.completions(PROMPT, n=4, logprobs=0, **options))

    def mean(choice: kc.CompletionChoice) -> float:
        values = [value for value in choice.logprobs.token_logprobs if value is not None]
        return sum(values) / len(values)

    need = sorted(map(mean, every.choices), reverse=True)[:2]
    assert [mean(choice) for choice in best.choices] == pytest.approx(need)
    assert best.usage.completion_tokens == every.usage.completion_tokens == 24


def test_a_prompt_asked_for_again_is_found_in_the_cache(caller: StreamingCaller) -> None:
    def cached(prompt: str) -> int:
        answer = caller.call(lambda client: client.completions(prompt, model=LM, max_tokens=1))
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    prompt = f"{PROMPT} {OTHER} " * 4
    cached(prompt)
    assert cached(prompt) > 0


def test_usage_counts_the_tokens_so_far_in_every_chunk(caller: StreamingCaller) -> None:
    usage = StreamOptions(include_usage=True, continuous_usage_stats=True)
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "logprobs": 0, "stream_options": usage}
    chunks = caller.events(lambda client: client.stream_completions(PROMPT, model=LM, **options))
    so_far = 0  # a reader that is slow gets several tokens in one chunk
    for chunk in chunks:
        so_far += sum(len(choice.logprobs.tokens) for choice in chunk.choices if choice.logprobs is not None)
        assert chunk.usage.completion_tokens == so_far
    assert so_far == 24


# -- chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chatting(kind: Callable[..., StreamingCaller], chat_server: LiveServer) -> Iterator[StreamingCaller]:
    caller = kind(chat_server.url)
    yield caller
    caller.close()


def test_a_chat_is_the_servers_own_answer_field_by_field(chatting: StreamingCaller, chat_server: LiveServer) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2}
    body = {"model": LAW, "messages": ASK_ON_THE_WIRE, **options, "knn": {"lambda": 0.5, "trace": True}}
    response = chat_server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    knn = KnnOptions(lmbda=0.5, trace=True)
    answer = chatting.call(lambda client: client.chat(ASK, model=LAW, knn=knn, **options))
    need = response.json()
    # The second one finds the prompt in the cache.
    need["usage"].pop("prompt_tokens_details")
    got = written(answer)
    got["usage"].pop("prompt_tokens_details")
    assert same_but_for_the_request(got, need)
    assert undeclared(answer) == set()
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == len(choice.knn or ()) == answer.usage.completion_tokens
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) >= 2
        assert token.logprob <= max(other.logprob for other in token.top_logprobs)


def test_a_chat_completes_the_rendered_conversation(chatting: StreamingCaller) -> None:
    rendered = "[system]Be brief.<|end|>[user]Who must keep the goods?<|end|>[assistant]"
    tokens = chatting.call(lambda client: client.tokenize(ASK)).tokens
    assert tokens == chatting.call(lambda client: client.tokenize(rendered, add_special_tokens=False)).tokens
    assert chatting.call(lambda client: client.detokenize(tokens)) == rendered
    chat = chatting.call(lambda client: client.chat(ASK, model=LM, temperature=0, max_tokens=8))
    completion = chatting.call(lambda client: client.completions(tokens, model=LM, temperature=0, max_tokens=8))
    assert chat.choices[0].message.content == completion.choices[0].text
    signed = chatting.call(lambda client: client.tokenize(ASK, chat_template_kwargs={"opening": "Yours"}))
    assert signed.count > len(tokens)


def test_an_answer_goes_into_the_next_request_as_it_is(chatting: StreamingCaller) -> None:
    def turn(messages: list[Any]) -> kc.ChatCompletion:
        return chatting.call(lambda client: client.chat(messages, model=LM, temperature=0, max_tokens=4))

    first = turn([*ASK])
    second = turn([*ASK, first.choices[0].message, {"role": "user", "content": "Why?"}])
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_streamed_chat_is_the_answer_in_pieces(chatting: StreamingCaller) -> None:
    options: dict[str, Any] = {
        "model": LAW, "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 1,
        "knn": KnnOptions(lmbda=0.6, trace=True),
    }  # fmt: skip
    whole = chatting.call(lambda client: client.chat(ASK, **options))
    usage = StreamOptions(include_usage=True)
    *pieces, last = chatting.events(lambda client: client.stream_chat(ASK, stream_options=usage, **options))
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert set().union(*map(undeclared, pieces)) == set()
    for need in whole.choices:
        parts = [choice for chunk in pieces for choice in chunk.choices if choice.index == need.index]
        assert (parts[0].delta.role, parts[0].delta.content) == ("assistant", "")
        assert "".join(part.delta.content or "" for part in parts) == need.message.content
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [need.finish_reason]
        assert [entry for part in parts for entry in part.knn or []] == need.knn
        told = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
        assert told == need.logprobs.content


def test_leaving_a_streamed_chat_early_frees_the_servers_slot(
    chatting: StreamingCaller, chat_server: LiveServer
) -> None:
    with slowed(chat_server.lm, 0.05):
        options: dict[str, Any] = {"model": LAW, "max_tokens": 150, "ignore_eos": True}
        assert len(chatting.events(lambda client: client.stream_chat(ASK, **options), leave_after=3)) == 3
        wait_until(chat_server.is_idle, within_s=5)


BAD_CHATS: dict[str, tuple[Operation, type[kc.APIError], str, str]] = {
    "nothing said": (lambda c: c.chat([], model=LM), kc.InvalidParameter, PARAMETER, "messages"),
    "a role that nobody has": (
        lambda c: c.chat([{"role": "tool", "content": "x"}], model=LM),
        kc.UnsupportedFeature, "unsupported_feature", "messages",
    ),
    "a picture": (
        lambda c: c.chat([ChatMessage.model_validate(
            {"role": "user", "content": [{"type": "image_url", "text": "x"}]}
        )], model=LM),
        kc.UnsupportedFeature, "unsupported_feature", "messages",
    ),
    "alternatives without logprobs": (
        lambda c: c.chat(ASK, model=LM, top_logprobs=2), kc.InvalidParameter, PARAMETER, "top_logprobs",
    ),
    "two limits": (
        lambda c: c.chat(ASK, model=LM, max_tokens=3, max_completion_tokens=4), kc.InvalidParameter, PARAMETER, "max_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_raises_the_clients_own_error(chatting: StreamingCaller, case: str) -> None:
    operation, kind, code, param = BAD_CHATS[case]
    with pytest.raises(kc.APIError) as caught:
        chatting.call(operation)
    error = caught.value
    assert (type(error), error.status, error.code) == (kind, 400, code), error
    assert (error.param or "").startswith(param)


def test_a_model_without_a_template_does_not_chat(caller: StreamingCaller) -> None:
    for operation in (lambda client: client.chat(ASK, model=LM), lambda client: client.tokenize(ASK)):
        with pytest.raises(kc.InvalidRequest, match="template") as caught:
            caller.call(operation)
        assert caught.value.status == 400
    assert caller.call(lambda client: client.tokenizer_info()).chat_template is None


# -- score -----------------------------------------------------------------------------------------------------------


def test_one_text_scores_as_a_list_of_it(caller: StreamingCaller) -> None:
    alone = caller.call(lambda client: client.score(TEXTS[0], model=LAW))
    assert alone == caller.call(lambda client: client.score(TEXTS[:1], model=LAW))


def test_a_document_of_the_datastore_scores_as_its_text_does_without_it(
    caller: StreamingCaller, law: Datastore
) -> None:
    text = law.document("new-3").text
    by_id = caller.call(lambda client: client.score([DocumentInput(document_id="new-3")], model=LAW))
    assert [result.document_id for result in by_id.results] == ["new-3"]
    assert undeclared(by_id) == set()
    assert by_id.total.searched > 0
    by_text = caller.call(lambda client: client.score([text], model=LAW, exclude_documents=["new-3"]))
    assert by_id.total == by_text.total
    found_itself = caller.call(lambda client: client.score([text], model=LAW))
    assert found_itself.total.mixed.nll < by_id.total.mixed.nll


def test_overlap_splits_the_total_by_longest_match(caller: StreamingCaller, live_server: LiveServer) -> None:
    texts = [*TEXTS, "0. old: nothing of this stands in any document of that datastore"]
    answer = caller.call(lambda client: client.score(texts, model=LAW, overlap=True, per_token=True))
    assert written(answer) == live_server.score(texts, model=LAW, overlap=True, per_token=True)
    assert undeclared(answer) == set()
    for sums in (answer.total, *answer.results):
        assert sums.overlap is not None
        assert sum(bucket.tokens for bucket in sums.overlap) == sums.tokens
        assert sum(bucket.base.nll or 0 for bucket in sums.overlap) == pytest.approx(sums.base.nll)
    lows = [bucket.longest_match[0] for bucket in answer.total.overlap]
    assert lows == sorted(lows)
    lengths = [token.longest_match for result in answer.results for token in result.per_token]
    for bucket in answer.total.overlap:
        low, high = bucket.longest_match
        assert bucket.tokens == sum(low <= length <= (high if high is not None else math.inf) for length in lengths)


def test_a_streamed_score_is_the_answer_in_pieces(caller: StreamingCaller) -> None:
    options: dict[str, Any] = {"model": LAW, "per_token": True, "overlap": True, "window": 48, "stride": 16}
    whole = caller.call(lambda client: client.score(TEXTS, **options))
    events = caller.events(lambda client: client.stream_score(TEXTS, **options))
    assert set().union(*map(undeclared, events)) == set()
    last = events[-1]
    assert isinstance(last, kc.ScoreTotalEvent)
    assert (last.model, last.system_fingerprint, last.total) == (whole.model, whole.system_fingerprint, whole.total)
    results = {event.index: event for event in events if isinstance(event, kc.ScoreResultEvent)}
    assert [results[index].model_dump(exclude={"object"}) for index in range(len(TEXTS))] == [
        result.model_dump() for result in whole.results
    ]
    for event in events:
        if isinstance(event, kc.ScoreProgress):
            assert (event.texts, event.tokens) == (len(TEXTS), whole.total.tokens)
            assert event.texts_done <= event.texts
            assert event.tokens_done <= event.tokens


def test_a_slow_score_shows_its_progress(caller: StreamingCaller, live_server: LiveServer) -> None:
    texts = [f"{text} {index}" for index in range(10) for text in TEXTS]
    with before_each_pass(live_server.lm, lambda: time.sleep(0.05)):
        events = caller.events(lambda client: client.stream_score(texts, model=LM, window=32, stride=8))
    done = [event.tokens_done for event in events if isinstance(event, kc.ScoreProgress)]
    assert len(done) > 1
    assert done == sorted(done)


def test_leaving_a_streamed_score_early_ends_the_job(caller: StreamingCaller, live_server: LiveServer) -> None:
    texts = [f"{text} {index}" for index in range(200) for text in TEXTS]
    with before_each_pass(live_server.lm, lambda: time.sleep(0.05)):  # over ten seconds to the end
        assert caller.events(lambda client: client.stream_score(texts, model=LAW), leave_after=1)
        wait_until(live_server.is_idle, within_s=5)


def test_an_error_inside_a_streamed_score_is_the_clients_own(caller: StreamingCaller, live_server: LiveServer) -> None:
    passes = itertools.count(1)

    def fail_at_the_second() -> None:
        if next(passes) == 2:
            raise RuntimeError("an inside that nobody may see")

    with before_each_pass(live_server.lm, fail_at_the_second), pytest.raises(kc.EngineFailure) as caught:
        caller.events(lambda client: client.stream_score(TEXTS * 100, model=LM, window=16, stride=4))
    assert "inside" not in str(caught.value)


BAD_SCORES: dict[str, tuple[Operation, type[kc.APIError], int]] = {
    "a document without a datastore": (
        lambda c: c.score([DocumentInput(document_id="new-1")], model=LM), kc.InvalidRequest, 400,
    ),
    "a document that is not there": (
        lambda c: c.score([DocumentInput(document_id="old-1")], model=LAW), kc.DatastoreNotFound, 404,
    ),
    "overlap with nothing": (lambda c: c.score(["x y"], model=LM, overlap=True), kc.InvalidRequest, 400),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SCORES)
def test_a_bad_score_raises_the_clients_own_error(caller: StreamingCaller, case: str) -> None:
    operation, kind, status = BAD_SCORES[case]
    with pytest.raises(kind) as caught:
        caller.call(operation)
    assert caught.value.status == status


def test_a_bad_streamed_score_is_refused_before_it_begins(caller: StreamingCaller) -> None:
    need = (kc.ModelNotFound, 404, "model_not_found", "model", "'gpt-5'")
    fails(lambda: caller.events(lambda client: client.stream_score(["x"], model="gpt-5")), *need)


# -- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_neighbours_are_the_servers_own_answer_field_by_field(
    caller: StreamingCaller, live_server: LiveServer, lm: HuggingFaceLM, form: str
) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    given: Any = {"text": PROMPT, "texts": [PROMPT, OTHER], "ids": ids, "lists of ids": [ids, ids[:3]]}[form]
    knn = KnnOptions(k=12, temperature=15.0, lmbda=0.4)
    answer = caller.call(lambda client: client.neighbors(given, model=LAW, knn=knn, limit=5, context_chars=30))
    body = {"model": LAW, "input": given, "knn": {"k": 12, "temperature": 15.0, "lambda": 0.4}}
    response = live_server.post("/v1/neighbors", body | {"limit": 5, "context_chars": 30})
    assert response.status_code == 200, response.text
    assert written(answer) == response.json()
    assert undeclared(answer) == set()
    assert answer.results[0].tokens == len(ids)
    for result in answer.results:
        assert 1 <= len(result.neighbors) <= 5
        distances = [neighbor.distance for neighbor in result.neighbors]
        assert distances == sorted(distances)
        assert sum(neighbor.weight for neighbor in result.neighbors) <= 1 + 1e-5
        for neighbor in result.neighbors:
            assert len(neighbor.before) <= 30
            assert len(neighbor.text) == neighbor.char_end - neighbor.char_start
        for token in result.next_tokens:
            assert token.p == pytest.approx(0.4 * token.p_knn + 0.6 * token.p_lm, abs=1e-5)


def test_the_next_tokens_of_neighbours_are_those_of_a_completions_trace(caller: StreamingCaller) -> None:
    knn = KnnOptions(k=12, temperature=15.0, lmbda=0.95)  # so that the likeliest token is a retrieved one
    shown = caller.call(lambda client: client.neighbors(PROMPT, model=LAW, knn=knn, limit=100))
    traced = caller.call(
        lambda client: client.completions(
            PROMPT, model=LAW, max_tokens=1, temperature=0, knn=knn.model_copy(update={"trace": True})
        )
    )
    (entry,) = traced.choices[0].knn
    assert {neighbor.entry_id for neighbor in entry.neighbors} <= {n.entry_id for n in shown.results[0].neighbors}
    (token,) = [token for token in shown.results[0].next_tokens if token.token_id == entry.token_id]
    assert token.p_knn > 0
    assert (token.p_knn, token.p_lm, token.p) == pytest.approx((entry.p_knn, entry.p_lm, entry.p), abs=1e-5)


def test_excluded_documents_are_no_neighbours(caller: StreamingCaller) -> None:
    def found(**options: Any) -> set[str]:
        answer = caller.call(lambda client: client.neighbors(PROMPT, model=LAW, limit=10, **options))
        return {neighbor.document_id for neighbor in answer.results[0].neighbors}

    excluded, *_ = sorted(found())
    assert excluded not in found(exclude_documents=[excluded])


def test_without_a_datastore_there_are_no_neighbours(caller: StreamingCaller) -> None:
    with pytest.raises(kc.InvalidRequest) as caught:
        caller.call(lambda client: client.neighbors(PROMPT, model=LM))
    assert caught.value.status == 400


# -- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PROMPT, "The café’s landlord 🙂 你好", ""])
def test_a_text_comes_back_from_its_tokens(caller: StreamingCaller, lm: HuggingFaceLM, text: str) -> None:
    answer = caller.call(lambda client: client.tokenize(text, return_token_strs=True))
    assert answer.tokens == lm.tokenizer.encode(text)
    assert answer.count == len(answer.tokens) == len(answer.token_strs)
    assert answer.max_model_len == 256
    assert undeclared(answer) == set()
    assert caller.call(lambda client: client.detokenize(answer.tokens)) == text


def test_token_texts_are_given_only_when_asked_for(caller: StreamingCaller) -> None:
    assert caller.call(lambda client: client.tokenize(PROMPT, model=LM)).token_strs is None


def test_the_tokenizer_describes_itself(caller: StreamingCaller, live_server: LiveServer, lm: HuggingFaceLM) -> None:
    info = caller.call(lambda client: client.tokenizer_info())
    assert written(info) == live_server.http.get("/tokenizer_info").json()
    assert undeclared(info) == set()
    assert (info.vocab_size, info.model_max_length) == (len(lm.tokenizer), 256)
    assert (info.eos_token, info.add_bos_token) == ("<|end|>", False)


def test_an_id_that_the_vocabulary_lacks_is_refused(caller: StreamingCaller) -> None:
    with pytest.raises(kc.InvalidParameter, match="512"):
        caller.call(lambda client: client.detokenize([512]))


# -- state -----------------------------------------------------------------------------------------------------------


def test_a_busy_server_says_how_busy(caller: StreamingCaller, live_server: LiveServer) -> None:
    idle = caller.call(lambda client: client.ready())
    assert (idle.model, idle.datastores, idle.running, idle.waiting, idle.scoring) == (LM, ["law", "news"], 0, 0, 0)
    assert undeclared(idle) == set()
    with Brake(live_server.lm) as brake, ThreadPoolExecutor(1) as pool:
        running = pool.submit(live_server.complete, PROMPT, max_tokens=2)
        brake.wait_held()
        busy = caller.call(lambda client: client.ready())
        assert (busy.running, busy.waiting, busy.scoring) == (1, 0, 0)
        brake.release()
        assert running.result()
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go_on.wait(TIMEOUT_S)

    with before_each_pass(live_server.lm, hold), ThreadPoolExecutor(1) as pool:
        scored = pool.submit(live_server.score, TEXTS, model=LM)
        assert held.wait(TIMEOUT_S)
        busy = caller.call(lambda client: client.ready())
        go_on.set()
        assert (busy.running, busy.waiting, busy.scoring) == (0, 0, 1)
        assert scored.result()


def test_what_is_published_but_not_loaded_is_named(
    kind: Callable[..., StreamingCaller], start_server: Start, published: Published
) -> None:
    server = start_server(datastores=published.root, load=("news",))
    caller = kind(server.url)
    try:
        listed = caller.call(lambda client: client.datastores.list())
        assert ([store.name for store in listed], listed.published) == (["news"], ("law",))
        assert undeclared(listed[0]) == set()
    finally:
        caller.close()


# -- several datastores, and where answers come from -------------------------------------------------------------------


def test_the_client_mixes_datastores_and_reads_attributions(chatting: StreamingCaller) -> None:
    stores = [kc.WeightedDatastore(name="law", weight=3), kc.WeightedDatastore(name="news", weight=1)]
    knn = KnnOptions(datastore=stores, k=8, temperature=12.0, lmbda=0.6, mixture="distributions", attribution=True)
    options = {"model": "tiny-lm", "max_tokens": 4, "seed": 3, "knn": knn}

    def check(attribution: kc.AnswerAttribution | None, tokens: list[kc.TokenAttribution | None]) -> None:
        assert attribution is not None
        shares = [document.share for document in attribution.documents]
        assert attribution.model + sum(shares) == pytest.approx(1, abs=1e-6)
        assert sum(attribution.licences.values()) == pytest.approx(sum(shares), abs=1e-6)
        assert attribution.model == pytest.approx(sum(token.model for token in tokens if token) / len(tokens))
        spans = [span for token in tokens if token for source in token.sources for span in source.spans]
        assert spans
        assert all(start < end for start, end in spans)

    completion = chatting.call(lambda client: client.completions(PROMPT, **options))
    assert completion.model == "tiny-lm@law+news"
    assert undeclared(completion) == set()
    choice = completion.choices[0]
    assert [(s.name, s.weight, s.lmbda) for s in choice.knn[0].datastores] == [("law", 0.75, 0.6), ("news", 0.25, 0.6)]
    assert {near.datastore for entry in choice.knn for near in entry.neighbors} <= {"law", "news"}
    check(choice.attribution, [entry.attribution for entry in choice.knn])

    answer = chatting.call(lambda client: client.chat(ASK, **options)).choices[0]
    check(answer.attribution, [entry.attribution for entry in answer.knn])
    chunks = chatting.events(lambda client: client.stream_chat(ASK, **options))
    parts = [choice for chunk in chunks for choice in chunk.choices]
    assert set().union(*map(undeclared, chunks)) == set()
    assert [part.attribution for part in parts if part.attribution] == [answer.attribution]
    (result,) = chatting.call(lambda client: client.score(PROMPT, model="tiny-lm", per_token=True, knn=knn)).results
    check(result.attribution, [token.attribution for token in result.per_token])
    found = chatting.call(lambda client: client.neighbors(PROMPT, model="tiny-lm@law+news", limit=100))
    near = found.results[0].neighbors
    assert {neighbor.datastore for neighbor in near} == {"law", "news"}
