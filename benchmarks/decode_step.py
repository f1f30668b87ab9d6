"""One decoding step of the Hugging Face runtime against its own matrix products: float32, compiled, bfloat16 and int8.

A step is `forward` of some sequences and `logits` of their rows, after 200 tokens each: 1, 4 and 16 sequences with one
new token, one sequence with 2, 4 and 8 (as when drafts are verified), and a prompt of 512 tokens (one row of logits).
The bound of a step is what its linear layers and head alone take for the same rows, in float32, in the order and shapes
of the model; beside it stands the time to read their weights once at the bandwidth that summing 512 MiB reaches here.
`float32, compiled` has every one of these steps compiled, in an empty folder; its prompts are those of float32.
`seconds_to_load` is that of each variant, compiling included.
Every round runs every variant once, one after the other; ratios are medians over rounds of ratios within a round.

Quality: perplexity of the first 10,000 tokens of the eval pages, windows of 1024 with stride 512, and what becomes of
the logits of their first 512 tokens. `int8 activations` is int8 whose activations have one plane of int8, per token.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, read_rows, write_result
from torch import Tensor, nn

from knnlm_core.lm.head import log_probs_of_targets
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.int8 import Int8Weights
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import Span
from knnlm_core.windows import rolling_windows

ROUNDS, CONTEXT, PROMPT = 9, 200, 512
STEPS = ((1, 1), (1, 2), (1, 4), (1, 8), (4, 1), (16, 1))  # sequences, new tokens of each
COMPILED = "float32, compiled"
VARIANTS = {
    "float32": LoadOptions(dtype="float32"),
    COMPILED: LoadOptions(dtype="float32", compile_steps=tuple(f"{rows}x{width}" for rows, width in STEPS)),
    "bfloat16": LoadOptions(dtype="bfloat16"),
    "int8": LoadOptions(dtype="float32", weights="int8"),
}
READ_FLOATS = 1 << 27
WINDOW, STRIDE, SCORED, COMPARED = 1024, 512, 10_000, 512
NEED_OF_BOUND, NEED_OF_INT8 = 0.70, 1.4

Times = dict[str, list[float]]


class Stepper:
    """One variant with 16 sequences of CONTEXT tokens."""

    def __init__(self, model: str, options: LoadOptions) -> None:
        lm = load_lm(model, options)
        assert isinstance(lm, HuggingFaceLM), "not the Hugging Face runtime"
        self.lm = lm
        draw = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(1, lm.identity.vocab_size, (CONTEXT + PROMPT,), generator=draw).tolist()
        self._prompt, *self._sequences = [lm.allocate() for _ in range(1 + max(rows for rows, _ in STEPS))]
        for sequence in self._sequences:
            lm.forward([Span(sequence, self._tokens[:CONTEXT])])

    def step(self, rows: int, width: int) -> None:
        """Append ``width`` tokens to each of ``rows`` sequences, compute their logits, and take them back."""
        new = self._tokens[CONTEXT : CONTEXT + width]
        spans = [Span(sequence, new, rows=width) for sequence in self._sequences[:rows]]
        self.lm.logits(self.lm.forward(spans).hidden)
        for span in spans:
            self.lm.rewind(span.sequence, CONTEXT)

    def prompt(self) -> None:
        """Read a prompt of PROMPT tokens."""
        self.lm.logits(self.lm.forward([Span(self._prompt, self._tokens[-PROMPT:])]).hidden)
        self.lm.rewind(self._prompt, 0)


def main() -> None:
    """Run and write the result."""
    args = arguments(__doc__, data=True).parse_args()
    steppers, seconds = {}, {}
    with tempfile.TemporaryDirectory() as compiled:
        for name, options in VARIANTS.items():  # loaded before anything is measured
            started = time.perf_counter()
            steppers[name] = Stepper(args.model, _with_room(options, Path(compiled)))
            seconds[name] = time.perf_counter() - started
    linears = [m for m in steppers["float32"].lm._model.modules() if isinstance(m, nn.Linear)]
    num_bytes = sum(m.weight.numel() * m.weight.element_size() for m in linears)
    times = measure(steppers, linears)
    quality = {name: {**of} for name, of in measure_quality(args.model, args.data, steppers).items()}
    bandwidth = READ_FLOATS * 4 / statistics.median(times["read"])
    result = {
        "claim": f"a float32 step of one stream takes at most 1 / {NEED_OF_BOUND} of its linear layers and head alone; "
        f"int8 is at least {NEED_OF_INT8} × as fast",
        "protocol": (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        "float32_of_bound": {name: ratio(times, f"bound {r * w} rows", f"float32 {name}") for name, r, w in _steps()},
        "compiled_speedup": {name: ratio(times, f"float32 {name}", f"{COMPILED} {name}") for name, _, _ in _steps()},
        "compiled_of_bound": {
            name: ratio(times, f"bound {r * w} rows", f"{COMPILED} {name}") for name, r, w in _steps()
        },
        "int8_speedup": {name: ratio(times, f"float32 {name}", f"int8 {name}") for name in _names()},
        "bfloat16_speedup": {name: ratio(times, f"float32 {name}", f"bfloat16 {name}") for name in _names()},
        "quality": quality,
        "seconds_to_load": seconds,
        "weights_bytes": num_bytes,
        "bytes_per_s": bandwidth,
        "ms_to_read_the_weights": num_bytes / bandwidth * 1e3,
        "median_ms": {name: statistics.median(taken) * 1e3 for name, taken in times.items()},
        "least_ms": {name: min(taken) * 1e3 for name, taken in times.items()},
    }
    write_result("decode_step", result, lambda axes: draw(axes, result))


def _with_room(options: LoadOptions, compiled: Path) -> LoadOptions:
    sequences = 1 + max(rows for rows, _ in STEPS)
    return dataclasses.replace(
        options, max_sequences=sequences, max_length=2 * (CONTEXT + PROMPT), compile_cache=compiled
    )


def _steps() -> list[tuple[str, int, int]]:
    return [(f"{rows} × {width}", rows, width) for rows, width in STEPS]


def _names() -> list[str]:
    return [name for name, _, _ in _steps()] + ["prompt"]


def measure(steppers: dict[str, Stepper], linears: list[nn.Linear]) -> Times:
    """Seconds of everything, round by round."""
    big = torch.ones(READ_FLOATS)
    sizes = {m.in_features for m in linears}
    work: dict[str, Callable[[], object]] = {"read": big.sum}
    for rows in sorted({rows * width for rows, width in STEPS}):
        hidden = {size: torch.randn(rows, size) for size in sizes}
        work[f"bound {rows} rows"] = lambda hidden=hidden: products(linears, hidden)  # type: ignore[misc]
    for name, rows, width in _steps():
        for variant, stepper in steppers.items():
            work[f"{variant} {name}"] = lambda s=stepper, r=rows, w=width: s.step(r, w)  # type: ignore[misc]
    for variant, stepper in steppers.items():
        work[f"{variant} prompt"] = stepper.prompt
    for run in work.values():
        run()
    times: Times = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


@torch.inference_mode()
def products(linears: list[nn.Linear], hidden: dict[int, Tensor]) -> None:
    """All linear layers and the head, on as many rows."""
    for module in linears:
        nn.functional.linear(hidden[module.in_features], module.weight, module.bias)


def ratio(times: Times, above: str, below: str) -> float:
    """Median over rounds of one time divided by another of the same round."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def measure_quality(model: str, data: Path, steppers: dict[str, Stepper]) -> dict[str, dict[str, float]]:
    """Perplexity of each variant, and how far its logits are from those of float32."""
    texts, left = [], SCORED
    tokenizer = steppers["float32"].lm.tokenizer
    for row in read_rows(data / "eval.jsonl.gz"):
        texts.append(tokenizer.encode(row["text"])[:left])
        left -= len(texts[-1])
        if left < 2:
            break
    lms = {name: stepper.lm for name, stepper in steppers.items() if name != COMPILED}  # whole windows are float32's
    scored = {name: score(lm, texts) for name, lm in lms.items()}
    two_planes = Int8Weights.product
    Int8Weights.product = one_plane  # type: ignore[method-assign]
    try:
        scored["int8 activations"] = score(lms["int8"], texts)
    finally:
        Int8Weights.product = two_planes  # type: ignore[method-assign]
    base = scored["float32"][1]
    return {
        name: {
            "perplexity": perplexity,
            "logits_max_difference": (logits - base).abs().max().item(),
            "logits_mean_difference": (logits - base).abs().mean().item(),
            "same_first_choice": (logits.argmax(1) == base.argmax(1)).double().mean().item(),
        }
        for name, (perplexity, logits) in scored.items()
    }


def one_plane(self: Int8Weights, rows: Tensor) -> Tensor:
    """What `Int8Weights.product` would be with int8 activations."""
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    planes = torch.cat(((rows / scale).round(), torch.zeros_like(rows))).to(
        torch.int8
    )  # a single row takes a slow path
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        planes, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    output = product[: len(rows)] * scale
    return output if self._bias is None else output + self._bias


def score(lm: HuggingFaceLM, texts: list[list[int]]) -> tuple[float, Tensor]:
    """Perplexity of texts, and the logits of the first tokens."""
    log_probs = []
    for ids in texts:
        for window in rolling_windows(len(ids), WINDOW, STRIDE):
            rows = lm.encode([ids[window.begin : window.end - 1]], [window.first_target - window.begin - 1])
            targets = torch.tensor(ids[window.first_target : window.end])
            log_probs.append(log_probs_of_targets(lm, rows.hidden, targets))
    first = lm.encode([texts[0][:COMPARED]], [0])
    return math.exp(-torch.cat(log_probs).double().mean().item()), lm.logits(first.hidden)


def draw(axes: Any, result: dict[str, Any]) -> None:
    """Milliseconds of each step, one bar per variant, the bound as a line."""
    taken = result["median_ms"]
    steps = _steps()
    for i, variant in enumerate(VARIANTS):
        places = [x + 0.21 * (i - (len(VARIANTS) - 1) / 2) for x in range(len(steps))]
        axes.bar(places, [taken[f"{variant} {name}"] for name, _, _ in steps], 0.19, label=variant)
    for x, (_, rows, width) in enumerate(steps):
        bound = taken[f"bound {rows * width} rows"]
        axes.plot([x - 0.42, x + 0.42], [bound, bound], "k--", label=None if x else "float32 products alone")
    axes.set_xticks(range(len(steps)), [name for name, _, _ in steps])
    axes.set(xlabel="sequences × new tokens", ylabel="milliseconds", title="One step of the LM")
    axes.legend()


if __name__ == "__main__":
    main()
