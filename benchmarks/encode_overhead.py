"""The encode stage of a build against the LM's own forward pass without its head, over the same windows, in one run.

Windows: the first 24 of the Python language reference, 1024 tokens with stride 512, in the build's own batches. One
side is the stage itself (`build_shard`: window cutting, tap, row selection, float16, files on disk), the other the
model's body over the same padded batches. Both take turns, several times; the ratio is of the medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, write_result

from knnlm_builder.progress import SilentReporter
from knnlm_builder.settings import BuildSettings
from knnlm_builder.stages.encode import LOOKAHEAD, batches_by_length
from knnlm_builder.stages.plan import Plan, make_plan
from knnlm_builder.stages.shards import build_shard
from knnlm_cli.demo_corpus import write_python_reference
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import load_lm

WINDOWS, ROUNDS, LIMIT = 24, 5, 1.15


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__).parse_args()
    lm = load_lm(args.model)
    times: dict[str, list[float]] = {"bare": [], "encode": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_python_reference(folder / "corpus" / "reference.jsonl")
        settings = BuildSettings(model=args.model, inputs=(corpus,), output=folder, name="bench")
        plan = make_plan(settings, settings.windowing(lm.max_length), lm.tokenizer, folder, SilentReporter())
        shard = next(plan.shards(settings.shard_entries))
        shard = shard._replace(windows=shard.windows[:WINDOWS])
        inputs = _bare_inputs(plan, shard.windows, settings.batch_tokens)
        _bare(lm, inputs[:1])
        for round_ in range(ROUNDS):
            started = time.perf_counter()
            _bare(lm, inputs)
            times["bare"].append(time.perf_counter() - started)
            started = time.perf_counter()
            build_shard(lm, plan, shard, folder / f"shard-{round_}", settings.batch_tokens, lambda done: None)
            times["encode"].append(time.perf_counter() - started)
    ratios = [e / b for b, e in zip(times["bare"], times["encode"], strict=True)]
    result = {
        "claim": f"encode stage ≤ {LIMIT} × the bare forward pass without head",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "ratio_of_medians": statistics.median(times["encode"]) / statistics.median(times["bare"]),
        "ratio_per_round": ratios,
        "seconds": times,
    }
    write_result(
        "encode_overhead",
        result,
        lambda axes: (
            axes.plot(range(1, ROUNDS + 1), ratios, "o-"),
            axes.axhline(LIMIT, color="grey", linestyle="--", label="limit"),
            axes.set(xlabel="round", ylabel="encode stage / bare forward", title="Cost of encoding a datastore"),
            axes.legend(),
        ),
    )


def _bare_inputs(plan: Plan, windows: Any, batch_tokens: int) -> list[torch.Tensor]:
    """The padded batches that the encode stage will make of the same windows."""
    result = []
    for start in range(0, len(windows), LOOKAHEAD):
        ahead = windows[start : start + LOOKAHEAD]
        ids = [torch.from_numpy(plan.tokens(d)[w.begin : w.end - 1].astype("int64")) for d, w in ahead]
        for batch in batches_by_length([len(row) for row in ids], batch_tokens):
            result.append(torch.nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True))
    return result


@torch.inference_mode()
def _bare(lm: HuggingFaceLM, inputs: list[torch.Tensor]) -> None:
    for ids in inputs:
        lm._body(input_ids=ids, use_cache=False)


if __name__ == "__main__":
    main()
