"""Both clients against the real server over a real socket: every operation, every error that a server can send."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
from live_server import Brake, LiveServer, slowed, wait_until
from pydantic import BaseModel
from small_stores import Published, Start

import knnlm_client as kc
from knnlm_client import AsyncClient, Client, CompletionChunk, KnnOptions, StreamOptions, WeightedDatastore
from knnlm_core.datastore import layout
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_server.engine import engine as engine_module
from knnlm_server.settings import ServerSettings
from knnlm_server.telemetry.logs import TextFormatter

LM = "tiny-lm"
LAW = "tiny-lm@law"
PROMPT = "1. new: The tenant may"
OTHER = "Der Käufer schuldet"
TIMEOUT_S = 30.0

# What a test does with a client. Of an AsyncClient it returns an awaitable.
Operation = Callable[[Any], Any]
# Sees each chunk of a stream; true means: leave it here.
Take = Callable[[CompletionChunk], object]


class Caller(Protocol):
    """A client of either kind, for tests that do not care which."""

    def call(self, operation: Operation) -> Any:
        """What one operation returns."""

    def together(self, operations: Sequence[Operation]) -> list[Any]:
        """What operations return that run at the same time, over one client."""

    def stream(self, take: Take, prompt: kc.Prompt, **options: Any) -> None:
        """Read a streamed completion as the documentation says: in a with block."""

    def close(self) -> None: ...


class SyncCaller:
    def __init__(self, url: str, **keys: str) -> None:
        self._client = Client(url, timeout=TIMEOUT_S, **keys)

    def call(self, operation: Operation) -> Any:
        return operation(self._client)

    def together(self, operations: Sequence[Operation]) -> list[Any]:
        with ThreadPoolExecutor(len(operations)) as pool:
            return list(pool.map(self.call, operations))

    def stream(self, take: Take, prompt: kc.Prompt, **options: Any) -> None:
        with self._client.stream_completions(prompt, **options) as chunks:
            for chunk in chunks:
                if take(chunk):
                    break

    def close(self) -> None:
        self._client.close()


class AsyncCaller:
    def __init__(self, url: str, **keys: str) -> None:
        self._loop = asyncio.Runner()
        self._client = AsyncClient(url, timeout=TIMEOUT_S, **keys)

    def call(self, operation: Operation) -> Any:
        return self.together([operation])[0]

    def together(self, operations: Sequence[Operation]) -> list[Any]:
        async def run() -> list[Any]:
            started: list[Awaitable[Any]] = [operation(self._client) for operation in operations]
            return await asyncio.gather(*started)

        return self._loop.run(run())

    def stream(self, take: Take, prompt: kc.Prompt, **options: Any) -> None:
        async def run() -> None:
            async with self._client.stream_completions(prompt, **options) as chunks:
                async for chunk in chunks:
                    if take(chunk):
                        break

        self._loop.run(run())

    def close(self) -> None:
        self._loop.run(self._client.aclose())
        self._loop.close()


Connect = Callable[..., Caller]


@pytest.fixture(params=[SyncCaller, AsyncCaller], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes clients, of one kind in each of two runs of a test."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with ExitStack() as open_clients:

        def connect(server: LiveServer, **keys: str) -> Caller:
            caller: Caller = request.param(server.url, **keys)
            open_clients.callback(caller.close)
            return caller

        yield connect


@pytest.fixture
def caller(connect: Connect, live_server: LiveServer) -> Caller:
    return connect(live_server)


def collect(caller: Caller, prompt: kc.Prompt, **options: Any) -> list[CompletionChunk]:
    """All chunks of a stream."""
    chunks: list[CompletionChunk] = []
    caller.stream(chunks.append, prompt, **options)
    return chunks


def written(answer: BaseModel) -> dict[str, Any]:
    """The JSON that a typed answer was read from."""
    return answer.model_dump(mode="json", by_alias=True, exclude_unset=True)


def undeclared(answer: BaseModel) -> set[str]:
    """Fields that the server has sent and the client's classes do not declare, at any depth."""
    found = {f"{type(answer).__name__}.{name}" for name in answer.model_extra or {}}
    for name in type(answer).model_fields:
        value = getattr(answer, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, BaseModel):
                found |= undeclared(part)
    return found


def same_but_for_the_request(one: dict[str, Any], other: dict[str, Any]) -> bool:
    own = {"id", "created"}
    return {k: v for k, v in one.items() if k not in own} == {k: v for k, v in other.items() if k not in own}


# -- completions -----------------------------------------------------------------------------------------------------

# what the caller writes → what must go over the wire, spelled out
COMPLETIONS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "greedy": (PROMPT, {"temperature": 0, "max_tokens": 12}, {"temperature": 0, "max_tokens": 12}),
    "token ids": ([5, 17, 301], {"temperature": 0, "max_tokens": 4}, {"temperature": 0, "max_tokens": 4}),
    "several prompts, n each": (
        [PROMPT, OTHER],
        {"n": 2, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "seed": 7, "max_tokens": 8},
        {"n": 2, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "seed": 7, "max_tokens": 8},
    ),
    "biases, penalties, no end": (
        [[5, 17, 301], [4, 4]],
        {"temperature": 0, "logit_bias": {0: 50.0, 7: 4}, "ignore_eos": True, "presence_penalty": 1.0,
         "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 2, "skip_special_tokens": False},
        {"temperature": 0, "logit_bias": {"0": 50.0, "7": 4}, "ignore_eos": True, "presence_penalty": 1.0,
         "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 2, "skip_special_tokens": False},
    ),
    "logprobs of the mixture": (
        PROMPT,
        {"model": LAW, "temperature": 0, "logprobs": 4, "knn": KnnOptions(lmbda=0.6, k=9, temperature=12.5)},
        {"model": LAW, "temperature": 0, "logprobs": 4, "knn": {"lambda": 0.6, "k": 9, "temperature": 12.5}},
    ),
    "trace of a named datastore": (
        PROMPT,
        {"temperature": 0, "max_tokens": 6, "knn": KnnOptions(datastore="news", trace=True, gate="always")},
        {"temperature": 0, "max_tokens": 6, "knn": {"datastore": "news", "trace": True, "gate": "always"}},
    ),
    "no search": (
        PROMPT,
        {"model": LAW, "temperature": 0, "knn": KnnOptions(gate="never", trace=True)},
        {"model": LAW, "temperature": 0, "knn": {"gate": "never", "trace": True}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_completion_is_the_servers_own_answer_field_by_field(
    caller: Caller, live_server: LiveServer, case: str
) -> None:
    prompt, options, body = COMPLETIONS[case]
    response = live_server.post("/v1/completions", {"model": LM, "prompt": prompt, **body})
    answer = caller.call(lambda client: client.completions(prompt, **{"model": LM, **options}))
    assert same_but_for_the_request(written(answer), response.json())
    assert undeclared(answer) == set()


def test_stop_strings_cut_the_text(caller: Caller) -> None:
    def complete(**options: Any) -> kc.CompletionChoice:
        knn = KnnOptions(lmbda=0.95)
        answer = caller.call(
            lambda client: client.completions(PROMPT, model=LAW, temperature=0, max_tokens=40, knn=knn, **options)
        )
        (choice,) = answer.choices
        return choice

    whole = complete()
    stop = whole.text[10:13]
    assert len(stop) == 3
    assert "\ufffd" not in stop, "choose another prompt: half a character is no text to stop at"
    cut = complete(stop=["never in it", stop])
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    kept = complete(stop=stop, include_stop_str_in_output=True)
    assert kept.text == cut.text + stop


def test_logprobs_trace_and_usage_agree_in_an_answer(caller: Caller, live_server: LiveServer) -> None:
    knn = KnnOptions(lmbda=0.4, k=3, temperature=20.0, trace=True)
    answer = caller.call(
        lambda client: client.completions(PROMPT, model=LAW, temperature=0, max_tokens=9, logprobs=2, knn=knn)
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.knn is not None
    assert answer.usage.knn is not None
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith(f"{live_server.lm.identity.model_fingerprint}-law:")
    assert answer.usage.completion_tokens == answer.usage.knn.searched == len(choice.knn) == 9
    assert [entry.token for entry in choice.knn] == choice.logprobs.tokens
    for entry in choice.knn:
        assert entry.lmbda == pytest.approx(0.4)
        assert entry.p_knn is not None
        assert entry.p == pytest.approx(0.4 * entry.p_knn + 0.6 * entry.p_lm, abs=1e-5)
        assert 1 <= len(entry.neighbors) <= 3
        assert sum(neighbor.weight for neighbor in entry.neighbors) == pytest.approx(1, abs=1e-5)
        assert {(neighbor.document_id or "")[:4] for neighbor in entry.neighbors} == {"new-"}


def test_one_client_carries_requests_at_the_same_time(caller: Caller) -> None:
    def complete(seed: int) -> Operation:
        return lambda client: client.completions(PROMPT, model=LAW, max_tokens=12, temperature=1.5, seed=seed)

    alone = [caller.call(complete(seed)).choices for seed in range(6)]
    together = [answer.choices for answer in caller.together([complete(seed) for seed in range(6)])]
    assert together == alone
    assert len({choices[0].text for choices in alone}) == 6


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_answer_in_pieces(caller: Caller, live_server: LiveServer) -> None:
    options: dict[str, Any] = {
        "model": LAW, "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 20, "logprobs": 1,
        "knn": KnnOptions(lmbda=0.6, trace=True),
    }  # fmt: skip
    whole = caller.call(lambda client: client.completions([PROMPT, OTHER], **options))
    with slowed(live_server.lm, 0.02):  # a reader that is slow gets several tokens in one chunk
        chunks = collect(caller, [PROMPT, OTHER], stream_options=StreamOptions(include_usage=True), **options)
    *pieces, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in pieces)
    assert {chunk.id for chunk in chunks} != {whole.id}
    assert len({chunk.id for chunk in chunks}) == 1
    assert {(chunk.model, chunk.system_fingerprint) for chunk in chunks} == {(LAW, whole.system_fingerprint)}
    assert set().union(*map(undeclared, chunks)) == set()
    for need in whole.choices:
        parts = [choice for chunk in pieces for choice in chunk.choices if choice.index == need.index]
        assert len(parts) > 1
        assert "".join(part.text for part in parts) == need.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [need.finish_reason]
        assert [entry for part in parts for entry in part.knn or []] == need.knn
        assert need.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            values = [value for part in parts for value in getattr(part.logprobs, name)]
            assert values == getattr(need.logprobs, name), name


def test_leaving_a_stream_early_frees_the_servers_slot(caller: Caller, live_server: LiveServer) -> None:
    def running() -> int:
        return int(live_server.http.get("/ready").json()["running"])

    seen: list[tuple[str, int, int]] = []

    def leave_at_the_third(chunk: CompletionChunk) -> bool:
        seen.append((chunk.choices[0].text, running(), live_server.leases()))
        return len(seen) == 3

    # Takes over ten seconds to the end, so that only leaving can have ended it.
    options = {"model": LAW, "max_tokens": 200, "ignore_eos": True, "temperature": 0, "logprobs": 0}
    with slowed(live_server.lm, 0.05):
        caller.stream(leave_at_the_third, PROMPT, **options)
        assert [(requests, leases) for _, requests, leases in seen] == [(1, 1)] * 3
        wait_until(lambda: running() == 0, within_s=5)
        wait_until(live_server.is_idle, within_s=5)
    # The client is as good as new.
    whole = caller.call(lambda client: client.completions(PROMPT, **{**options, "max_tokens": 3}))
    assert whole.choices[0].text.startswith("".join(text for text, _, _ in seen))


# -- score -----------------------------------------------------------------------------------------------------------

TEXTS = ["3. new: Der Käufer schuldet the goods. " * 3, "The café’s landlord must keep its value 🙂."]


@pytest.mark.parametrize("per_token", [False, True])
def test_a_score_is_the_servers_own_answer_field_by_field(
    caller: Caller, live_server: LiveServer, per_token: bool
) -> None:
    knn = KnnOptions(k=12, temperature=15.0, lmbda=0.4)
    answer = caller.call(
        lambda client: client.score(
            TEXTS, model=LAW, knn=knn, per_token=per_token, window=48, stride=16, exclude_documents=["new-3"]
        )
    )
    wire = {"k": 12, "temperature": 15.0, "lambda": 0.4}
    need = live_server.score(
        TEXTS, model=LAW, knn=wire, per_token=per_token, window=48, stride=16, exclude_documents=["new-3"]
    )
    assert written(answer) == need
    assert undeclared(answer) == set()
    without = caller.call(lambda client: client.score(TEXTS, model=LAW, knn=knn, window=48, stride=16))
    assert without.total.base == answer.total.base
    assert without.total.mixed != answer.total.mixed
    for result in answer.results:
        assert result.tokens > 0
        assert (result.per_token is not None) == per_token
        for token in result.per_token or ():
            assert token.lmbda == pytest.approx(0.4)
            assert token.decision == "always"


def test_token_ids_score_as_their_text_does(caller: Caller, lm: HuggingFaceLM) -> None:
    ids = [lm.tokenizer.encode(text) for text in TEXTS]
    text = caller.call(lambda client: client.score(TEXTS, model=LAW, per_token=True))
    tokens = caller.call(lambda client: client.score(ids, model=LAW, per_token=True))
    assert tokens.total == text.total
    for by_text, by_ids, token_ids in zip(text.results, tokens.results, ids, strict=True):
        assert (by_ids.base, by_ids.mixed, by_ids.bytes) == (by_text.base, by_text.mixed, by_text.bytes)
        assert by_text.per_token is not None
        assert by_ids.per_token is not None
        assert [token.id for token in by_ids.per_token] == token_ids[1:]
        assert [token.model_copy(update={"offset": None}) for token in by_text.per_token] == by_ids.per_token
        assert all(token.offset is not None for token in by_text.per_token)


# -- models, health, datastores --------------------------------------------------------------------------------------


def test_models_are_the_lm_and_its_datastores(caller: Caller, live_server: LiveServer) -> None:
    cards = caller.call(lambda client: client.models())
    assert [(card.id, card.parent, card.datastore) for card in cards] == [
        (LM, None, None),
        (LAW, LM, "law"),
        ("tiny-lm@news", LM, "news"),
    ]
    assert [written(card) for card in cards] == live_server.http.get("/v1/models").json()["data"]
    assert set().union(*map(undeclared, cards)) == set()
    for card in cards:  # each may be given as `model`
        assert caller.call(lambda client, name=card.id: client.completions("A", model=name, max_tokens=1)).choices


def test_a_server_that_serves_is_healthy_and_ready(caller: Caller) -> None:
    for ask in (lambda client: client.health(), lambda client: client.ready()):
        status = caller.call(ask)
        assert status
        assert (status.ok, status.reason) == (True, None)


def test_a_datastore_is_loaded_swapped_unloaded_and_loaded_again(
    connect: Connect, start_server: Start, published: Published
) -> None:
    server = start_server(datastores=published.root, load=("news",))
    caller = connect(server)

    def names() -> list[str]:
        return [store.name for store in caller.call(lambda client: client.datastores.list())]

    def models() -> list[str]:
        return [card.id for card in caller.call(lambda client: client.models())]

    def fingerprint() -> str:
        knn = KnnOptions(k=8, temperature=10.0, lmbda=0.5)
        answer = caller.call(lambda client: client.completions(PROMPT, model=LAW, max_tokens=1, knn=knn))
        assert answer.model == LAW
        return str(answer.system_fingerprint).partition("-")[2]

    assert (names(), models()) == (["news"], [LM, "tiny-lm@news"])
    with pytest.raises(kc.DatastoreNotFound):
        caller.call(lambda client: client.datastores.get("law"))

    loaded = caller.call(lambda client: client.datastores.load("law"))
    assert (loaded.version, loaded.generation, loaded.state, loaded.leases) == (published.law_new, 1, "ready", 0)
    assert (names(), models()) == (["law", "news"], [LM, LAW, "tiny-lm@news"])
    got = caller.call(lambda client: client.datastores.get("law"))
    assert got == loaded == caller.call(lambda client: client.datastores.list())[0]
    assert written(got) == server.http.get("/v1/datastores/law").json()
    assert undeclared(got) == set()
    assert got.calibration is not None
    assert fingerprint() == f"law:{published.law_new}:1.0"

    swapped = caller.call(lambda client: client.datastores.load("law", published.law_old))
    assert (swapped.version, swapped.generation) == (published.law_old, 2)
    assert fingerprint() == f"law:{published.law_old}:2.0"

    assert caller.call(lambda client: client.datastores.unload("law")) is None
    assert (names(), models()) == (["news"], [LM, "tiny-lm@news"])
    for use in (
        lambda client: client.completions(PROMPT, model=LAW),
        lambda client: client.score([PROMPT], model=LAW),
        lambda client: client.datastores.get("law"),
        lambda client: client.datastores.unload("law"),
    ):
        with pytest.raises(kc.DatastoreNotFound):
            caller.call(use)

    again = caller.call(lambda client: client.datastores.load("law"))
    assert (again.version, again.generation) == (published.law_new, 3)
    assert fingerprint() == f"law:{published.law_new}:3.0"


# -- errors ----------------------------------------------------------------------------------------------------------


def fails(
    operation: Callable[[], object], kind: type[kc.APIError], status: int, code: str, param: str | None, words: str
) -> kc.APIError:
    """The error of the client's that an operation must raise: of exactly this class."""
    with pytest.raises(kc.APIError) as caught:
        operation()
    error = caught.value
    assert type(error) is kind, error
    assert (error.status, error.code, error.param) == (status, code, param), error
    assert words in error.message
    assert error.message in str(error)
    assert error.type
    assert error.request_id
    return error


KNN = "invalid_knn_params"
PARAMETER = "invalid_parameter"

# options over a completion of the plain LM, class, status, code, param, words of the message
BAD_COMPLETIONS: list[tuple[dict[str, Any], type[kc.APIError], int, str, str, str]] = [
    ({"model": "gpt-5"}, kc.ModelNotFound, 404, "model_not_found", "model", "'gpt-5'"),
    ({"model": "tiny-lm@"}, kc.ModelNotFound, 404, "model_not_found", "model", "names no datastore"),
    ({"model": "tiny-lm@nope"}, kc.DatastoreNotFound, 404, "datastore_not_found", "knn.datastore", "'nope'"),
    ({"knn": KnnOptions(datastore="nope")}, kc.DatastoreNotFound, 404, "datastore_not_found", "knn.datastore", "nope"),
    ({"model": LAW, "knn": KnnOptions(datastore="news")}, kc.InvalidParameter, 400, PARAMETER, "knn.datastore", "law"),
    ({"knn": KnnOptions(k=4)}, kc.InvalidParameter, 400, PARAMETER, "knn.k", "needs a datastore"),
    ({"model": LAW, "knn": KnnOptions(k=0)}, kc.InvalidKnnParams, 400, KNN, "knn.k", "got 0"),
    ({"model": LAW, "knn": KnnOptions(lmbda=2)}, kc.InvalidKnnParams, 400, KNN, "knn.lambda", "got 2"),
    ({"model": LAW, "knn": KnnOptions(temperature=0)}, kc.InvalidKnnParams, 400, KNN, "knn.temperature", "got 0"),
    ({"model": LAW, "knn": KnnOptions(gate="sometimes")}, kc.InvalidKnnParams, 400, KNN, "knn.gate", "'sometimes'"),
    (
        {"knn": KnnOptions(datastore=[WeightedDatastore(name="law", weight=1), WeightedDatastore(name="news")])},
        kc.InvalidKnnParams, 400, KNN, "knn.datastore", "to all datastores or to none, got 1 of 2",
    ),
    (
        {"model": LAW, "knn": KnnOptions(speculate=True)},
        kc.UnsupportedFeature, 400, "unsupported_feature", "knn.speculate", "--draft-tokens 0",
    ),
    ({"temperature": -1}, kc.InvalidParameter, 400, PARAMETER, "temperature", "got -1"),
    ({"top_p": 1.5}, kc.InvalidParameter, 400, PARAMETER, "top_p", "got 1.5"),
    ({"n": 9}, kc.InvalidParameter, 400, PARAMETER, "n", "got 9"),
    ({"max_tokens": 0}, kc.InvalidParameter, 400, PARAMETER, "max_tokens", "got 0"),
    ({"logprobs": 21}, kc.InvalidParameter, 400, PARAMETER, "logprobs", "got 21"),
    ({"stop": ["x"] * 33}, kc.InvalidParameter, 400, PARAMETER, "stop", "at most 32"),
    ({"logit_bias": {512: 1.0}}, kc.InvalidParameter, 400, PARAMETER, "logit_bias", "got 512"),
    ({"prompt": ""}, kc.InvalidParameter, 400, PARAMETER, "prompt", "at least 1 token"),
    ({"prompt": [512]}, kc.InvalidParameter, 400, PARAMETER, "prompt", "token id 512"),
    ({"max_tokens": 256}, kc.PromptTooLong, 400, "context_length_exceeded", "max_tokens", "at most 256"),
    ({"prompt": [1] * 256}, kc.PromptTooLong, 400, "context_length_exceeded", "prompt", "256 + 16 = 272"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMPLETIONS, ids=lambda case: str(case[0])[:50])
def test_a_bad_completion_raises_the_clients_own_error(
    caller: Caller, case: tuple[dict[str, Any], type[kc.APIError], int, str, str, str]
) -> None:
    changes, *need = case
    options = {"prompt": PROMPT, "model": LM, **changes}
    fails(lambda: caller.call(lambda client: client.completions(**options)), *need)
    fails(lambda: collect(caller, **options), *need)


BAD_OTHERS: dict[str, tuple[Operation, type[kc.APIError], int, str, str | None, str]] = {
    "score with another model": (
        lambda client: client.score(["x"], model="gpt-5"),
        kc.ModelNotFound, 404, "model_not_found", "model", "'gpt-5'",
    ),
    "score nothing": (lambda client: client.score([], model=LM), kc.InvalidParameter, 400, PARAMETER, "input", "got 0"),
    "score in a window beyond the context": (
        lambda client: client.score(["x y"], model=LM, window=257),
        kc.InvalidParameter, 400, PARAMETER, "window", "257",
    ),
    "score with a bad λ": (
        lambda client: client.score(["x"], model=LAW, knn=KnnOptions(lmbda=-0.5)),
        kc.InvalidKnnParams, 400, KNN, "knn.lambda", "-0.5",
    ),
    "score without a document that is not there": (
        lambda client: client.score(["x"], model=LAW, exclude_documents=["old-1"]),
        kc.DocumentNotFound, 404, "document_not_found", "document", "old-1",
    ),
    "load a version that is no version": (
        lambda client: client.datastores.load("law", "latest"),
        kc.InvalidParameter, 400, PARAMETER, "version", "latest",
    ),
    "load a version that was never published": (
        lambda client: client.datastores.load("law", "0" * 16),
        kc.DatastoreNotFound, 404, "datastore_not_found", None, "0" * 16,
    ),
    "load a name that was never published": (
        lambda client: client.datastores.load("absent"),
        kc.DatastoreNotFound, 404, "datastore_not_found", None, "absent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OTHERS)
def test_what_else_is_wrong_raises_the_clients_own_error(caller: Caller, case: str) -> None:
    operation, *need = BAD_OTHERS[case]
    fails(lambda: caller.call(operation), *need)


@pytest.mark.parametrize("verb", ["get", "unload"])
def test_a_datastore_that_is_not_loaded_is_not_found(caller: Caller, verb: str) -> None:
    with pytest.raises(kc.DatastoreNotFound, match="'absent' is not loaded; loaded: law, news") as caught:
        caller.call(lambda client: getattr(client.datastores, verb)("absent"))
    assert (caught.value.status, caught.value.code) == (404, "datastore_not_found")


def test_a_store_that_does_not_fit_or_is_damaged_is_a_conflict(
    connect: Connect, start_server: Start, own_root: Path, published: Published
) -> None:
    server = start_server(datastores=own_root, load=("news",))
    caller = connect(server)
    version = own_root / "law" / published.law_new
    manifest = json.loads((version / layout.MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"]
    ours, manifest["lm"]["model_fingerprint"] = manifest["lm"]["model_fingerprint"], "0" * 32
    (version / layout.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    def load() -> Any:
        return caller.call(lambda client: client.datastores.load("law"))

    error = fails(load, kc.DatastoreMismatch, 409, "datastore_mismatch", "model_fingerprint", "0" * 32)
    assert ours in error.message
    (version / "shard-00000" / layout.KEYS).unlink()
    fails(load, kc.DatastoreCorrupt, 409, "datastore_corrupt", None, f"shard-00000/{layout.KEYS}")
    assert [store.name for store in caller.call(lambda client: client.datastores.list())] == ["news"]


def test_a_store_in_use_is_busy_until_its_last_request_has_ended(
    connect: Connect, start_server: Start, published: Published
) -> None:
    server = start_server(datastores=published.root, load=("news",), drain_timeout_s=0.1)
    caller = connect(server)

    def unload() -> Any:
        return caller.call(lambda client: client.datastores.unload("news"))

    body = {"prompt": PROMPT, "model": "tiny-lm@news", "max_tokens": 3, "ignore_eos": True}
    with Brake(server.lm) as brake, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", body)
        brake.wait_held()
        fails(unload, kc.DatastoreBusy, 409, "datastore_busy", None, "1 leases after 0.1 s")
        brake.release()
        assert running.result().json()["usage"]["completion_tokens"] == 3
    wait_until(server.is_idle)
    assert unload() is None


# -- keys and limits -------------------------------------------------------------------------------------------------

MAX_BODY_BYTES = 200_000

# name → (operation, whether it needs the admin key)
BEHIND_A_KEY: dict[str, tuple[Operation, bool]] = {
    "completions": (lambda client: client.completions("A", model=LM, max_tokens=1), False),
    "score": (lambda client: client.score(["A buyer"], model=LM), False),
    "models": (lambda client: client.models(), False),
    "datastores.list": (lambda client: client.datastores.list(), False),
    "datastores.get": (lambda client: client.datastores.get("news"), False),
    "datastores.load": (lambda client: client.datastores.load("news"), True),
}


@pytest.fixture(scope="module")
def guarded(published: Published) -> Iterator[LiveServer]:
    """Asks for keys and takes small bodies only."""
    settings = ServerSettings(
        model=str(published.model),
        datastores=published.root,
        load=("news",),
        max_sequences=2,
        max_body_bytes=MAX_BODY_BYTES,
        api_key="user-key",  # type: ignore[arg-type]
        admin_key="admin-key",  # type: ignore[arg-type]
    )
    with LiveServer(settings) as server:
        yield server


@pytest.mark.parametrize("keys", [{}, {"api_key": "wrong"}], ids=["no key", "a wrong key"])
def test_without_its_key_a_server_refuses_everything_but_its_state(
    connect: Connect, guarded: LiveServer, keys: dict[str, str]
) -> None:
    caller = connect(guarded, **keys)
    for operation, is_admin in BEHIND_A_KEY.values():
        if is_admin and keys:
            need = (kc.Forbidden, 403, "forbidden", None, "admin key")
        else:
            need = (kc.Unauthorized, 401, "invalid_api_key", None, "Authorization: Bearer")
        error = fails(lambda operation=operation: caller.call(operation), *need)
        assert "wrong" not in str(error)
    fails(lambda: collect(caller, "A", model=LM), kc.Unauthorized, 401, "invalid_api_key", None, "valid API key")
    assert caller.call(lambda client: client.health())
    assert caller.call(lambda client: client.ready())


def test_the_api_key_opens_all_but_changes_and_the_admin_key_those(connect: Connect, guarded: LiveServer) -> None:
    user, admin = connect(guarded, api_key="user-key"), connect(guarded, api_key="user-key", admin_key="admin-key")
    for operation, is_admin in BEHIND_A_KEY.values():
        assert admin.call(operation)
        if not is_admin:
            assert user.call(operation)
    for change in (lambda client: client.datastores.load("news"), lambda client: client.datastores.unload("news")):
        fails(lambda change=change: user.call(change), kc.Forbidden, 403, "forbidden", None, "admin key is needed")
    assert collect(user, "A", model="tiny-lm@news", max_tokens=1)


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 5_000_000])
def test_a_body_over_the_limit_is_too_large(connect: Connect, guarded: LiveServer, size: int) -> None:
    caller = connect(guarded, api_key="user-key")
    need = (kc.PayloadTooLarge, 413, "payload_too_large", None, f"at most {MAX_BODY_BYTES} bytes")
    fails(lambda: caller.call(lambda client: client.completions("x" * size, model=LM)), *need)
    fails(lambda: collect(caller, "x" * size, model=LM), *need)
    fails(lambda: caller.call(lambda client: client.score(["x" * size], model=LM)), *need)
    assert caller.call(lambda client: client.models())


# -- a server that cannot answer -------------------------------------------------------------------------------------


def test_a_starting_server_is_healthy_but_not_ready(
    connect: Connect, start_server: Start, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm_server import app

    go, load_lm = threading.Event(), app.load_lm

    def load_later(*args: Any) -> HuggingFaceLM:
        assert go.wait(TIMEOUT_S)
        return load_lm(*args)

    monkeypatch.setattr(app, "load_lm", load_later)
    server = start_server(wait=False, datastores=published.root, load=("news",))
    try:
        caller = connect(server)
        status = caller.call(lambda client: client.ready())
        assert not status
        assert "waiting for the model" in status.reason
        assert caller.call(lambda client: client.health())
        for operation, _ in BEHIND_A_KEY.values():
            need = (kc.NotReady, 503, "not_ready", None, "waiting for the model")
            error = fails(lambda operation=operation: caller.call(operation), *need)
            assert error.retry_after_s == 1
        fails(lambda: collect(caller, "A", model=LM), kc.NotReady, 503, "not_ready", None, "waiting for the model")
    finally:
        go.set()
    server.wait_ready()
    assert caller.call(lambda client: client.ready())


def test_a_server_that_cannot_start_says_why(connect: Connect, start_server: Start, published: Published) -> None:
    server = start_server(wait=False, model=str(published.model / "missing"))
    wait_until(lambda: bool(server.failures))
    caller = connect(server)
    for ask in (lambda client: client.health(), lambda client: client.ready()):
        status = caller.call(ask)
        assert not status
        assert "missing" in status.reason
    fails(lambda: caller.call(lambda client: client.models()), kc.NotReady, 503, "not_ready", None, "missing")


def test_a_full_server_says_when_to_come_back(connect: Connect, start_server: Start) -> None:
    server = start_server(max_sequences=1, max_queued=1)
    caller = connect(server)
    need = (kc.Overloaded, 503, "overloaded", None, "at most 2 requests")
    with Brake(server.lm) as brake, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(server.complete, PROMPT, max_tokens=2) for _ in range(2)]
        brake.wait_held()
        wait_until(lambda: len(server.backend.engine._accepted) == 2)
        for operation in (BEHIND_A_KEY["completions"][0], BEHIND_A_KEY["score"][0]):
            error = fails(lambda operation=operation: caller.call(operation), *need)
            assert error.retry_after_s == 1
        fails(lambda: collect(caller, "A", model=LM), *need)
        brake.release()
        assert all(future.result() for future in accepted)
    assert caller.call(BEHIND_A_KEY["completions"][0])


def test_a_server_that_shuts_down_takes_nothing_new(connect: Connect, start_server: Start) -> None:
    server = start_server()
    caller = connect(server)
    server.service.closing = True  # as at its shutdown, while connections are still open
    need = (kc.ShuttingDown, 503, "shutting_down", None, "shutting down")
    fails(lambda: caller.call(BEHIND_A_KEY["completions"][0]), *need)
    fails(lambda: caller.call(BEHIND_A_KEY["models"][0]), *need)
    assert caller.call(lambda client: client.ready()).reason == "the server is shutting down"


# -- defects of the server's -----------------------------------------------------------------------------------------


def test_a_failed_step_is_the_engines_failure(
    caller: Caller, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step, steps = engine_module.run_step, 0

    def failing_at_the_third(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("an inside that nobody may see")
        return run_step(*args)

    monkeypatch.setattr(engine_module, "run_step", failing_at_the_third)
    words = "a step of the engine failed"
    need = (kc.EngineFailure, 500, "engine_failure", None, words)
    options: dict[str, Any] = {"model": LAW, "logprobs": 0, "max_tokens": 8, "ignore_eos": True}
    fails(lambda: caller.call(lambda client: client.completions(PROMPT, **options)), *need)

    steps, chunks = 0, list[CompletionChunk]()
    # The stream had begun with 200 when the step failed.
    need = (kc.EngineFailure, 200, "engine_failure", None, words)
    fails(lambda: caller.stream(chunks.append, PROMPT, **options), *need)
    assert sum(len(choice.logprobs.tokens) for chunk in chunks for choice in chunk.choices) == 2
    assert caller.call(lambda client: client.completions(PROMPT, **options))


def test_an_unforeseen_error_is_internal(
    caller: Caller, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> Any:
        raise RuntimeError("an inside that nobody may see")

    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(TextFormatter())
    with monkeypatch.context() as patch:
        patch.setattr(live_server.backend.registry, "statuses", failing)
        patch.setattr(logging.getLogger("knnlm_server"), "handlers", [handler])
        error = fails(
            lambda: caller.call(lambda client: client.models()),
            kc.InternalError,
            500,
            "internal_error",
            None,
            "internal",
        )
    assert "inside" not in str(error)
    told = next(line for line in log.getvalue().splitlines() if "unexpected error" in line)
    assert str(error.request_id) in told  # so that the log tells what the answer does not
    assert "an inside that nobody may see" in log.getvalue()
    assert caller.call(lambda client: client.models())
