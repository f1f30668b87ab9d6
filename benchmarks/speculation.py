"""Tokens per second with and without drafts, against the base LM without retrieval, and whether any answer differs.

Greedy, 64 tokens after 64 tokens of prompt, one stream and four. Prompts:

    held out    eval pages, from their 100th token on; no page is in the store
    close       places in eval pages whose next 24 tokens are made of 16-grams that stand in the store: boilerplate,
                option lists, repeated sections; one place a page
    stored      training pages that the store holds, from their 100th token on
    other       WikiText-2 test articles: another domain

Modes take turns prompt by prompt, so that a drifting machine hits all of them alike; ratios are of summed times. λ and
k are the store's calibrated ones, and the gate is the learned one at its default threshold. What a guess is worth and
what a pass costs is learned on the way, from nothing, as on a server that has just started. Equality: 200 prompts, 32
tokens each, greedy and sampled with a seed, without drafts and all at once, against the same with drafts, and against
the same without drafts but three at a time, so that what differs there is the batch alone. Where two answers part, they
are replayed to the first difference, and the report says how near to a border it was decided (`partings.py`).
"""

from __future__ import annotations

import gzip
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import arguments, read_rows, shuffled_train_rows, write_result
from partings import Pair, partings, report
from rich.progress import track

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import TextLM
from knnlm_core.retrieval import Retrieval, Source, with_gate, with_lambda_mode
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.engine import Engine, EngineConfig
from knnlm_server.engine.events import Event, TokenEvent
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher

TOKENS, PROMPT_TOKENS, SKIPPED, PROMPTS = 64, 64, 100, 12
STREAMS = (1, 4)
SAME_PROMPTS, SAME_TOKENS, SAME_GROUP = 200, 32, 3
GRAM, CLOSE_TOKENS = 16, 24

Prompt = list[int]


class Answer:
    """A request and what it was told."""

    def __init__(self, lm: TextLM, prompt: Prompt, params: SamplingParams, how: Retrieval | None) -> None:
        self.tokens: list[TokenEvent] = []
        self._done = threading.Event()
        choice = Choice(0, IncrementalDetokenizer(lm.tokenizer.decode, prompt), StopMatcher(()))
        self.request = CompletionRequest(
            "", prompt, params, how, [choice], seed=params.seed or 0, emit=self._take, on_end=self._done.set
        )

    def _take(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append(event)

    def wait(self) -> None:
        """Until its end."""
        self._done.wait()


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__, data=True)
    parser.add_argument("--store", required=True, help="ROOT/NAME of a datastore built with the same model")
    parser.add_argument("--dtype", default="auto", help="weights, as the datastore was built with")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each kind")
    args = parser.parse_args()
    root = Path(args.store)
    with Datastore.open(root.parent, root.name) as store:
        lm = load_lm(args.model, LoadOptions(args.dtype, max_length=1024, max_sequences=8))
        store.require_fits(lm.identity)
        kinds = prompts(lm, store, args.data, args.prompts)
        result = measure(lm, store, kinds, eval_pages(lm, args.data))
    write_result("speculation", result, lambda axes: draw(axes, result))


def eval_pages(lm: TextLM, data: Path) -> list[Prompt]:
    """Held-out pages, tokenised."""
    return [lm.tokenizer.encode(row["text"]) for row in read_rows(data / "eval.jsonl.gz")]


def prompts(lm: TextLM, store: Datastore, data: Path, count: int) -> dict[str, list[Prompt]]:
    """Prompts of each kind, at most ``count``."""
    pages = eval_pages(lm, data)
    stored = set(store.document_ids())
    inside = [lm.tokenizer.encode(row["text"]) for row in shuffled_train_rows(data) if row["id"] in stored]
    with gzip.open(data.parent / "wikitext-2" / "test.txt.gz", "rt", encoding="utf-8") as file:
        other = [lm.tokenizer.encode(text[:4000]) for text in file.read().split("\n \n = ")]

    def middles(texts: Sequence[Prompt]) -> list[Prompt]:
        long = [text for text in texts if len(text) >= SKIPPED + PROMPT_TOKENS + TOKENS]
        return [text[SKIPPED : SKIPPED + PROMPT_TOKENS] for text in long][:count]

    return {
        "held out": middles(pages),
        "close": close_places(store, pages)[:count],
        "stored": middles(inside),
        "other": middles(other),
    }


def close_places(store: Datastore, pages: Sequence[Prompt]) -> list[Prompt]:
    """Of each page that has one, the first prompt whose next tokens stand in the store, piece by piece."""
    values = store.values(torch.arange(store.entries)).tolist()
    grams = {tuple(values[i : i + GRAM]) for i in range(len(values) - GRAM + 1)}
    found = []
    for page in pages:
        known = [tuple(page[i : i + GRAM]) in grams for i in range(len(page) - GRAM + 1)]
        run = CLOSE_TOKENS - GRAM + 1
        starts = (i for i in range(PROMPT_TOKENS, len(known) - run + 1) if all(known[i : i + run]))
        if (start := next(starts, None)) is not None:
            found.append(page[start - PROMPT_TOKENS : start])
    return found


def measure(lm: TextLM, store: Datastore, kinds: dict[str, list[Prompt]], pages: Sequence[Prompt]) -> dict[str, Any]:
    """All kinds of prompts in all modes."""
    calibration = store.calibration
    if calibration is None:
        raise SystemExit("the store needs a calibration")
    source = Source(store, calibration.k, calibration.knn_temperature, calibration.lmbda)
    source = with_lambda_mode(source, calibration, None, store.name)
    gated = Retrieval((with_gate(source, calibration, store.gate_trees, ("learned", None), store.name),))
    always = Retrieval((source,))
    engines = {drafts: Engine(lm, (), EngineConfig(draft_tokens=drafts)) for drafts in (0, EngineConfig().draft_tokens)}
    off, on = engines.values()
    modes: dict[str, tuple[Engine, Retrieval | None]] = {
        "base LM": (off, None),
        "always": (off, always),
        "always, drafts": (on, always),
        "gated": (off, gated),
        "gated, drafts": (on, gated),
    }
    for engine in engines.values():
        engine.start()
    for engine, how in modes.values():
        one_round(engine, lm, [pages[0][:PROMPT_TOKENS]], how)
    table: dict[str, dict[str, Any]] = {}
    for kind, of_kind in kinds.items():
        table[kind] = {}
        for streams in STREAMS:
            groups = [of_kind[i : i + streams] for i in range(0, len(of_kind), streams)]
            seconds: defaultdict[str, float] = defaultdict(float)
            counts: defaultdict[tuple[str, str], int] = defaultdict(int)
            for group in track(groups, description=f"{kind}, {streams} streams"):
                for mode, (engine, how) in modes.items():
                    took, answers = one_round(engine, lm, group, how)
                    seconds[mode] += took
                    for answer in answers:
                        of_answer = answer.request.counts
                        counts[mode, "searched"] += of_answer.searched
                        counts[mode, "drafted"] += of_answer.drafted
                        counts[mode, "accepted"] += of_answer.accepted
            tokens = TOKENS * len(of_kind)
            table[kind][f"{streams} streams"] = {
                mode: {
                    "over base LM": seconds["base LM"] / seconds[mode],
                    **{
                        f"{what} per token": counts[mode, what] / tokens for what in ("searched", "drafted", "accepted")
                    },
                }
                for mode in modes
            } | {"prompts": len(of_kind)}
    same = equality(lm, pages, gated, off, on)
    for engine in engines.values():
        engine.stop(0)
    return {
        "claim": "drafts: ≥ 1.0 × the base LM without retrieval on held-out prompts, ≥ 1.3 × close to stored text, "
        "never below 0.97 × of the same without drafts; the same answers",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip(),
        "store": store.name,
        "entries": store.entries,
        "calibrated": calibration.settings(),
        "table": table,
        "equality": same,
    }


def one_round(engine: Engine, lm: TextLM, group: Sequence[Prompt], how: Retrieval | None) -> tuple[float, list[Answer]]:
    """Seconds until the last token of prompts that are submitted together."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    answers = [Answer(lm, prompt, params, how) for prompt in group]
    begun = time.perf_counter()
    for answer in answers:
        engine.submit(answer.request)
    for answer in answers:
        answer.wait()
    return time.perf_counter() - begun, answers


def equality(lm: TextLM, pages: Sequence[Prompt], how: Retrieval, off: Engine, on: Engine) -> dict[str, Any]:
    """How many answers are the same with and without drafts, and in other batches, and why the others part."""
    places = [
        page[start : start + PROMPT_TOKENS]
        for start in range(0, 100_000, 150)
        for page in pages
        if start + PROMPT_TOKENS <= len(page)
    ][:SAME_PROMPTS]
    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled with a seed", 1.0)):
        params = [
            SamplingParams(max_tokens=SAME_TOKENS, temperature=temperature, ignore_eos=True, seed=i)
            for i in range(len(places))
        ]

        def answers(engine: Engine, together: int, params: Sequence[SamplingParams] = params) -> list[Answer]:
            made = [Answer(lm, place, one, how) for place, one in zip(places, params, strict=True)]
            for start in range(0, len(made), together):
                for answer in made[start : start + together]:
                    answer.request.trace_neighbors = 1
                    engine.submit(answer.request)
                for answer in made[start : start + together]:
                    answer.wait()
            return made

        reference = answers(off, len(places))
        found[name] = {"prompts": len(places)}
        for what, engine, together in (
            ("with drafts", on, len(places)),
            ("without drafts, in other batches", off, SAME_GROUP),
        ):
            others = answers(engine, together)
            pairs = [
                Pair(place, one, answer.tokens, other.tokens)
                for place, one, answer, other in zip(places, params, reference, others, strict=True)
            ]
            found[name][what] = {
                **report(partings(lm, how, pairs), pairs),
                "drafted": sum(answer.request.counts.drafted for answer in others),
                "accepted": sum(answer.request.counts.accepted for answer in others),
            }
    return found


def draw(axes: Any, result: dict[str, Any]) -> None:
    """Tokens per second over the base LM's, one stream."""
    table = result["table"]
    modes = [mode for mode in next(iter(table.values()))["1 streams"] if mode not in ("base LM", "prompts")]
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        heights = [table[kind]["1 streams"][mode]["over base LM"] for kind in table]
        axes.bar([at + i * width for at in range(len(table))], heights, width, label=mode)
    axes.axhline(1, color="grey", linestyle="--")
    axes.set_xticks([at + width * (len(modes) - 1) / 2 for at in range(len(table))], list(table))
    axes.set(ylabel="tokens/s relative to the base LM", title="Drafts from the datastore, one stream")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
