"""What the benchmarks share: arguments, data, results as JSON and plot."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from knnlm_core import __version__

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None, *, data: bool = False) -> argparse.ArgumentParser:
    """A parser with the arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="hub id, folder or GGUF file")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where datastores are built")
    if data:
        parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz and eval.jsonl.gz")
    return parser


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl.gz file, in file order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def shuffled_train_rows(data: Path) -> list[dict[str, Any]]:
    """The training pages in the order of every figure here: shuffled with seed 0."""
    rows = read_rows(data / "train.jsonl.gz")
    random.Random(0).shuffle(rows)
    return rows


def write_result(name: str, result: dict[str, Any], draw: Callable[[Any], None]) -> None:
    """Write ``results/<name>.json`` and ``results/<name>.png`` and print the JSON.

    Args:
        draw: gets a matplotlib axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    RESULTS.mkdir(exist_ok=True)
    settings = {
        "knnlm": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    text = json.dumps({"name": name, **result, "settings": settings}, indent=2, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    draw(axes)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)
    print(text)


def read_bandwidth() -> float:
    """Bytes per second at which all threads together read a tensor that no cache holds."""
    data = torch.ones(1 << 27)
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - begun)
    return data.nbytes / statistics.median(seconds)
