"""Base and mixed perplexity of every eval page, as served over HTTP, with an interval, and recomputed in float64.

Store: training pages shuffled with seed 0, the first 300,000 entries, built by `knnlm build` with its defaults (windows
of 1024 tokens, stride 512); k, τ and λ calibrated on training pages held out by that build. Evaluation: all eval pages,
each token scored once, window 1024, stride 512, with every way of setting λ that the calibration has; headline and
pages are of the one that it chose, on held-out training pages. Nothing is tuned on what is reported. The interval is a
block bootstrap over blocks of 128 tokens inside a page, 2,000 resamples; a second one draws whole pages.

Recomputation: for every second page by length, its first two windows: keys are encoded, the store's own neighbours are
looked up by id, and distances, softmax and mixture are computed in numpy float64 from the keys on disk, with the λ that
was served.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from common import arguments, read_rows, shuffled_train_rows, write_result
from rich.progress import track
from served import MODEL, served

from knnlm_builder.stages.fit import bootstrap_gain
from knnlm_client import Client
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import load_lm
from knnlm_core.lm.protocol import Rows
from knnlm_core.windows import rolling_windows

ENTRIES, WINDOW, STRIDE, BLOCK = 300_000, 1024, 512, 128
PORT, NAME = 8765, "bench"
RECOMPUTED_PAGES, RECOMPUTED_WINDOWS = 18, 2


def main() -> None:
    """Run and write the result."""
    parser = arguments(__doc__, data=True)
    args = parser.parse_args()
    root = args.work / "datastores"
    build(args.model, args.data, args.work, root)
    pages = read_rows(args.data / "eval.jsonl.gz")
    by_mode, datastore = score_pages(args.model, root, pages)
    scores = by_mode[datastore["calibration"]["lambda_mode"]]
    base = [np.array([t["base"] for t in page]) for page in scores]
    mixed = [np.array([t["mixed"] for t in page]) for page in scores]
    worst, checked = recompute(args.model, root, pages, scores)

    all_base, all_mixed = torch.tensor(np.concatenate(base)), torch.tensor(np.concatenate(mixed))
    blocks = [np.arange(len(page)) // BLOCK for page in base]
    offsets = np.cumsum([0, *(b[-1] + 1 for b in blocks[:-1])])
    block_ids = torch.tensor(np.concatenate([b + o for b, o in zip(blocks, offsets, strict=True)]))
    page_ids = torch.tensor(np.repeat(np.arange(len(base)), [len(page) for page in base]))
    by_block = bootstrap_gain(all_base, all_mixed, block_ids, seed=0)
    by_page = bootstrap_gain(all_base, all_mixed, page_ids, seed=0)
    modes = {}
    for mode, of_mode in by_mode.items():
        log_probs = torch.tensor([t["mixed"] for page in of_mode for t in page])
        blocks_gain, pages_gain = (bootstrap_gain(all_base, log_probs, ids, seed=0) for ids in (block_ids, page_ids))
        modes[mode] = {
            "perplexity": math.exp(-float(log_probs.double().mean())),
            "gain": blocks_gain.gain,
            "gain_interval_95_blocks": [blocks_gain.low, blocks_gain.high],
            "gain_interval_95_pages": [pages_gain.low, pages_gain.high],
        }
    per_page = [math.exp(float((b - m).mean())) - 1 for b, m in zip(base, mixed, strict=True)]
    calibration = datastore["calibration"]
    result: dict[str, Any] = {
        "claim": "mixed perplexity at least 5 % below base; served ≡ float64 recomputation within 1e-3 nats per token",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "entries": datastore["entries"],
        "pages": len(pages),
        "tokens": len(all_base),
        "settings_used": {name: calibration[name] for name in ("k", "temperature", "lambda", "lambda_mode")},
        "lambda_modes": modes,
        "calibration_report": {n: calibration["report"][n] for n in ("tokens", "base", "mixed", "gain")},
        "perplexity": {"base": math.exp(-float(all_base.mean())), "mixed": math.exp(-float(all_mixed.mean()))},
        "gain": by_block.gain,
        "gain_interval_95_blocks": [by_block.low, by_block.high],
        "gain_interval_95_pages": [by_page.low, by_page.high],
        "pages_that_got_worse": sum(change > 0 for change in per_page),
        "change_per_page": {page["id"]: change for page, change in zip(pages, per_page, strict=True)},
        "recomputed_tokens": checked,
        "largest_difference_nats": worst,
    }
    order = np.argsort(per_page)
    write_result(
        "strided_protocol",
        result,
        lambda axes: (
            axes.bar(range(len(order)), [100 * per_page[i] for i in order]),
            axes.axhline(-100 * by_block.gain, color="tab:red", label="all tokens"),
            axes.axhspan(-100 * by_block.high, -100 * by_block.low, color="tab:red", alpha=0.2, label="95 % interval"),
            axes.set(
                xlabel="eval page, sorted", ylabel="change of perplexity, %", title="Mixed against base, per page"
            ),
            axes.legend(),
        ),
    )


def build(model: str, data: Path, work: Path, root: Path) -> None:
    """Build the store with the command that users run; done before, it says so at once."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / "train.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in shuffled_train_rows(data)), encoding="utf-8")
    command = ["build", "--model", model, "--input", str(corpus), "--output", str(root), "--name", NAME]
    subprocess.run([sys.executable, "-m", "knnlm_cli", *command, "--max-tokens", str(ENTRIES)], check=True)


def score_pages(
    model: str, root: Path, pages: list[dict[str, Any]]
) -> tuple[dict[str, list[list[dict[str, Any]]]], Any]:
    """Per-token scores of every page from a running server by λ mode, and the server's description of the store."""
    with served(model, root, NAME, port=PORT) as server, Client(server.url, timeout=3600) as client:
        datastore = httpx.get(f"{server.url}/v1/datastores/{NAME}").json()
        by_mode: dict[str, list[list[dict[str, Any]]]] = {}
        for mode in datastore["calibration"]["lambda_modes"]:
            options = {"per_token": True, "window": WINDOW, "stride": STRIDE, "knn": {"lambda_mode": mode}}
            by_mode[mode] = []
            for page in track(pages, description=f"Score, λ {mode}"):
                answer = client.score([page["text"]], model=f"{MODEL}@{NAME}", **options)  # type: ignore[arg-type]
                by_mode[mode].append([t.model_dump(by_alias=True) for t in answer.results[0].per_token or []])
        return by_mode, datastore


@torch.inference_mode()
def recompute(
    model: str, root: Path, pages: list[dict[str, Any]], scores: list[list[dict[str, Any]]]
) -> tuple[float, int]:
    """Largest difference in nats between served and recomputed log-probabilities, and how many were compared."""
    lm = load_lm(model)
    store = Datastore.open(root, NAME)
    assert store.calibration is not None
    chosen = sorted(range(len(pages)), key=lambda i: len(scores[i]))[:: max(1, len(pages) // RECOMPUTED_PAGES)]
    worst, checked = 0.0, 0
    for i in track(chosen, description="Recompute"):
        ids = lm.tokenizer.encode(pages[i]["text"])
        for window in islice(rolling_windows(len(ids), WINDOW, STRIDE), RECOMPUTED_WINDOWS):
            first = window.first_target - 1 - window.begin
            rows = lm.encode([ids[window.begin : window.end - 1]], [first])
            targets = ids[window.first_target : window.end]
            here = scores[i][window.first_target - 1 : window.end - 1]
            log_p = _mixture(lm, store, rows, targets, [t["lambda"] for t in here])
            served = [t["mixed"] for t in here]
            worst = max(worst, float(np.abs(log_p - np.array(served)).max()))
            checked += len(targets)
    return worst, checked


def _mixture(
    lm: HuggingFaceLM, store: Datastore, rows: Rows, targets: list[int], lambdas: list[float]
) -> np.ndarray[Any, Any]:
    """log p of each target, token by token, in float64, dense over the vocabulary."""
    c = store.calibration
    assert c is not None
    found = store.search(rows.keys, c.k)
    result = []
    for row, (target, lmbda) in enumerate(zip(targets, lambdas, strict=True)):
        logits = lm.logits(rows.hidden[row : row + 1])[0].double().numpy()
        p_lm = np.exp(logits - logits.max())
        p_lm /= p_lm.sum()
        ids = found.entry_ids[row]
        distances = ((store.keys(ids).double() - rows.keys[row].double()) ** 2).sum(dim=1).numpy()
        weights = np.exp(-(distances - distances.min()) / c.knn_temperature)
        p_knn = np.zeros_like(p_lm)
        np.add.at(p_knn, store.values(ids).numpy(), weights / weights.sum())
        result.append(math.log(lmbda * p_knn[target] + (1 - lmbda) * p_lm[target]))
    return np.array(result)


if __name__ == "__main__":
    main()
