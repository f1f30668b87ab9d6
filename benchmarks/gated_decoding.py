"""Tokens per second of greedy decoding where the search dominates: every token searched against the gates, in one run.

The store's own keys are searched exhaustively (an index with lists visits all of them) at the calibrated τ and k,
1024; prompts are the first 64 tokens of eval pages, which no store here holds. Modes take turns, so that a drifting
machine hits all of them alike; time counts from the first submission to the last token, prefill included. The cost of a
gate is what looking up pointers, its decision and moving on take, of the same wall time; searches saved are counted by
the engine. Without a learned gate in the calibration the benchmark refuses.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import arguments, read_rows, write_result
from torch import Tensor

import knnlm_core.mixture as mixture
import knnlm_server.engine.step as step
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.retrieval import Retrieval, Source, with_gate, with_lambda_mode
from knnlm_core.types import EntryRange, Neighbors
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher

K, TOKENS, PROMPT_TOKENS, PROMPTS, ROUNDS = 1024, 64, 64, 8, 3
STREAMS = (1, 8)
seconds: defaultdict[str, float] = defaultdict(float)


class Exhaustive:
    """A datastore that looks at every entry."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        spec = store.manifest.index
        self._nprobe = spec.nlist if spec.is_trained else None

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """As the datastore's, of all lists."""
        begun = time.perf_counter()
        found = self._store.search(queries, k, exclude=exclude, nprobe=self._nprobe)
        seconds["search"] += time.perf_counter() - begun
        return found

    def lookup(self, queries: Tensor, entry_ids: Tensor, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """As the datastore's."""
        return self._store.lookup(queries, entry_ids, exclude=exclude)

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        """As the datastore's."""
        return self._store.next_entry(entry_ids)

    def continuations(self, entry_ids: Tensor, length: int) -> Tensor:
        """As the datastore's."""
        return self._store.continuations(entry_ids, length)


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its time added to that of decisions."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds["decision"] += time.perf_counter() - begun

    return call


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__, data=True)
    parser.add_argument("--store", required=True, help="ROOT/NAME of a datastore built with the same model")
    parser.add_argument("--dtype", default="auto", help="weights, as the datastore was built with")
    args = parser.parse_args()
    root = Path(args.store)
    with Datastore.open(root.parent, root.name) as store:
        lm = load_lm(args.model, LoadOptions(args.dtype, max_length=1024, max_sequences=max(STREAMS)))
        store.require_fits(lm.identity)
        pages = read_rows(args.data / "eval.jsonl.gz")
        prompts = [ids[:PROMPT_TOKENS] for row in pages if len(ids := lm.tokenizer.encode(row["text"])) > PROMPT_TOKENS]
        result = measure(lm, store, prompts[:PROMPTS])
    write_result("gated_decoding", result, lambda axes: draw(axes, result))


def retrievals(store: Datastore) -> dict[str, Retrieval | None]:
    """Each mode; all at the calibrated λ."""
    calibration = store.calibration
    if calibration is None or calibration.learned_threshold is None or calibration.k != K:
        raise SystemExit(f"the store needs a calibration with k = {K} and a learned gate")
    source = Source(Exhaustive(store), calibration.k, calibration.knn_temperature, calibration.lmbda)
    source = with_lambda_mode(source, calibration, None, store.name)
    gates: dict[str, tuple[str, float | None]] = {
        "always": ("always", None),
        "learned (default)": ("learned", None),
        "learned, twice that threshold": ("learned", 2 * calibration.learned_threshold),
        "automaton": ("automaton", 4),
    }
    modes: dict[str, Retrieval | None] = {"base LM": None}
    for name, gate in gates.items():
        modes[name] = Retrieval((with_gate(source, calibration, store.gate_trees, gate, store.name),))
    return modes


def measure(lm: HuggingFaceLM, store: Datastore, prompts: list[list[int]]) -> dict[str, Any]:
    """All modes in turns."""
    mixture.ask = timed(mixture.ask)
    step.advance_walks = timed(step.advance_walks)
    modes = retrievals(store)
    engine = Engine(lm, (), EngineConfig(draft_tokens=0))
    engine.start()
    rows: dict[str, dict[int, list[dict[str, float]]]] = {mode: {n: [] for n in STREAMS} for mode in modes}
    one_round(engine, lm, prompts[:1], None)
    for _ in range(ROUNDS):
        for n in STREAMS:
            for mode, retrieval in modes.items():
                rows[mode][n].append(one_round(engine, lm, prompts[:n], retrieval))
    engine.stop(0)
    table = {
        mode: {
            n: {name: statistics.median(r[name] for r in rounds) for name in rounds[0]} for n, rounds in by_n.items()
        }
        for mode, by_n in rows.items()
    }
    return {
        "claim": "a gate's decision costs under 2 % of a decode step; skipped searches are time saved",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip(),
        "store": store.name,
        "entries": store.entries,
        "k": K,
        "tokens_per_stream": TOKENS,
        "rounds": ROUNDS,
        "streams": {n: {mode: table[mode][n] for mode in modes} for n in STREAMS},
        "speedup_over_always": {
            n: {mode: table[mode][n]["tokens_per_second"] / table["always"][n]["tokens_per_second"] for mode in modes}
            for n in STREAMS
        },
    }


def one_round(
    engine: Engine, lm: HuggingFaceLM, prompts: list[list[int]], retrieval: Retrieval | None
) -> dict[str, float]:
    """What a round of one stream per prompt took."""
    done = threading.Semaphore(0)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    seconds.clear()
    requests = [
        CompletionRequest(
            str(i), prompt, params, retrieval,
            [Choice(0, IncrementalDetokenizer(lm.tokenizer.decode, prompt), StopMatcher(()))],
            seed=0, emit=lambda event: None, on_end=done.release,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    begun = time.perf_counter()
    for request in requests:
        engine.submit(request)
    for _ in requests:
        done.acquire()
    wall = time.perf_counter() - begun
    tokens = TOKENS * len(prompts)
    return {
        "tokens_per_second": tokens / wall,
        "searched": sum(request.counts.searched for request in requests) / tokens,
        "followed": sum(request.counts.followed for request in requests) / tokens,
        "share_of_time_searching": seconds["search"] / wall,
        "share_of_time_deciding": seconds["decision"] / wall,
        "decision_ms_per_step": 1000 * seconds["decision"] / TOKENS,
    }


def draw(axes: Any, result: dict[str, Any]) -> None:
    """Bars of tokens per second against every token searched."""
    modes = [mode for mode in result["speedup_over_always"][STREAMS[0]] if mode != "base LM"]
    width = 0.8 / len(STREAMS)
    for i, n in enumerate(STREAMS):
        heights = [result["speedup_over_always"][n][mode] for mode in modes]
        axes.bar([at + i * width for at in range(len(modes))], heights, width, label=f"{n} streams")
    axes.axhline(1, color="grey", linestyle="--")
    axes.set_xticks([at + width / 2 for at in range(len(modes))], modes, fontsize=7)
    axes.set(ylabel="tokens/s relative to `always`", title=f"{result['entries']:,} entries, exact, k = {result['k']}")
    axes.legend()


if __name__ == "__main__":
    main()
