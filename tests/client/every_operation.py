"""Every operation of the clients: the call, what must go over the wire, what must come back."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from contract_bodies import (
    CHAT,
    CHAT_CHUNKS,
    CHUNKS,
    COMPLETION,
    DATASTORE,
    LOAD_EVENTS,
    MODELS,
    NEIGHBORS,
    SCORE,
    SCORE_EVENTS,
    TOKENIZATION,
    TOKENIZER_INFO,
)

from knnlm_client import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatMessage,
    Completion,
    CompletionChunk,
    Datastore,
    DatastoreList,
    DocumentInput,
    KnnOptions,
    ModelCard,
    NeighborsOptions,
    NeighborsResponse,
    Readiness,
    ScoreOptions,
    ScoreResponse,
    ServerStatus,
    StreamChatOptions,
    StreamCompletionOptions,
    StreamOptions,
    TextPart,
    Tokenization,
    TokenizerInfo,
    WeightedDatastore,
)
from knnlm_client.responses import LoadEventBody, ScoreLine

ALL_COMPLETION_OPTIONS: StreamCompletionOptions = {
    "max_tokens": 8,
    "min_tokens": 1,
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "best_of": 3,
    "stop": ["\n", "."],
    "seed": 7,
    "logprobs": 2,
    "echo": True,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {11: -100.0},
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stop_token_ids": [2],
    "include_stop_str_in_output": True,
    "repetition_penalty": 1.25,
    "user": "me",
    "knn": KnnOptions(
        datastore=[WeightedDatastore(name="law", weight=0.75), WeightedDatastore(name="news", weight=0.25)],
        mixture="distributions",
        weights="given",
        k=16,
        temperature=10.0,
        lmbda=0.25,
        gate="always",
        gate_threshold=0.5,
        speculate=False,
        trace=True,
        attribution=True,
    ),
    "stream_options": StreamOptions(include_usage=True, continuous_usage_stats=True),
}
ALL_ON_THE_WIRE = ALL_COMPLETION_OPTIONS | {
    "logit_bias": {"11": -100.0},
    "knn": {
        "datastore": [{"name": "law", "weight": 0.75}, {"name": "news", "weight": 0.25}],
        "mixture": "distributions",
        "weights": "given",
        "k": 16,
        "temperature": 10.0,
        "lambda": 0.25,
        "gate": "always",
        "gate_threshold": 0.5,
        "speculate": False,
        "trace": True,
        "attribution": True,
    },
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
NOT_IN_CHAT = {"best_of", "logprobs", "echo"}
ALL_CHAT_OPTIONS: StreamChatOptions = {
    **{name: value for name, value in ALL_COMPLETION_OPTIONS.items() if name not in NOT_IN_CHAT},  # type: ignore[typeddict-item]
    "max_completion_tokens": 8,
    "logprobs": True,
    "top_logprobs": 2,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": {"enable_thinking": False, "date": None, "tags": ["law"]},
}
CHAT_ON_THE_WIRE = ALL_CHAT_OPTIONS | {name: ALL_ON_THE_WIRE[name] for name in ("logit_bias", "knn", "stream_options")}
MESSAGES: list[Any] = [
    ChatMessage(role="system", content=[TextPart(type="text", text="Be brief.")]),
    {"role": "user", "content": "Wer zahlt?", "name": "Ada"},
    AssistantMessage.model_validate(CHAT["choices"][0]["message"]),
    MappingProxyType({"role": "user", "content": [{"type": "text", "text": "Und wann?"}]}),
]
MESSAGES_ON_THE_WIRE = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": "Wer zahlt?", "name": "Ada"},
    {"role": "assistant", "content": "Der Käufer muß"},
    {"role": "user", "content": [{"type": "text", "text": "Und wann?"}]},
]
SCORE_OPTIONS: ScoreOptions = {
    "knn": KnnOptions(datastore="law"),
    "per_token": True,
    "overlap": True,
    "exclude_documents": ["act-7"],
    "window": 1024,
    "stride": 512,
}

NEIGHBORS_OPTIONS: NeighborsOptions = {
    "knn": KnnOptions(datastore=[WeightedDatastore(name="law"), WeightedDatastore(name="news")], k=64, lmbda=0.5),
    "limit": 3,
    "context_chars": 40,
    "exclude_documents": ["act-7"],
}

# name → (the call on either client, method, path, body on the wire, answer)
OPERATIONS: dict[str, tuple[Callable[[Any], Any], str, str, Any, Any]] = {
    "completions": (
        lambda c: c.completions("The", model="smollm2@law", max_tokens=1),
        "POST",
        "/v1/completions",
        {"prompt": "The", "model": "smollm2@law", "max_tokens": 1},
        Completion.model_validate(COMPLETION),
    ),
    "completions with every option": (
        lambda c: c.completions([[1, 2], [3]], model="smollm2", **ALL_COMPLETION_OPTIONS),
        "POST",
        "/v1/completions",
        {"prompt": [[1, 2], [3]], "model": "smollm2", **ALL_ON_THE_WIRE},
        Completion.model_validate(COMPLETION),
    ),
    "score": (
        lambda c: c.score(["The buyer shall pay."], model="smollm2", **SCORE_OPTIONS),
        "POST",
        "/v1/score",
        {"input": ["The buyer shall pay."], "model": "smollm2", **SCORE_OPTIONS, "knn": {"datastore": "law"}},
        ScoreResponse.model_validate(SCORE),
    ),
    "score of documents": (
        lambda c: c.score([DocumentInput(document_id="act-7")], model="smollm2@law"),
        "POST",
        "/v1/score",
        {"input": [{"document_id": "act-7"}], "model": "smollm2@law"},
        ScoreResponse.model_validate(SCORE),
    ),
    "score of one text": (
        lambda c: c.score("The buyer shall pay.", model="smollm2"),
        "POST",
        "/v1/score",
        {"input": "The buyer shall pay.", "model": "smollm2"},
        ScoreResponse.model_validate(SCORE),
    ),
    "chat": (
        lambda c: c.chat([{"role": "user", "content": "Wer zahlt?"}], model="smollm2@law"),
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Wer zahlt?"}], "model": "smollm2@law"},
        ChatCompletion.model_validate(CHAT),
    ),
    "chat with every option": (
        lambda c: c.chat(MESSAGES, model="smollm2", **ALL_CHAT_OPTIONS),
        "POST",
        "/v1/chat/completions",
        {"messages": MESSAGES_ON_THE_WIRE, "model": "smollm2", **CHAT_ON_THE_WIRE},
        ChatCompletion.model_validate(CHAT),
    ),
    "neighbors": (
        lambda c: c.neighbors("The buyer", model="smollm2@law", **NEIGHBORS_OPTIONS),
        "POST",
        "/v1/neighbors",
        {
            "input": "The buyer",
            "model": "smollm2@law",
            **NEIGHBORS_OPTIONS,
            "knn": {"datastore": [{"name": "law"}, {"name": "news"}], "k": 64, "lambda": 0.5},
        },
        NeighborsResponse.model_validate(NEIGHBORS),
    ),
    "neighbors of token ids": (
        lambda c: c.neighbors([[504, 1], (2, 3)], model="smollm2@law"),
        "POST",
        "/v1/neighbors",
        {"input": [[504, 1], [2, 3]], "model": "smollm2@law"},
        NeighborsResponse.model_validate(NEIGHBORS),
    ),
    "tokenize": (
        lambda c: c.tokenize("The shall", model="smollm2", add_special_tokens=False, return_token_strs=True),
        "POST",
        "/tokenize",
        {"prompt": "The shall", "model": "smollm2", "add_special_tokens": False, "return_token_strs": True},
        Tokenization.model_validate(TOKENIZATION),
    ),
    "tokenize a conversation": (
        lambda c: c.tokenize(MESSAGES, add_generation_prompt=False, chat_template_kwargs={"date": None}),
        "POST",
        "/tokenize",
        {
            "messages": MESSAGES_ON_THE_WIRE,
            "add_generation_prompt": False,
            "chat_template_kwargs": {"date": None},
        },
        Tokenization.model_validate(TOKENIZATION | {"token_strs": None}),
    ),
    "detokenize": (
        lambda c: c.detokenize((504, 523)),
        "POST",
        "/detokenize",
        {"tokens": [504, 523]},
        "The shall",
    ),
    "detokenize for a model": (
        lambda c: c.detokenize([504, 523], model="smollm2"),
        "POST",
        "/detokenize",
        {"tokens": [504, 523], "model": "smollm2"},
        "The shall",
    ),
    "tokenizer_info": (
        lambda c: c.tokenizer_info(),
        "GET",
        "/tokenizer_info",
        None,
        TokenizerInfo.model_validate(TOKENIZER_INFO),
    ),
    "models": (
        lambda c: c.models(),
        "GET",
        "/v1/models",
        None,
        tuple(ModelCard.model_validate(card) for card in MODELS["data"]),
    ),
    "health": (lambda c: c.health(), "GET", "/health", None, ServerStatus(ok=True)),
    "ready": (
        lambda c: c.ready(),
        "GET",
        "/ready",
        None,
        Readiness(ok=True, model="smollm2", datastores=["law"], running=3, waiting=2, scoring=1),
    ),
    "datastores.list": (
        lambda c: c.datastores.list(),
        "GET",
        "/v1/datastores",
        None,
        DatastoreList(
            loaded=(Datastore.model_validate(DATASTORE),),
            published=("medicine",),
            aliases={"statutes": "law"},
            default="law",
            bytes_used=61_000_000,
            bytes_limit=None,
            persistent=True,
        ),
    ),
    "datastores.get": (
        lambda c: c.datastores.get("law"),
        "GET",
        "/v1/datastores/law",
        None,
        Datastore.model_validate(DATASTORE),
    ),
    "datastores.load": (
        lambda c: c.datastores.load("law"),
        "PUT",
        "/v1/datastores/law",
        {"version": "current"},
        Datastore.model_validate(DATASTORE | {"version": "current"}),
    ),
    "datastores.load of a version": (
        lambda c: c.datastores.load("law", version="v4"),
        "PUT",
        "/v1/datastores/law",
        {"version": "v4"},
        Datastore.model_validate(DATASTORE | {"version": "v4"}),
    ),
    "datastores.load with aliases as default": (
        lambda c: c.datastores.load("law", aliases=("statutes", "acts"), default=True),
        "PUT",
        "/v1/datastores/law",
        {"version": "current", "aliases": ["statutes", "acts"], "default": True},
        Datastore.model_validate(DATASTORE | {"version": "current"}),
    ),
    "datastores.load without aliases": (
        lambda c: c.datastores.load("law", aliases=[], default=False),
        "PUT",
        "/v1/datastores/law",
        {"version": "current", "aliases": [], "default": False},
        Datastore.model_validate(DATASTORE | {"version": "current"}),
    ),
    "datastores.rollback": (
        lambda c: c.datastores.rollback("law"),
        "POST",
        "/v1/datastores/law/rollback",
        None,
        Datastore.model_validate(DATASTORE | {"version": "v2"}),
    ),
    "datastores.unload": (lambda c: c.datastores.unload("law"), "DELETE", "/v1/datastores/law", None, None),
}

# name → (the call on either client, path, body on the wire beside `stream`, type of the events, events)
STREAMS: dict[str, tuple[Callable[[Any], Any], str, dict[str, Any], Any, list[dict[str, Any]]]] = {
    "stream_completions": (
        lambda c: c.stream_completions("Der", model="smollm2", **ALL_COMPLETION_OPTIONS),
        "/v1/completions",
        {"prompt": "Der", "model": "smollm2", **ALL_ON_THE_WIRE},
        CompletionChunk,
        CHUNKS,
    ),
    "stream_chat": (
        lambda c: c.stream_chat(MESSAGES, model="smollm2", **ALL_CHAT_OPTIONS),
        "/v1/chat/completions",
        {"messages": MESSAGES_ON_THE_WIRE, "model": "smollm2", **CHAT_ON_THE_WIRE},
        ChatCompletionChunk,
        CHAT_CHUNKS,
    ),
    "stream_score": (
        lambda c: c.stream_score(["one", "two"], model="smollm2", **SCORE_OPTIONS),
        "/v1/score",
        {"input": ["one", "two"], "model": "smollm2", **SCORE_OPTIONS, "knn": {"datastore": "law"}},
        ScoreLine,
        SCORE_EVENTS,
    ),
    "datastores.stream_load": (
        lambda c: c.datastores.stream_load("law", "v3", aliases=["statutes"], default=True),
        "/v1/datastores/law",
        {"version": "v3", "aliases": ["statutes"], "default": True},
        LoadEventBody,
        LOAD_EVENTS,
    ),
}
