"""Tokens per second of N concurrent streams against one, in one run of one engine, greedy, with and without a store.

Each round generates the same number of tokens per stream; rounds of different N alternate so that a drifting machine
hits all of them alike. Time counts from the first submission to the last token, prefill included.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

from common import arguments, write_result

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher

STREAMS, TOKENS, ROUNDS = (1, 2, 4, 8), 48, 3
PROMPT = "The following section of the manual describes how the server stores its data and"


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__)
    parser.add_argument("--store", help="ROOT/NAME of a datastore built with the same model; base LM alone without")
    args = parser.parse_args()
    lm = load_lm(args.model, LoadOptions(max_length=1024, max_sequences=max(STREAMS)))
    modes: dict[str, Retrieval | None] = {"base": None}
    if args.store:
        root = Path(args.store)
        store = Datastore.open(root.parent, root.name)
        assert store.calibration is not None
        c = store.calibration
        modes["knn"] = Retrieval((Source(store, c.k, c.knn_temperature, c.lmbda),))
    engine = Engine(lm, (), EngineConfig(draft_tokens=0))
    engine.start()
    rates: dict[str, dict[int, list[float]]] = {mode: {n: [] for n in STREAMS} for mode in modes}
    _round(engine, lm, 1, None)
    for _ in range(ROUNDS):
        for mode, retrieval in modes.items():
            for n in STREAMS:
                rates[mode][n].append(n * TOKENS / _round(engine, lm, n, retrieval))
    engine.stop(0)
    medians = {mode: {n: statistics.median(values) for n, values in by_n.items()} for mode, by_n in rates.items()}
    result = {
        "claim": "eight concurrent streams ≥ 3 × the tokens per second of one",
        "protocol": f"greedy, {TOKENS} tokens a stream, {ROUNDS} alternating rounds, median",
        "speedup_over_one_stream": {m: {n: r / by[1] for n, r in by.items()} for m, by in medians.items()},
        "tokens_per_second": medians,
        "store": args.store and Path(args.store).name,
    }
    write_result(
        "streams",
        result,
        lambda axes: (
            [axes.plot(STREAMS, [by[n] / by[1] for n in STREAMS], "o-", label=m) for m, by in medians.items()],
            axes.axhline(3, color="grey", linestyle="--"),
            axes.set(xlabel="concurrent streams", ylabel="tokens/s relative to one", title="Continuous batching"),
            axes.legend(),
        ),
    )


def _round(engine: Engine, lm: HuggingFaceLM, streams: int, retrieval: Retrieval | None) -> float:
    """Seconds for all streams to finish."""
    done = threading.Semaphore(0)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    started = time.perf_counter()
    for i in range(streams):
        prompt = lm.tokenizer.encode(f"{i}. {PROMPT}")
        choice = Choice(0, IncrementalDetokenizer(lm.tokenizer.decode, prompt), StopMatcher(()))
        engine.submit(
            CompletionRequest(
                str(i), prompt, params, retrieval, [choice], seed=0, emit=lambda event: None, on_end=done.release
            )
        )
    for _ in range(streams):
        done.acquire()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
