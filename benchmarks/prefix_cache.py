"""Time to the first token of prompts that share their beginning, with the prefix cache against without.

One engine with the cache and one without, the same weights. Each round sends, one after the other, prompts of a shared
part and a tail of their own: first to the engine without, then to the one with, and the other way round in the next
round. `unrelated` are prompts that share nothing: what keeping their blocks costs.
"""

from __future__ import annotations

import random
import statistics
import threading
import time

from common import arguments, write_result
from rich.progress import track

from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher

SHARED, TAIL, ROUNDS, PROMPTS = (0, 128, 512, 992), 32, 3, 4


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__).parse_args()
    lms = {bound: load_lm(args.model, LoadOptions(max_length=2048, max_sequences=4, prefix_cache_bytes=bound))
           for bound in (0, 1 << 30)}  # fmt: skip
    engines = {bound: Engine(lm, ()) for bound, lm in lms.items()}
    for engine in engines.values():
        engine.start()
    chooser = random.Random(0)
    seconds: dict[int, dict[int, list[float]]] = {n: {bound: [] for bound in lms} for n in SHARED}
    for round_ in track(range(ROUNDS), description="Round"):
        for shared in SHARED:
            # New text in every round: only this round's own first prompt can have left something to reuse.
            length = shared or max(SHARED)
            beginning = [chooser.randrange(1000, 40_000) for _ in range(length)]
            for bound in sorted(lms, reverse=bool(round_ % 2)):
                tails = [[chooser.randrange(1000, 40_000) for _ in range(TAIL)] for _ in range(PROMPTS + 1)]
                prompts = [
                    [*(beginning if shared else chooser.choices(range(1000, 40_000), k=length)), *tail]
                    for tail in tails
                ]
                times = [_first_token_s(engines[bound], lms[bound], prompt) for prompt in prompts]
                seconds[shared][bound] += times[1:]  # the first one fills the cache
    use = lms[1 << 30].prefix_cache_use
    for engine in engines.values():
        engine.stop(0)
    with_cache = {n: statistics.median(times[1 << 30]) / statistics.median(times[0]) for n, times in seconds.items()}
    unrelated = with_cache.pop(0)
    result = {
        "claim": "a shared beginning is read once; prompts that share nothing lose nothing to speak of",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "tail_tokens": TAIL,
        "time_to_first_token_with_over_without_by_shared_tokens": with_cache,
        "unrelated_prompts_with_over_without": unrelated,
        "hit_rate": use.reused_tokens / use.asked_tokens,
        "used_bytes": use.used_bytes,
        "bound_bytes": 1 << 30,
    }
    write_result(
        "prefix_cache",
        result,
        lambda axes: (
            axes.bar([f"{n} shared" for n in with_cache] + ["nothing shared"], [*with_cache.values(), unrelated]),
            axes.axhline(1.0, color="tab:gray"),
            axes.bar_label(axes.containers[0], fmt="%.2f ×"),
            axes.set(
                ylabel="time to first token, with / without cache", title=f"Prompts with {TAIL} tokens of their own"
            ),
        ),
    )


def _first_token_s(engine: Engine, lm: HuggingFaceLM, prompt: list[int]) -> float:
    done = threading.Event()
    request = CompletionRequest(
        request_id="bench",
        prompt_ids=prompt,
        params=SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
        retrieval=None,
        choices=[Choice(0, IncrementalDetokenizer(lm.tokenizer.decode, prompt), StopMatcher(()))],
        seed=0,
        emit=lambda event: None,
        on_end=done.set,
    )
    started = time.perf_counter()
    engine.submit(request)
    done.wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
