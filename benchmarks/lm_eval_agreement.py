"""lm-evaluation-harness over HTTP, unmodified and offline, against its own backend and a float64 recomputation.

Task: ``loglikelihood_rolling`` over every sixth eval page by length, `max_length` 1024: windows of 1022 scored tokens
after one token of context, the last one of a page filled up with context from the left. Ways: the harness's `hf` on the
model folder (float32; its `max_length` is 2 less for the same windows); `local-completions` on a server of the same
folder; the same with `model` naming a datastore; and recomputed: transformers in float64, keys read by a hook on the
last feed-forward block, neighbours of the store looked up by those keys, distances, softmax and mixture in numpy from
the keys on disk. The store, and its calibration, are those of `strided_protocol.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import arguments, read_rows, write_result
from rich.progress import track
from served import MODEL, served
from strided_protocol import NAME, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_core.datastore.reader import Datastore

MAX_LENGTH, EVERY, TASK, PORT = 1024, 6, "pages", 8771
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: pages.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{", ".join(f"{{metric: {metric}}}" for metric in METRICS)}]
"""


class Evaluation(NamedTuple):
    """What the harness reports."""

    metrics: dict[str, float]
    log_likelihoods: list[float]  # per page, nats


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__, data=True).parse_args()
    root = args.work / "datastores"
    if not (root / NAME / "CURRENT").exists():
        build(args.model, args.data, args.work, root)
    pages = sorted(read_rows(args.data / "eval.jsonl.gz"), key=lambda page: len(page["text"]))[EVERY // 2 :: EVERY]
    runs = evaluate_all(str(Path(args.model).resolve()), root, args.work / "lm_eval", pages)
    base, mixed, tokens = recompute(args.model, root, [page["text"] for page in pages])
    columns = {
        "hf": runs["hf"].log_likelihoods,
        "served": runs["served"].log_likelihoods,
        "recomputed": base,
        f"served@{NAME}": runs["mixed"].log_likelihoods,
        f"recomputed@{NAME}": mixed,
    }
    reported = {"hf": runs["hf"].metrics, "served": runs["served"].metrics, f"served@{NAME}": runs["mixed"].metrics}
    result: dict[str, Any] = {
        "claim": "lm-eval over HTTP ≡ lm-eval on the folder, and with a store ≡ float64 recomputation, within 0.1 %",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "pages": [page["id"] for page in pages],
        "tokens": tokens,
        "reported": reported,
        "recomputed": {
            "recomputed": perplexities(base, pages),
            f"recomputed@{NAME}": perplexities(mixed, pages),
        },
        "log_likelihoods": columns,
        "largest_difference_nats_per_token": {
            "served − hf": difference(columns["served"], columns["hf"], tokens),
            "served − recomputed": difference(columns["served"], columns["recomputed"], tokens),
            f"served@{NAME} − recomputed@{NAME}": difference(
                columns[f"served@{NAME}"], columns[f"recomputed@{NAME}"], tokens
            ),
        },
        "relative_difference_of_byte_perplexity": {
            "served / hf": reported["served"]["byte_perplexity"] / reported["hf"]["byte_perplexity"] - 1,
            f"served@{NAME} / recomputed@{NAME}": reported[f"served@{NAME}"]["byte_perplexity"]
            / perplexities(mixed, pages)["byte_perplexity"]
            - 1,
        },
    }
    write_result("lm_eval_agreement", result, lambda axes: draw(axes, columns, pages))


def draw(axes: Any, columns: Mapping[str, list[float]], pages: list[dict[str, Any]]) -> None:
    """Bits per byte of each page, one bar per way."""
    sizes = np.array([len(page["text"].encode()) for page in pages])
    for i, (name, log_likelihoods) in enumerate(columns.items()):
        bits = -np.array(log_likelihoods) / sizes / math.log(2)
        axes.bar(np.arange(len(pages)) + (i - 2) * 0.16, bits, 0.16, label=name)
    names = [page["id"].removesuffix(".html") for page in pages]
    axes.set_xticks(range(len(pages)), names, rotation=15, ha="right", fontsize="small")
    axes.set(ylabel="bits per byte", title="The same pages through lm-evaluation-harness and recomputed")
    axes.margins(y=0.3)  # room for the legend
    axes.legend(ncols=3, fontsize="small", loc="upper center")


def perplexities(log_likelihoods: list[float], pages: list[dict[str, Any]]) -> dict[str, float]:
    """The harness's three figures: it counts words between white space, and bytes of UTF-8."""
    words = sum(len(re.split(r"\s+", page["text"])) for page in pages)
    size = sum(len(page["text"].encode()) for page in pages)
    nats = -sum(log_likelihoods)
    values = (math.exp(nats / words), math.exp(nats / size), nats / size / math.log(2))
    return dict(zip(METRICS, values, strict=True))


def difference(one: list[float], other: list[float], tokens: list[int]) -> float:
    """Largest over pages, in nats per token."""
    return float(np.max(np.abs(np.array(one) - np.array(other)) / np.array(tokens)))


# -- the harness -------------------------------------------------------------------------------------------------------


def evaluate_all(model: str, root: Path, folder: Path, pages: list[dict[str, Any]]) -> dict[str, Evaluation]:
    """The harness three times over the same pages, each in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = (json.dumps({"text": page["text"]}) + "\n" for page in pages)
    (folder / "pages.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "pages.yaml").write_text(YAML, encoding="utf-8")
    hf = {"pretrained": model, "dtype": "float32", "max_length": MAX_LENGTH - 2}
    runs = {"hf": evaluate(folder, "hf", "hf", hf)}
    with served(model, root, NAME, port=PORT, options=("--dtype", "float32")) as server:
        api: dict[str, object] = {
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": model,
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "max_length": MAX_LENGTH,
            "timeout": 3600,
        }
        for name, served_model in (("served", MODEL), ("mixed", f"{MODEL}@{NAME}")):
            runs[name] = evaluate(folder, name, "local-completions", api | {"model": served_model})
    return runs


def evaluate(folder: Path, name: str, backend: str, model_args: Mapping[str, object]) -> Evaluation:
    """One run of the command ``lm_eval``, offline and with caches of its own."""
    environment = os.environ | {
        "HF_HOME": str((folder / "cache").resolve()),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", backend,
        "--model_args", ",".join(f"{key}={value}" for key, value in model_args.items()),
        "--include_path", ".", "--tasks", TASK, "--log_samples", "--output_path", name,
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, env=environment, check=True)
    (results,) = (folder / name).glob("*/results_*.json")
    (samples,) = results.parent.glob(f"samples_{TASK}_*.jsonl")
    metrics = json.loads(results.read_text(encoding="utf-8"))["results"][TASK]
    rows = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
    return Evaluation(
        {metric: metrics[f"{metric},none"] for metric in METRICS}, [float(row["filtered_resps"][0]) for row in rows]
    )


# -- recomputed --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def recompute(model: str, root: Path, texts: list[str]) -> tuple[list[float], list[float], list[int]]:
    """Log-likelihood of each text, by the LM alone and mixed, and its number of tokens."""
    # The harness's own windows, taken from it.
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    seen: list[torch.Tensor] = []
    lm.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    totals, tokens = [], []
    with Datastore.open(root, NAME) as store:
        for text in track(texts, description="Recompute"):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            total = np.zeros(2)
            for window in get_rolling_token_windows(ids, prefix, max_seq_len=MAX_LENGTH - 2, context_len=1):
                context, targets = make_disjoint_window(window)
                seen.clear()
                logits = lm(torch.tensor([context + targets[:-1]])).logits[0, len(context) - 1 :]
                log_p = torch.log_softmax(logits, dim=1)[range(len(targets)), targets].numpy()
                total += log_p.sum(), mixture(store, seen[0][0, len(context) - 1 :], log_p, targets).sum()
            totals.append(total)
            tokens.append(len(ids))
    return [float(base) for base, _ in totals], [float(mixed) for _, mixed in totals], tokens


def mixture(
    store: Datastore, keys: torch.Tensor, log_p: np.ndarray[Any, Any], targets: list[int]
) -> np.ndarray[Any, Any]:
    """log p of each target: λ p_knn + (1 − λ) p_lm, where p_knn is a softmax over −distance / τ."""
    c = store.calibration
    assert c is not None
    found = store.search(keys.float(), c.k)
    result = []
    for row, target in enumerate(targets):
        ids = found.entry_ids[row]
        distances = ((store.keys(ids).double() - keys[row]) ** 2).sum(dim=1).numpy()
        weights = np.exp(-(distances - distances.min()) / c.knn_temperature)
        p_knn = weights[store.values(ids).numpy() == target].sum() / weights.sum()
        result.append(math.log(c.lmbda * p_knn + (1 - c.lmbda) * math.exp(log_p[row])))
    return np.array(result)


if __name__ == "__main__":
    main()
