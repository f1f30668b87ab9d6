"""Encoding a store against the LM's own forward pass without its head, over the same windows, in one run.

Both sides see the same padded batches, in turn, several times; the ratio is of the medians. The encode side is what a
build does: tap, row selection, conversion to float16, bytes to a file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import arguments, write_result

from knnlm_core.datastore.writer import ShardWriter
from knnlm_core.lm.loading import load_lm

WINDOW, FIRST_ROW, WINDOWS_PER_PASS, ROUNDS = 1023, 511, 4, 7


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__).parse_args()
    lm = load_lm(args.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lm.identity.vocab_size, (WINDOWS_PER_PASS, WINDOW), generator=generator)
    spans = torch.zeros((WINDOWS_PER_PASS * (WINDOW - FIRST_ROW), 2), dtype=torch.int32)
    values = ids[:, FIRST_ROW:].reshape(-1)

    @torch.inference_mode()
    def bare() -> None:
        lm._body(input_ids=ids, use_cache=False)

    with tempfile.TemporaryDirectory() as folder, ShardWriter(Path(folder) / "shard", lm.identity.key_dim) as writer:

        def encode() -> None:
            rows = lm.encode(list(ids), [FIRST_ROW] * WINDOWS_PER_PASS)
            writer.append(rows.keys, values, spans)

        times: dict[str, list[float]] = {"bare": [], "encode": []}
        for side in (bare, encode):
            side()
        for _ in range(ROUNDS):
            for name, side in (("bare", bare), ("encode", encode)):
                started = time.perf_counter()
                side()
                times[name].append(time.perf_counter() - started)
    ratios = [e / b for b, e in zip(times["bare"], times["encode"], strict=True)]
    result = {
        "claim": "encode stage ≤ 1.15 × the bare forward pass without head",
        "protocol": f"{WINDOWS_PER_PASS} windows of {WINDOW} tokens, rows {FIRST_ROW}…, {ROUNDS} alternating rounds",
        "ratio_of_medians": statistics.median(times["encode"]) / statistics.median(times["bare"]),
        "ratio_per_round": ratios,
        "seconds": times,
    }
    write_result(
        "encode_overhead",
        result,
        lambda axes: (
            axes.plot(ratios, "o-"),
            axes.axhline(1.15, color="grey", linestyle="--"),
            axes.set(xlabel="round", ylabel="encode / bare forward", title="Cost of encoding a datastore"),
        ),
    )


if __name__ == "__main__":
    main()
