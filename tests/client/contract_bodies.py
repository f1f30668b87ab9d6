"""What the contract's routes answer, with fixed numbers."""

from __future__ import annotations

import json
from typing import Any

COMPLETION: dict[str, Any] = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1_790_000_000,
    "model": "smollm2@law",
    "system_fingerprint": "lm-4f1c law:v3:2.0",
    "choices": [
        {
            "index": 0,
            "text": "The shall",
            "finish_reason": "length",
            "logprobs": {
                "tokens": ["The", " shall"],
                "token_logprobs": [None, -0.25],
                "top_logprobs": [None, {" shall": -0.25, " may": -1.5}],
                "text_offset": [0, 3],
            },
            "knn": [
                {
                    "token_id": 523,
                    "token": " shall",
                    "searched": False,
                    "followed": True,
                    "decision": "learned",
                    "gate_score": 0.125,
                    "gate_threshold": 0.25,
                    "pointers": 3,
                    "lambda": 0.25,
                    "p_lm": 0.5,
                    "p_knn": 0.75,
                    "p": 0.5625,
                    "neighbors": [
                        {
                            "datastore": "law",
                            "entry_id": 71,
                            "distance": 12.5,
                            "weight": 0.75,
                            "token": " shall",
                            "document_id": "act-7",
                            "uri": "https://example.org/act-7",
                            "title": "Act 7",
                            "licence": "CC0-1.0",
                            "char_start": 10,
                            "char_end": 16,
                        }
                    ],
                    "datastores": [
                        {"name": "law", "weight": 0.75, "lambda": 0.25, "p_knn": 0.75},
                        {"name": "news", "weight": 0.25, "lambda": 0.25, "p_knn": 0.0},
                    ],
                    "attribution": {
                        "model": 0.25,
                        "sources": [
                            {
                                "datastore": "law",
                                "document_id": "act-7",
                                "uri": "https://example.org/act-7",
                                "title": "Act 7",
                                "licence": "CC0-1.0",
                                "share": 0.5,
                                "spans": [[10, 16], [40, 46]],
                            },
                            {"datastore": "law", "document_id": None, "deleted": True, "share": 0.25},
                        ],
                    },
                }
            ],
            "attribution": {
                "model": 0.25,
                "documents": [
                    {
                        "datastore": "law",
                        "document_id": "act-7",
                        "title": "Act 7",
                        "licence": "CC0-1.0",
                        "share": 0.5,
                    },
                    {"datastore": "law", "document_id": None, "deleted": True, "share": 0.25},
                ],
                "licences": {"CC0-1.0": 0.5, "unknown": 0.25},
            },
        }
    ],
    "usage": {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "total_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 0},
        "knn": {"searched": 0, "followed": 1, "skipped": 0, "drafted": 0, "accepted": 0},
    },
}


def completion_chunk(text: str, *, finish_reason: str | None = None) -> dict[str, Any]:
    """One streamed piece of the same completion."""
    head = {name: COMPLETION[name] for name in ("id", "object", "created", "model", "system_fingerprint")}
    return head | {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


CHUNKS = [
    completion_chunk(" Käufer"),
    completion_chunk(" muß", finish_reason="stop"),
    completion_chunk("") | {"choices": [], "usage": COMPLETION["usage"]},
]

TRACE: dict[str, Any] = COMPLETION["choices"][0]["knn"][0]
ATTRIBUTION: dict[str, Any] = COMPLETION["choices"][0]["attribution"]
_CHAT_LOGPROBS = {
    "content": [
        {
            "token": " muß",
            "logprob": -0.25,
            "bytes": [32, 109, 117, 195, 159],
            "top_logprobs": [
                {"token": " muß", "logprob": -0.25, "bytes": [32, 109, 117, 195, 159]},
                {"token": " kann", "logprob": -1.5, "bytes": [32, 107, 97, 110, 110]},
            ],
        }
    ],
    "refusal": None,
}
CHAT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_790_000_000,
    "model": "smollm2@law",
    "system_fingerprint": "lm-4f1c law:v3:2.0",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Der Käufer muß", "refusal": None},
            "logprobs": _CHAT_LOGPROBS,
            "finish_reason": "stop",
            "knn": [TRACE],
            "attribution": ATTRIBUTION,
        }
    ],
    "usage": COMPLETION["usage"],
}


def chat_chunk(delta: dict[str, Any], *, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """One streamed piece of the same answer."""
    head = {name: CHAT[name] for name in ("id", "created", "model", "system_fingerprint")}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **fields}
    return head | {"object": "chat.completion.chunk", "choices": [choice]}


CHAT_CHUNKS = [
    chat_chunk({"role": "assistant", "content": ""}),
    chat_chunk({"content": "Der Käufer"}),
    chat_chunk({"content": " muß"}, logprobs=_CHAT_LOGPROBS, knn=[TRACE]),
    chat_chunk({}, finish_reason="stop", attribution=ATTRIBUTION),
    chat_chunk({}) | {"choices": [], "usage": CHAT["usage"]},
]

_LOSSES = {
    "base": {"nll": 20.0, "perplexity": 54.5, "bits_per_byte": 1.5},
    "mixed": {"nll": 18.0, "perplexity": 36.5, "bits_per_byte": 1.25},
}
_OVERLAP = [
    {
        "longest_match": [2, 3],
        "tokens": 4,
        "base": {"nll": 16.0, "perplexity": 54.5},
        "mixed": {"nll": 16.0, "perplexity": 54.5},
    },
    {
        "longest_match": [32, None],
        "tokens": 1,
        "base": {"nll": 4.0, "perplexity": 54.5},
        "mixed": {"nll": 2.0, "perplexity": 7.5},
    },
]
SCORE: dict[str, Any] = {
    "object": "score",
    "model": "smollm2@law",
    "system_fingerprint": "lm-4f1c law:v3:2.0",
    "results": [
        {
            "index": 0,
            "document_id": "act-7",
            "tokens": 5,
            "bytes": 19,
            "searched": 3,
            "followed": 2,
            **_LOSSES,
            "overlap": _OVERLAP,
            "per_token": [
                {
                    "id": 523,
                    "token": " shall",
                    "offset": 3,
                    "base": -4.0,
                    "mixed": -3.5,
                    "lambda": 0.25,
                    "decision": "learned",
                    "searched": False,
                    "followed": True,
                    "longest_match": 3,
                    "attribution": TRACE["attribution"],
                }
            ],
            "attribution": ATTRIBUTION,
        }
    ],
    "total": {"tokens": 5, "bytes": 19, "searched": 3, "followed": 2, **_LOSSES, "overlap": _OVERLAP},
}
SCORE_EVENTS: list[dict[str, Any]] = [
    {"object": "score.progress", "texts": 2, "texts_done": 0, "tokens": 9, "tokens_done": 4},
    {"object": "score.result", **SCORE["results"][0], "index": 1},
    {"object": "score.progress", "texts": 2, "texts_done": 1, "tokens": 9, "tokens_done": 7},
    {"object": "score.result", **SCORE["results"][0]},
    {
        "object": "score.total",
        "model": "smollm2@law",
        "system_fingerprint": "lm-4f1c law:v3:2.0",
        "total": SCORE["total"],
    },
]
NEIGHBORS: dict[str, Any] = {
    "object": "neighbors",
    "model": "smollm2@law",
    "system_fingerprint": "lm-4f1c law:v3:2.0",
    "results": [
        {
            "index": 0,
            "tokens": 2,
            "neighbors": [
                TRACE["neighbors"][0]
                | {"token_id": 523, "before": "The buyer", "text": " shall", "after": " pay the price."}
            ],
            "next_tokens": [{"token_id": 523, "token": " shall", "p_knn": 0.75, "p_lm": 0.5, "p": 0.5625}],
        }
    ],
}
TOKENIZATION: dict[str, Any] = {
    "count": 2,
    "max_model_len": 2048,
    "tokens": [504, 523],
    "token_strs": ["The", " shall"],
}
TOKENIZER_INFO: dict[str, Any] = {
    "tokenizer_class": "GPT2TokenizerFast",
    "vocab_size": 49_152,
    "model_max_length": 2048,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": None,
    "unk_token": "<|endoftext|>",
    "chat_template": "{{ messages }}",
    "add_bos_token": False,
}
READY: dict[str, Any] = {
    "status": "ready",
    "model": "smollm2",
    "datastores": ["law"],
    "running": 3,
    "waiting": 2,
    "scoring": 1,
}
DATASTORE: dict[str, Any] = {
    "object": "datastore",
    "name": "law",
    "version": "v3",
    "generation": 2,
    "revision": 5,
    "state": "serving",
    "entries": 50_000,
    "bytes": 61_000_000,
    "unit": "token",
    "documents": 120,
    "learned_documents": 3,
    "deleted_documents": 2,
    "leases": 1,
    "aliases": ["statutes"],
    "follows_current": True,
    "previous": "v2",
    "self_test": {"queries": 8, "recall_at_32": 0.98, "needed": 0.95},
    "calibration": {"temperature": 12.0, "lambda": 0.25, "gate": "learned", "gate_threshold": 0.25},
    "model_fingerprint": "4f1c",
}
MODELS: dict[str, Any] = {
    "object": "list",
    "data": [
        {"id": "smollm2", "object": "model", "created": 1_790_000_000, "owned_by": "knnlm", "max_model_len": 2048},
        {"id": "smollm2@law", "object": "model", "created": 1_790_000_000, "owned_by": "knnlm", "parent": "smollm2"},
    ],
}
DATASTORES: dict[str, Any] = {
    "object": "list",
    "data": [DATASTORE],
    "published": ["medicine"],
    "aliases": {"statutes": "law"},
    "default": "law",
    "bytes_used": 61_000_000,
    "bytes_limit": None,
    "persistent": True,
}
LOAD_EVENTS: list[dict[str, Any]] = [
    {"object": "datastore.progress", "stage": "verify", "done": 0, "total": 61_000_000},
    {"object": "datastore.progress", "stage": "verify", "done": 61_000_000, "total": 61_000_000},
    {"object": "datastore.progress", "stage": "swap", "done": 0, "total": 1},
    DATASTORE,
]

REVISION: dict[str, Any] = {
    "object": "datastore.revision",
    "name": "law",
    "version": "v3",
    "generation": 2,
    "revision": 6,
}
LEARNED: dict[str, Any] = REVISION | {"documents": [{"id": "manuals/valve", "tokens": 12, "entries": 11}]}
FORGOTTEN: dict[str, Any] = REVISION | {"document_id": "manuals/valve"}
COMPACTED: dict[str, Any] = DATASTORE | {"version": "v4", "generation": 3, "learned_documents": 0, "previous": "v3"}
PURGED: dict[str, Any] = {
    "object": "datastore.purge",
    "documents": ["manuals/valve"],
    "revision": 8,
    "replaced_versions": {"v3": "v4", "v2": None},
    "files_searched": 31,
    "datastore": COMPACTED,
}
VERSIONS: dict[str, Any] = {
    "object": "list",
    "data": [
        {
            "version": "v2",
            "parent_version": None,
            "revision": 0,
            "entries": 49_000,
            "documents": 118,
            "bytes": 60_000_000,
            "current": False,
            "serving": False,
        },
        {
            "version": "v3",
            "parent_version": "v2",
            "revision": 2,
            "entries": 50_000,
            "documents": 120,
            "bytes": 61_000_000,
            "current": True,
            "serving": True,
        },
    ],
}
VERIFIED: dict[str, Any] = {
    "object": "datastore.verification",
    "name": "law",
    "versions": [
        {"version": "v2", "files": 11, "bytes": 60_000_000, "canary_queries": 0, "recall_at_32": None},
        {"version": "v3", "files": 12, "bytes": 61_000_000, "canary_queries": 8, "recall_at_32": 0.98},
    ],
    "revision": 5,
    "segments": 2,
    "leftovers": ["v9.part"],
}
DIFF: dict[str, Any] = {
    "object": "datastore.diff",
    "name": "law",
    "a": "v2",
    "b": "v3",
    "entries": {"a": 49_000, "b": 50_000},
    "added": ["act-7", "act-8"],
    "removed": [],
    "changed": ["act-1"],
    "num_added": 2,
    "num_removed": 0,
    "num_changed": 1,
    "num_unchanged": 117,
    "settings": {"index.nlist": {"a": 64, "b": 128}, "calibration": {"a": None, "b": {"lambda": 0.25}}},
}
EXPORTED: list[dict[str, Any]] = [
    {
        "id": "act-7",
        "text": "The buyer shall pay the price.\nDer Käufer zahlt.",
        "uri": "https://example.org/act-7",
        "title": "Act 7",
        "licence": "CC0-1.0",
        "tags": ["law", "sale"],
    },
    {"id": 'a/b "error"\u2028', "text": '{"error": "a text may look like one"}'},
]


def sse(*bodies: dict[str, Any]) -> list[bytes]:
    """Events with these JSON bodies, each as its own piece, in the bytes of the wire."""
    return [f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode() for body in bodies]


DONE = b"data: [DONE]\n\n"


def ndjson(*bodies: dict[str, Any]) -> list[bytes]:
    """Lines with these JSON bodies, each as its own piece."""
    return [f"{json.dumps(body, ensure_ascii=False)}\n".encode() for body in bodies]
