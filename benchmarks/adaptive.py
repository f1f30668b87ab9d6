"""Perplexity against searches saved: every way of setting λ and every gate, on text that nothing was fitted to.

Pairs of a store and texts of the same domain:

    postgresql       PostgreSQL manual, training pages shuffled with seed 0, the first 300,000 entries → all eval pages;
                     the store of `strided_protocol`
    postgresql-full  all training pages → all eval pages
    wikitext         WikiText-2 valid, one document per article → test, one text per article
    rot13            `postgresql` with every letter moved by 13: a language on which the base LM does badly, and on
                     which falling back to it must not be the answer

Stores are built by `knnlm build` with its defaults (windows of 1024 tokens, stride 512); k, τ, rules, gate and default
threshold are those of their own calibration: held-out and practice text of the training side. Texts are scored with
window 1024, stride 512, each token once; every search is made once, and the product's walks are replayed over what it
found, so that all rows of the table are of the same tokens. Walks begin anew every 1,024 tokens, as answers do.
Thresholds are swept; the points named in the claims are chosen by their share of searches saved alone. Intervals are
block bootstraps over blocks of 128 tokens inside a text, 2,000 resamples, of the change of perplexity against the same
tokens with every search. The ways named in the claims are timed, see `wall_times`.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import strided_protocol
import torch
from common import RESULTS, arguments, read_rows, shuffled_train_rows, write_result
from rich.progress import track
from wall_times import wall_times

from knnlm_builder.stages.compare_gates import GAINS, PERIODS
from knnlm_builder.stages.fit import Evidence, bootstrap_gain
from knnlm_builder.stages.walked import Held, log_probs_of_search, walk
from knnlm_core.datastore.reader import Datastore
from knnlm_core.knn.gates import Automaton, Confidence, EveryN, Gate, LearnedGate
from knnlm_core.knn.lambdas import LambdaMode
from knnlm_core.lm.head import targets_and_signals
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.retrieval import Source, lambda_rule, ready_rule
from knnlm_core.signals import join_signals
from knnlm_core.types import Neighbors
from knnlm_core.windows import rolling_windows

WINDOW, STRIDE, BLOCK = 1024, 512, 128
WALK = 1024
SEARCH_ROWS = 2048
GROUP_TOKENS = 60_000  # of texts whose neighbours are held at once
CONFIDENCES = (0.15, 0.25, 0.35, 0.45, 0.6, 0.75, 0.9, 0.97)
POINTERS = (1, 2, 4, 8, 16)
CLAIMED_SAVINGS = (0.5, 0.7)

Rows = list[dict[str, Any]]


class Pair(NamedTuple):
    """What is stored and what is scored."""

    dtype: str
    max_tokens: int | None

    def train(self, name: str, data: Path) -> Rows:
        """Documents of the store."""
        if name == "wikitext":
            return articles(data.parent / "wikitext-2" / "valid.txt.gz")
        return rotated(name, shuffled_train_rows(data))

    def texts(self, name: str, data: Path) -> Rows:
        """What is scored."""
        if name == "wikitext":
            return articles(data.parent / "wikitext-2" / "test.txt.gz")
        return rotated(name, read_rows(data / "eval.jsonl.gz"))


PAIRS = {
    "postgresql": Pair("float32", 300_000),
    "postgresql-full": Pair("bfloat16", None),
    "wikitext": Pair("bfloat16", None),
    "rot13": Pair("bfloat16", 300_000),
}


def rotated(name: str, rows: Rows) -> Rows:
    """The same pages, in another alphabet for the pair that wants one."""
    return [{**row, "text": codecs.encode(row["text"], "rot13")} for row in rows] if name == "rot13" else rows


def articles(path: Path) -> Rows:
    """WikiText cut at its titles, such as ` = Title = `."""
    found: list[list[str]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if re.fullmatch(r" = [^=].*[^=] = \n?", line) or not found:
                found.append([])
            found[-1].append(line)
    texts = ["".join(lines).strip() for lines in found]
    return [{"id": f"{path.name}-{i}", "text": text + "\n"} for i, text in enumerate(texts) if text]


def main() -> None:
    """Run and write the results."""
    parser = arguments(__doc__, data=True)
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=["postgresql"])
    args = parser.parse_args()
    for name in args.pairs:
        measure(name, PAIRS[name], args.model, args.data, args.work)


def measure(name: str, pair: Pair, model: str, data: Path, work: Path) -> None:
    """One pair, from the store to the plot."""
    root = work / "datastores"
    if name == "postgresql":
        strided_protocol.build(model, data, work, root)
    else:
        build(name, pair, model, pair.train(name, data), work, root)
    with Datastore.open(root, strided_protocol.NAME if name == "postgresql" else name) as store:
        lm = load_lm(
            model,
            LoadOptions(pair.dtype, "auto", store.manifest.key.tap, progress=False, max_length=WINDOW, max_sequences=1),
        )
        texts = [ids for row in pair.texts(name, data) if len(ids := lm.tokenizer.encode(row["text"])) > 1]
        ways = sources(store)
        table = score(lm, store, texts, ways)
        result = {
            "claim": "half of the searches saved at no more than 2 % above the best perplexity with all; 70 % saved at "
            "or below plain kNN-LM with one λ and every search",
            "protocol": (__doc__ or "").split("\n\n", 1)[1].strip(),
            "pair": name,
            "dtype": pair.dtype,
            "entries": store.entries,
            **table,
            "wall_time": {},
        }
        write(result)
        named = ["λ fixed", table["best"], *(point["setting"] for point in table["claims"].values())]
        result["wall_time"] = wall_times(lm, texts, {"base": None, **{name: ways[name] for name in named}})
        write(result)


def write(result: dict[str, Any]) -> None:
    """As JSON, plot and table."""
    file = f"adaptive_{result['pair'].replace('-', '_')}"
    write_result(file, result, lambda axes: draw(axes, result))
    (RESULTS / f"{file}.md").write_text(markdown(result), encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    """Every way in one table; times, over the LM alone, of those that were timed."""
    lines = [
        f"# {result['pair']}: {result['entries']:,} entries, {result['tokens']:,} tokens of {result['texts']} texts",
        "",
        f"Changes are of perplexity, with 95 % intervals, against `{result['best']}`; times are over the LM alone.",
        "",
        "| way | perplexity | change | searches saved | followed | scoring | decoding, one stream |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        against = {name: f"{100 * value:+.1f}" for name, value in row["change against all searches"].items()}
        times = result["wall_time"].get(row["name"], {})
        timed = [f"{times[kind]['over_base']:.2f} ×" if times else "" for kind in ("scoring", "decoding")]
        lines.append(
            f"| {row['name']} | {row['perplexity']:.2f} | {against['change']} % ({against['low']} … {against['high']}) "
            f"| {row['saved']:.0%} | {row['followed']:.0%} | {timed[0]} | {timed[1]} |"
        )
    return "\n".join([*lines, ""])


def build(name: str, pair: Pair, model: str, rows: Rows, work: Path, root: Path) -> None:
    """Build the store with the command that users run; done before, it says so at once."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["build", "--model", model, "--input", str(corpus), "--output", str(root), "--name", name]
    limit = ["--max-tokens", str(pair.max_tokens)] if pair.max_tokens else []
    subprocess.run([sys.executable, "-m", "knnlm_cli", *command, "--dtype", pair.dtype, *limit], check=True)


def sources(store: Datastore) -> dict[str, Source]:
    """How the store may be used: each way of setting λ, every token searched, and each gate at the calibrated λ."""
    calibration = store.calibration
    assert calibration is not None
    plain = Source(store, calibration.k, calibration.knn_temperature, calibration.lmbda)
    ways = {"fixed": plain}
    for mode in (LambdaMode.RRC, LambdaMode.BUCKETED, LambdaMode.LEARNED):
        if getattr(calibration.lambda_rules, mode) is not None:
            ways[mode.value] = replace(plain, lambda_rule=lambda_rule(calibration.lambda_rules, mode, store.name))
    used = ways[calibration.lambda_mode]
    if calibration.follow_rule is not None:
        used = replace(used, follow_rule=ready_rule(calibration.follow_rule, store.name))
    gates: list[Gate] = [*map(EveryN, PERIODS), *map(Confidence, CONFIDENCES), *(Automaton(float(n)) for n in POINTERS)]
    if store.gate_trees is None:
        raise SystemExit(f"datastore {store.name} has no learned gate; run knnlm calibrate on it")
    gates += [LearnedGate(store.gate_trees, gain) for gain in GAINS]
    return {
        **{f"λ {way}": source for way, source in ways.items()},
        **{f"{gate.mode} {gate.threshold:g}": replace(used, gate=gate) for gate in gates},
    }


def score(lm: HuggingFaceLM, store: Datastore, texts: list[list[int]], ways: dict[str, Source]) -> dict[str, Any]:
    """All texts in every way."""
    calibration = store.calibration
    assert calibration is not None
    log_probs: dict[str, list[torch.Tensor]] = {name: [] for name in ("base", *ways)}
    outcomes: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    blocks: list[torch.Tensor] = []
    for held, of_group in track(list_groups(lm, store, texts), description="Texts"):
        log_probs["base"].append(held.evidence.base.double())
        blocks.append(of_group)
        # All gates search at the calibrated λ: worked out once.
        calibrated = held._replace(log_probs=log_probs_of_search(held.evidence, ways[f"λ {calibration.lambda_mode}"]))
        for name, source in ways.items():
            walked = walk(held if name.startswith("λ ") else calibrated, source)
            log_probs[name].append(walked.log_probs)
            outcomes[name].append(walked.outcomes)
    joined = {name: torch.cat(parts) for name, parts in log_probs.items()}
    best = max((name for name in ways if name.startswith("λ ")), key=lambda name: float(joined[name].mean()))
    block_ids = torch.cat([some + 1_000_000 * i for i, some in enumerate(blocks)])
    rows = []
    for name, values in joined.items():
        done = torch.cat(outcomes[name]) if name in outcomes else None
        against = {"all searches": joined[best], "one λ, all searches": joined["λ fixed"], "base": joined["base"]}
        rows.append(
            {
                "name": name,
                "perplexity": math.exp(-float(values.mean())),
                "saved": 1.0 if done is None else 1 - float((done == 1).double().mean()),
                "followed": 0.0 if done is None else float((done == 2).double().mean()),
                **{
                    f"change against {other}": change(values, of_other, block_ids)
                    for other, of_other in against.items()
                },
            }
        )
    return {
        "tokens": len(joined["base"]),
        "texts": len(texts),
        "calibrated": calibration.settings(),
        "best": best,
        "claims": claims(rows, best),
        "rows": rows,
    }


def claims(rows: Rows, best: str) -> dict[str, Any]:
    """For each gate and share of searches saved: the first setting that saves so much, and what it costs.

    Args:   best: the way with every search and the lowest perplexity.
    """
    by_name = {row["name"]: row for row in rows}
    found: dict[str, Any] = {}
    for share in CLAIMED_SAVINGS:
        for gate in ("every_n", "confidence", "automaton", "learned"):
            enough = [row for row in rows if row["name"].startswith(f"{gate} ") and row["saved"] >= share]
            if enough:
                row = min(enough, key=itemgetter("saved"))
                found[f"{gate}, at least {share:.0%} saved"] = {
                    "setting": row["name"],
                    "saved": row["saved"],
                    "over all searches": row["perplexity"] / by_name[best]["perplexity"] - 1,
                    "over one λ, all searches": row["perplexity"] / by_name["λ fixed"]["perplexity"] - 1,
                }
    return found


def change(values: torch.Tensor, against: torch.Tensor, blocks: torch.Tensor) -> dict[str, float]:
    """Of perplexity, with the ends of its 95 % interval."""
    gain = bootstrap_gain(against, values, blocks, seed=0)
    return {"change": -gain.gain, "low": -gain.high, "high": -gain.low}


def list_groups(lm: HuggingFaceLM, store: Datastore, texts: list[list[int]]) -> Iterator[tuple[Held, torch.Tensor]]:
    """Texts, some at a time: encoded, searched, cut into runs, and the bootstrap's block of each token."""
    calibration = store.calibration
    assert calibration is not None
    waiting: list[list[int]] = []
    for number, ids in enumerate(texts):
        waiting.append(ids)
        if sum(map(len, waiting)) >= GROUP_TOKENS or number == len(texts) - 1:
            yield encode(lm, store, waiting, calibration.k)
            waiting = []


def encode(lm: HuggingFaceLM, store: Datastore, texts: list[list[int]], k: int) -> tuple[Held, torch.Tensor]:
    """What the LM and one search know of some texts."""
    keys, base, targets, blocks, signals, runs = [], [], [], [], [], []
    start = block = 0
    for ids in texts:
        for window in rolling_windows(len(ids), WINDOW, STRIDE):
            encoded = lm.encode([ids[window.begin : window.end - 1]], [window.first_target - window.begin - 1])
            here = torch.tensor(ids[window.first_target : window.end])
            log_probs, of_window = targets_and_signals(lm, encoded.hidden, here)
            keys.append(encoded.keys.float())
            base.append(log_probs.float())
            targets.append(here)
            signals.append(of_window)
        count = len(ids) - 1
        blocks.append(block + torch.arange(count) // BLOCK)
        block = int(blocks[-1][-1]) + 1
        runs += [range(at, min(at + WALK, start + count)) for at in range(start, start + count, WALK)]
        start += count
    queries = torch.cat(keys)
    found = [store.search(some, k) for some in torch.split(queries, SEARCH_ROWS)]
    near = Neighbors(*(torch.cat(column) for column in zip(*found, strict=True)))
    block_ids = torch.cat(blocks)
    evidence = Evidence(torch.cat(base), near, torch.cat(targets), block_ids, join_signals(signals))
    return Held(evidence, queries, runs), block_ids


def draw(axes: Any, result: dict[str, Any]) -> None:
    """Perplexity against searches saved."""
    rows = {row["name"]: row for row in result["rows"]}
    for name, style in (("base", "--"), ("λ fixed", ":"), (result["best"], "-")):
        axes.axhline(rows[name]["perplexity"], color="0.3", linestyle=style, linewidth=1, label=name)
    for gate in ("every_n", "confidence", "automaton", "learned"):
        points = sorted((100 * row["saved"], row["perplexity"]) for n, row in rows.items() if n.startswith(f"{gate} "))
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=gate)
    axes.set(xlim=(0, 100), xlabel="searches saved, %", ylabel="perplexity", title=f"{result['pair']}: gates")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
