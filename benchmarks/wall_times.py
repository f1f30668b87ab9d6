"""Wall time of some ways to use a datastore against the base LM alone: scoring whole texts, and decoding one stream.

Ways take turns and rounds repeat, so that a drifting machine hits all of them alike. Scoring is what the server and
`knnlm score` run: the first texts, cut after 2,048 tokens, together about 8,192, window 1024, stride 512. Decoding is
greedy, 64 tokens behind the first 64 tokens of a text, one stream, no drafts, prefill included. Medians of the ratios
of each round to the base LM in the same round, with the lowest and the highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from gated_decoding import PROMPT_TOKENS, one_round
from rich.progress import track

from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.scoring import ScoreRequest

ROUNDS, TEXT_TOKENS, SCORED_TOKENS, PASS_TOKENS = 5, 2048, 8192, 4096

Ways = dict[str, Source | None]


def wall_times(lm: HuggingFaceLM, texts: Sequence[list[int]], ways: Ways) -> dict[str, dict[str, Any]]:
    """For each way its times over those of the way ``base``, which must be there."""
    chosen: list[list[int]] = []
    for ids in texts:
        if len(ids) > PROMPT_TOKENS and sum(map(len, chosen)) < SCORED_TOKENS:
            chosen.append(ids[:TEXT_TOKENS])
    retrievals = {name: Retrieval((source,)) if source is not None else None for name, source in ways.items()}
    engine = Engine(lm, (), EngineConfig(draft_tokens=0))
    engine.start()
    prompt = chosen[0][:PROMPT_TOKENS]
    try:
        decoding = in_turns(
            "Decode", retrievals, lambda way: 1 / one_round(engine, lm, [prompt], way)["tokens_per_second"]
        )
    finally:
        engine.stop(0)
    scoring = in_turns("Score", retrievals, lambda way: seconds_of_scoring(lm, chosen, way))
    return {name: {"scoring": scoring[name], "decoding": decoding[name]} for name in ways}


def in_turns(
    label: str, ways: dict[str, Retrieval | None], seconds: Callable[[Retrieval | None], float]
) -> dict[str, dict[str, float]]:
    """Each way once a round, over the base LM's time of that round."""
    seconds(ways["base"])
    rounds = [
        {name: seconds(way) for name, way in ways.items()} for _ in track(range(ROUNDS), description=f"{label}, timed")
    ]
    ratios = {name: [each[name] / each["base"] for each in rounds] for name in ways}
    return {
        name: {"over_base": statistics.median(of_way), "low": min(of_way), "high": max(of_way)}
        for name, of_way in ratios.items()
    }


def seconds_of_scoring(lm: HuggingFaceLM, texts: Sequence[list[int]], retrieval: Retrieval | None) -> float:
    """All texts, pass after pass."""
    request = ScoreRequest(
        "timed", texts, retrieval, 1024, 512,
        on_text=lambda at, scores: None,
        on_end=lambda error: None,
    )  # fmt: skip
    begun = time.perf_counter()
    while not request.is_done:
        request.run(lm, PASS_TOKENS)
    return time.perf_counter() - begun
