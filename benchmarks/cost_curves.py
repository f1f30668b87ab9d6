"""What retrieval costs a decoding step, one thing changed at a time: k, entries, streams, and the gate's threshold.

Tokens per second over those of the base LM in the same round, 64 tokens after prompts of 64, greedy, no drafts; medians
over rounds. Unless it is what changes: the store given, its calibrated k and λ, one stream, a search at every token.

    k            16 … 1024; the index visits the same lists for each
    entries      10,000 … 1,000,000 synthetic ones as in `swap_size`, as wide as the LM's keys, in the builder's index
    streams      1 … 16, decoded together
    threshold    of the learned gate, in nats that a search must be expected to gain; the share searched beside it

The bound is the bytes of the weights over the bandwidth at which this machine sums a large tensor: no step that reads
all weights can be faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments, read_bandwidth, read_rows, write_result
from gated_decoding import PROMPT_TOKENS, one_round
from rich.progress import track
from swap_size import make_synthetic

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.retrieval import Retrieval, Source, with_gate, with_lambda_mode
from knnlm_server.engine.engine import Engine, EngineConfig

ROUNDS = 5
KS = (16, 64, 256, 1024)
ENTRIES = (10_000, 100_000, 300_000, 1_000_000)
STREAMS = (1, 2, 4, 8, 16)
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)

Points = dict[float, tuple[int, Retrieval]]  # what is changed → streams, and how they retrieve


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__, data=True)
    parser.add_argument("--store", required=True, help="ROOT/NAME of a datastore built with the same model")
    args = parser.parse_args()
    root = Path(args.store)
    with ExitStack() as stack:
        store = stack.enter_context(Datastore.open(root.parent, root.name))
        lm = load_lm(args.model, LoadOptions(max_length=1024, max_sequences=max(STREAMS)))
        assert isinstance(lm, HuggingFaceLM), "not the Hugging Face runtime"
        store.require_fits(lm.identity)
        pages = read_rows(args.data / "eval.jsonl.gz")
        prompts = [ids[:PROMPT_TOKENS] for row in pages if len(ids := lm.tokenizer.encode(row["text"])) > PROMPT_TOKENS]
        curves = points(store, lambda entries: stack.enter_context(synthetic(args.work, entries, lm)))
        table = measure(lm, prompts[: max(STREAMS)], curves)
        weights = sum(p.numel() * p.element_size() for p in lm._model.parameters())
    base = table.pop("base LM")
    result = {
        "claim": "what each of k, entries, streams and threshold costs",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip(),
        "store": store.name,
        "entries": store.entries,
        "rounds": ROUNDS,
        "bound": {"over base LM": read_bandwidth() / weights / base["1"]["tokens_per_second"]},
        "curves": table,
    }
    write_result("cost_curves", result, lambda axes: draw(axes, result))


def synthetic(work: Path, entries: int, lm: HuggingFaceLM) -> Datastore:
    """A store of so many entries, made once."""
    root, name = work / "sizes", f"n{entries}"
    if not (root / name / "CURRENT").exists():
        make_synthetic(root, name, entries, lm.identity)
    return Datastore.open(root, name)


def points(store: Datastore, of_size: Callable[[int], Datastore]) -> dict[str, Points]:
    """The curves."""
    calibration = store.calibration
    if calibration is None or store.gate_trees is None:
        raise SystemExit("the store needs a calibration and a learned gate")
    plain = Source(store, calibration.k, calibration.knn_temperature, calibration.lmbda)
    used = with_lambda_mode(plain, calibration, None, store.name)

    def gated(threshold: float) -> Source:
        return with_gate(used, calibration, store.gate_trees, ("learned", threshold), store.name)

    return {
        "k": {k: (1, Retrieval((replace(plain, k=k),))) for k in KS},
        "entries": {n: (1, Retrieval((replace(plain, datastore=of_size(n)),))) for n in ENTRIES},
        "streams": {n: (n, Retrieval((used,))) for n in STREAMS},
        "threshold": {threshold: (1, Retrieval((gated(threshold),))) for threshold in THRESHOLDS},
    }


def measure(lm: HuggingFaceLM, prompts: list[list[int]], curves: dict[str, Points]) -> dict[str, dict[str, Any]]:
    """All points in turns, and the base LM at every number of streams."""
    cases: dict[tuple[str, float], tuple[int, Retrieval | None]] = {("base LM", n): (n, None) for n in STREAMS}
    cases |= {(curve, at): case for curve, of_curve in curves.items() for at, case in of_curve.items()}
    engine = Engine(lm, (), EngineConfig(draft_tokens=0))
    engine.start()
    rounds = []
    try:
        for streams, how in cases.values():
            one_round(engine, lm, prompts[:streams], how)
        for _ in track(range(ROUNDS), description="Rounds"):
            rounds.append({case: one_round(engine, lm, prompts[:n], how) for case, (n, how) in cases.items()})
    finally:
        engine.stop(0)
    table: dict[str, dict[str, Any]] = {}
    for case, (streams, _) in cases.items():
        curve, at = case
        over = [r[case]["tokens_per_second"] / r["base LM", streams]["tokens_per_second"] for r in rounds]
        table.setdefault(curve, {})[f"{at:g}"] = {
            "tokens_per_second": statistics.median(r[case]["tokens_per_second"] for r in rounds),
            "over base LM": statistics.median(over),
            "low": min(over),
            "high": max(over),
            "searched": rounds[0][case]["searched"],
        }
    return table


def draw(axes: Any, result: dict[str, Any]) -> None:
    """One panel a curve."""
    figure = axes.figure
    axes.remove()
    for panel, (curve, of_curve) in zip(figure.subplots(2, 2).flat, result["curves"].items(), strict=True):
        at = [float(value) for value in of_curve]
        middle = [point["over base LM"] for point in of_curve.values()]
        below = [point["over base LM"] - point["low"] for point in of_curve.values()]
        above = [point["high"] - point["over base LM"] for point in of_curve.values()]
        panel.errorbar(at, middle, yerr=(below, above), marker="o", capsize=3)
        if curve == "threshold":
            panel.plot(at, [point["searched"] for point in of_curve.values()], ":", color="tab:gray", label="searched")
            panel.legend(fontsize=7)
        else:
            panel.set_xscale("log")
        panel.axhline(1, color="0.3", linewidth=1)
        if curve != "streams":
            panel.axhline(result["bound"]["over base LM"], color="tab:red", linestyle="--", linewidth=1)
        panel.set_ylim(bottom=0)
        panel.set_xlabel(curve, fontsize=8)
        panel.tick_params(labelsize=7)
    figure.suptitle("Tokens/s over the base LM's; dashed: bound by memory bandwidth", fontsize=9)


if __name__ == "__main__":
    main()
