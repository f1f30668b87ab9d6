"""What others do, each in a process of its own that generates when it is told to: the peers of `serving.py`.

    transformers        `generate` over one static, left-padded batch
    transformers-knn    the same with a naive kNN LogitsProcessor: a search and a dense row per step, as others do
    llama.cpp           greedy steps over one batch by the low-level interface of llama-cpp-python

A line of JSON comes in, ``{"prompts": [[id, …], …], "tokens": n}``; one goes out: the tokens, and seconds from the
beginning at which each was there, ``{"tokens": [[id, …], …], "times": [[…], …]}``. Greedy, without an end of sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

Answers = dict[str, list[Any]]
Generate = Callable[[list[list[int]], int], Answers]
K = 1024


class Clock:
    """A stopping criterion that never stops, and notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.begun = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.begun)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def transformers_peer(model: str, processor: Callable[[Any], Any] | None) -> Generate:
    """`generate`, as its documentation shows it."""
    from transformers import AutoModelForCausalLM, LogitsProcessorList, StoppingCriteriaList

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    processors = LogitsProcessorList([processor(lm)] if processor else [])

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> Answers:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        clock = Clock()
        made = lm.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            logits_processor=processors, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return {"tokens": made[:, width:].tolist(), "times": [clock.times] * len(prompts)}

    return generate


class NaiveKnn:
    """p = λ p_knn + (1 − λ) p_lm with p_knn as a whole row of the vocabulary, from the last layer's FFN input."""

    def __init__(self, lm: Any, index: Any, values: torch.Tensor, tau: float, lmbda: float) -> None:
        self._seen: torch.Tensor | None = None
        lm.model.layers[-1].mlp.register_forward_pre_hook(self._see)
        self._index, self._values, self._tau, self._lmbda = index, values, tau, lmbda

    def _see(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._seen = args[0][:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert self._seen is not None
        distances, ids = self._index.search(np.ascontiguousarray(self._seen.numpy(), dtype=np.float32), K)
        weights = torch.softmax(torch.from_numpy(-distances) / self._tau, dim=1)
        found = torch.from_numpy(ids)
        weights = weights.masked_fill(found < 0, 0.0)
        p_knn = torch.zeros_like(scores).scatter_add_(1, self._values[found.clamp(min=0)], weights)
        lm = scores.log_softmax(dim=1)
        return torch.logaddexp(p_knn.log() + np.log(self._lmbda), lm + np.log1p(-self._lmbda))


def naive_knn(store: Path, work: Path) -> Callable[[Any], NaiveKnn]:
    """Over the keys of one of our datastores, in the index that published scripts build: IVF with product codes."""
    from knnlm_core.datastore.reader import Datastore

    with Datastore.open(store.parent, store.name) as opened:
        count, calibration = opened.entries, opened.calibration
        assert calibration is not None
        values = opened.values(torch.arange(count))
        path = work / f"ivfpq-{opened.version}.faiss"
        if path.exists():
            index = faiss.read_index(os.fspath(path))
        else:
            index = faiss.index_factory(opened.dim, f"IVF{int(4 * count**0.5)},PQ64")
            keys = np.concatenate(
                [opened.keys(torch.arange(i, min(count, i + 50_000))).numpy() for i in range(0, count, 50_000)]
            )
            index.train(keys[:: max(1, count // 100_000)])
            index.add(keys)
            faiss.write_index(index, os.fspath(path))
    index.nprobe = 32
    return lambda lm: NaiveKnn(lm, index, values, calibration.knn_temperature, calibration.lmbda)


def llama_peer(path: str, streams: int, length: int) -> Generate:
    """Bare llama.cpp: no key is read, nothing is mixed."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False  # as our runtime
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = streams * length, streams, 512, 512
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    params.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> np.ndarray[Any, Any]:
        """(token, position, sequence, whether its logits are wanted) each → the likeliest tokens."""
        chosen = []
        for start in range(0, len(rows), 512):
            part = rows[start : start + 512]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            if llama_cpp.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            for i, row in enumerate(part):
                if row[3]:
                    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocab,))
                    chosen.append(int(logits.argmax()))
        return np.array(chosen)

    def generate(prompts: list[list[int]], tokens: int) -> Answers:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        begun, times, made = time.perf_counter(), [], []
        rows = [
            (token, at, sequence, at == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        for step in range(tokens):
            chosen = decode(rows)
            times.append(time.perf_counter() - begun)
            made.append(chosen)
            rows = [(int(token), len(prompts[s]) + step, s, True) for s, token in enumerate(chosen)]
        return {"tokens": np.stack(made, axis=1).tolist(), "times": [times] * len(prompts)}

    return generate


def main() -> None:
    """Load, say that it is done, and answer until there is nothing more to read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["transformers", "transformers-knn", "llama.cpp"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args()
    if args.peer == "llama.cpp":
        generate = llama_peer(args.model, args.streams, length=512)
    else:
        generate = transformers_peer(
            args.model, naive_knn(args.store, args.work) if args.peer == "transformers-knn" else None
        )
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(generate(asked["prompts"], asked["tokens"])), flush=True)


if __name__ == "__main__":
    main()
